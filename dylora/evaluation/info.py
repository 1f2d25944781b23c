"""`run.py info`: what a folder is: a checkpoint, a PEFT adapter, or an export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylora.config import MoELoraConfig
from dylora.integrations.compatibility import find_incompatibilities
from dylora.storage import schema
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.detect import Found, detect_format
from dylora.storage.folders import folder_bytes
from dylora.storage.hub import local_folder
from dylora.storage.manifest import MANIFEST, integrity_errors
from dylora.storage.peft_config import CONFIG_FILE, alpha_of
from dylora.storage.peft_format import WEIGHTS_FILE, read_stock_adapter
from dylora.storage.peft_types import PEFT_TYPES
from dylora.storage.safe_io import read_json
from dylora.storage.skill_file import read_table
from dylora.storage.tensors import read_headers, read_tensors


def print_info(path: str, revision: str | None = None) -> None:
    """Print what a folder holds, and whether its files are as they were written.

    revision: of a path that is user/name, a repository of the hub.

    Raises ValueError naming what is wrong, after all that can be known of the rest is printed;
    FileNotFoundError where there is no such folder.
    """
    folder = local_folder(path, revision)
    found, wrong = detect_format(folder), {}
    if (folder / WEIGHTS_FILE).exists():
        tell = _print_adapter
    elif (folder / schema.EXPORT_FILE).exists():
        tell = _print_merged
    elif found is not None and found.kind in ("adapter", "older mixture", "whole model"):
        print_foreign(folder, found)
        return
    elif (folder / MANIFEST).exists() or (folder / schema.ADAPTERS).exists():
        tell = _print_checkpoint
    elif any(folder.glob(f"*/{CONFIG_FILE}")):
        _print_adapters(folder)
        return
    else:
        raise ValueError(f"{folder} is no checkpoint, no PEFT adapter and no export of ours")
    size = f"{folder_bytes(folder) / 1e6:.1f} MB"
    if tell is _print_adapter and not (folder / MANIFEST).exists():
        print(f"{folder}: {size}, no {MANIFEST} to verify it by")
    else:
        wrong = _find_damage(folder)
        if tell is _print_checkpoint and not wrong:
            Checkpoint.of_verified(folder)  # one that is refused is not called whole
        state = f"DAMAGED, {size}" if wrong else f"whole, {size}, every file as written"
        print(f"{folder}: {state}")
    for name, what in wrong.items():
        print(f"damaged     {what if name == MANIFEST else f'{name} {what}'}")
    tell(folder, wrong)
    _raise_damage(folder, wrong)


def _print_checkpoint(folder: Path, wrong: Mapping[str, str]) -> None:
    """A mixture; of a damaged one its description may be of use."""
    description = {}
    if not wrong.keys() & {"config.json", MANIFEST}:
        description = read_json(folder / "config.json")
    if description.get("format_version") == schema.FORMAT_VERSION:
        _print_description(folder, description)
        if not wrong:
            _print_stream(folder, description)
    else:
        damaged = {name.split("/")[1] for name in wrong if name.startswith(f"{schema.ADAPTERS}/")}
        _print_adapter_lines(folder / schema.ADAPTERS, damaged)
    _print_sizes(folder)


def _print_description(folder: Path, description: Mapping[str, Any]) -> None:
    """What config.json says."""
    moe = MoELoraConfig().to_dict() | description["moe"]
    training, experts = description["training"], description["experts"]
    kind = description["quantization"]
    stored = "not quantised" if kind == "none" else f"quantised: {kind}"
    base = {**description, "revision": description["base_revision"]}
    print(f"base        {_base(base)}, {stored}")
    if moe["adapter_type"] != "lora":
        print(f"adapters    {moe['adapter_type']}")
    router = moe["router_type"] if moe["router_scope"] in ("site", "shared") else "by the prompt"
    counts = moe.get("experts_per_layer")
    by_layer = f" (by layer {', '.join(map(str, counts))})" if counts else ""
    print(
        f"routing     {router}, top {moe['top_k_experts']} of {len(experts)}{by_layer}, "
        f"{len(description['sites'])} sites, {len(description['projections'])} projections"
    )
    for expert in experts:
        size = folder_bytes(folder / schema.ADAPTERS / expert["name"])
        print(
            f"{expert['name']:11} {expert['state']}, rank {expert['rank']}, "
            f"alpha {expert['alpha']:g}, maturity {expert['maturity']:.3f}, "
            f"trained {expert['steps']} steps, {size / 1e6:.2f} MB"
            + (f", skill {expert['skill']}" if expert["skill"] else "")
        )
    if {"step", "targets", "seed"} <= training.keys():
        print(
            f"trained     {training['step']} steps, {training['targets']:,} target tokens, "
            f"seed {training['seed']}"
        )
    for source in training.get("data", {}).get("sources", []):
        scheme, rows = source.get("split_scheme") or "generated", source.get("training_rows", "?")
        print(f"data        {source['name']}: {rows} rows, split {scheme}")
    run = folder.resolve().parent
    if (run / "config.yaml").exists():
        print(f"run         {run.name}, its settings in {folder.parent / 'config.yaml'}")


def _print_stream(folder: Path, description: Mapping[str, Any]) -> None:
    """What became of the stages of a stream, and the skills that the library knows."""
    training = description["training"]
    if "stage" in training or any("stage" in run for run in training.get("earlier", [])):
        from dylora.training.stages import describe, records_of  # it imports transformers

        for record in records_of(training, str(folder / "config.json")):
            print(f"stage       {record.number}, {describe(record)}")
    file = folder / schema.SKILLS_FILE
    if file.exists():
        read_headers(file)
        for skill in read_table(file, len(description["experts"])):
            expert = "no expert" if skill["expert"] is None else f"expert {skill['expert']}"
            print(
                f"skill       {skill['name']}: {expert}, {skill['rows']} rows, "
                f"{skill['held_out']} held out"
            )


def _print_sizes(folder: Path) -> None:
    """Megabytes of adapters, routers and what only a resumed run needs."""
    adapters = folder_bytes(folder / schema.ADAPTERS)
    files = [folder / name for name in (schema.ROUTER_FILE, schema.SHIFTS_FILE)]
    routers = sum(file.stat().st_size for file in files if file.exists())
    rest = folder_bytes(folder) - adapters - routers
    print(
        f"size        {folder_bytes(folder) / 1e6:.2f} MB: adapters {adapters / 1e6:.2f}, "
        f"routers {routers / 1e6:.2f}, description and state of the run {rest / 1e6:.2f}"
    )


# Adapters and models made by export, or by PEFT itself


def _print_adapter(folder: Path, wrong: Mapping[str, str]) -> None:
    """An adapter, be it an expert, a mixture or one of PEFT's own."""
    if wrong:
        return
    adapter = read_stock_adapter(folder)
    config, paths = adapter.config, list(adapter.weights)
    print(f"base        {_base(config)}")
    kinds = ["DoRA"] if adapter.magnitudes else []
    kinds += ["rslora"] if config.get("use_rslora") else []
    kinds += [f"{len(adapter.biases)} biases"] if adapter.biases else []
    kinds += [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    name = "LoRA" if adapter.type == "LORA" else adapter.type
    alpha = config[PEFT_TYPES[adapter.type].alpha]
    print(f"{name:11} rank {config['r']}, alpha {alpha:g}", *kinds, sep=", ")
    names = sorted({path.rpartition(".")[2] for path in paths})
    print(f"targets     {len(paths)} projections: {', '.join(names)}")
    if (folder / schema.EXPORT_FILE).exists():
        _print_record(read_json(folder / schema.EXPORT_FILE))
    for reader, kind, what in find_incompatibilities(config, read_tensors(folder / WEIGHTS_FILE)):
        print(f"{reader:11} {kind} {what}")


def _print_adapters(folder: Path) -> None:
    """A folder of adapters, such as export writes."""
    wrong = {}
    for path in sorted(folder.glob(f"*/{CONFIG_FILE}")):
        if (path.parent / MANIFEST).exists():
            damage = _find_damage(path.parent)
            wrong |= {f"{path.parent.name}/{name}": what for name, what in damage.items()}
    _print_adapter_lines(folder, {name.split("/")[0] for name in wrong})
    _raise_damage(folder, wrong)


def _print_adapter_lines(folder: Path, damaged: set[str]) -> None:
    """A line for each adapter in a folder; `damaged`: names of those that cannot be believed."""
    for adapter in sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}")):
        if adapter.name in damaged:
            print(f"{adapter.name:11} damaged")
            continue
        config = read_json(adapter / CONFIG_FILE)
        alpha = config.get("lora_alpha", config.get("alpha"))
        print(
            f"{adapter.name:11} {config.get('peft_type')}, rank {config.get('r')}, "
            f"alpha {alpha}, {folder_bytes(adapter) / 1e6:.2f} MB, "
            f"base {_base(config)}"
        )


