"""`run.py info`: what a checkpoint is."""

from pathlib import Path

from dylora.storage.checkpoint import folder_bytes, read_description
from dylora.storage.foreign import Found, read_foreign_adapter, recognise


def print_info(checkpoint: str) -> None:
    """Verify a checkpoint and print base, experts, sizes and what it was trained on.

    Raises ValueError naming the file when it is not whole.
    """
    folder = Path(checkpoint)
    found = recognise(folder) if folder.is_dir() else None
    if found is not None and found.kind != "mixture":
        print_foreign(folder, found)
        return
    description = read_description(folder)
    moe, training = description["moe"], description["training"]
    print(f"{folder}: whole, {folder_bytes(folder) / 1e6:.1f} MB, every file as written")
    revision = description["base_revision"] or "any revision"
    print(f"base        {description['base_model_name_or_path']} ({revision})")
    print(
        f"routing     {moe['router_type']}, top {moe['top_k_experts']} of "
        f"{len(description['experts'])}, "
        f"{len(description['sites'])} sites, {len(description['projections'])} projections"
    )
    for expert in description["experts"]:
        size = folder_bytes(folder / "peft_adapters" / expert["name"])
        print(
            f"{expert['name']:11} {expert['state']}, rank {expert['rank']}, "
            f"alpha {expert['alpha']:g}, maturity {expert['maturity']:.3f}, "
            f"trained {expert['steps']} steps, {size / 1e6:.2f} MB"
            + (f", skill {expert['skill']}" if expert["skill"] else "")
        )
    if "step" in training:
        print(
            f"trained     {training['step']} steps, {training['targets']:,} target tokens, "
            f"seed {training['seed']}"
        )
    for source in training.get("data", {}).get("sources", []):
        scheme = source["split_scheme"] or "generated"
        print(f"data        {source['name']}: {source['training_rows']} rows, split {scheme}")


def print_foreign(folder: Path, found: Found) -> None:
    """What a folder of others holds, and how it becomes a mixture.

    Raises ValueError or FileNotFoundError for an adapter that an import would refuse.
    """
    print(f"{folder}: {found.what}, {folder_bytes(folder) / 1e6:.1f} MB")
    for path in found.adapters:
        adapter = read_foreign_adapter(path)
        ranks, alphas = sorted(set(adapter.ranks.values())), sorted(set(adapter.alphas.values()))
        kinds = [name for name in ("use_rslora", "use_dora") if adapter.config.get(name)]
        kinds += ["lora_only biases"] if adapter.biases else []
        print(
            f"{adapter.name:11} rank {', '.join(map(str, ranks))}, "
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