def _print_merged(folder: Path, wrong: Mapping[str, str]) -> None:
    """A model with an expert or a mixture in its weights."""
    if not wrong.keys() & {schema.EXPORT_FILE, MANIFEST}:
        record = read_json(folder / schema.EXPORT_FILE)
        print(f"model       {record.get('base')} with experts in its weights")
        _print_record(record)


def _print_record(record: Mapping[str, Any]) -> None:
    """What dylora_export.json says of a mixture or a merged model."""
    if "checkpoint" in record:
        print(f"made from   {record['checkpoint']}")
    if "expert" in record:
        print(f"expert      {record['expert']}")
    weights = record.get("weights", {})
    rows = {site: " ".join(f"{one:.3f}" for one in row) for site, row in weights.items()}
    if rows and all(row == next(iter(weights.values())) for row in weights.values()):
        print(f"weights     {next(iter(rows.values()))}, at all {len(rows)} sites")
    else:
        for site, row in rows.items():
            print(f"weights     {row} at {site}")
    if text := record.get("text"):
        print(
            f"routed      KL {text['kl']:.5f} nats a token on {text['file']}, loss "
            f"{text['static_loss']:.4f} against {text['routed_loss']:.4f}"
        )


def _base(config: Mapping[str, Any]) -> str:
    name = config.get("base_model_name_or_path") or "not named"
    told = f"{name} ({config.get('revision') or 'any revision'})"
    return told if told.isprintable() else repr(told)  # an untrusted one could steer the terminal


def _find_damage(folder: Path) -> dict[str, str]:
    """File -> what is wrong with it, by the manifest; empty: the folder is whole."""
    try:
        return dict(integrity_errors(folder))
    except ValueError as error:  # no manifest, or none of use
        return {MANIFEST: str(error)}


def _raise_damage(folder: Path, wrong: Mapping[str, str]) -> None:
    if MANIFEST in wrong:
        raise ValueError(wrong[MANIFEST])
    if wrong:
        raise ValueError("; ".join(f"{folder / name} {what}" for name, what in wrong.items()))


def print_foreign(folder: Path, found: Found) -> None:
    """What a folder of others holds, and how it becomes a mixture.

    Raises ValueError or FileNotFoundError for an adapter that an import would refuse.
    """
    print(f"{folder}: {found.what}, {folder_bytes(folder) / 1e6:.1f} MB")
    for path in found.adapters:
        adapter = read_stock_adapter(path)
        ranks = sorted({adapter.rank(path) for path in adapter.weights})
        alphas = sorted({alpha_of(adapter.config, path) for path in adapter.weights})
        kinds = [name for name in ("use_rslora", "use_dora") if adapter.config.get(name)]
        kinds += ["lora_only biases"] if adapter.biases else []
        print(
            f"{path.name:11} rank {', '.join(map(str, ranks))}, "
            f"alpha {', '.join(f'{alpha:g}' for alpha in alphas)}, "
            f"{len(adapter.weights)} projections, for {adapter.base or 'no named base'}"
            + "".join(f", {kind}" for kind in kinds)
        )
    for router in found.routers[:1]:
        print(f"router      {router}")
    for note in found.notes:
        print(f"note        {note}")
    if found.adapters:
        print(f"to a mixture: run.py import --adapters {folder} --base NAME --out DIR")
