"""README.md of what is written: what it is, what it was made of, and how to load it, for a reader
and for the hub.

It is no part of the manifest: whoever is given a folder may write on its card.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_LICENCE = re.compile(r"^license:\s*([\w.+-]+)\s*$", re.MULTILINE)
MAX_CARD = 1 << 20  # bytes of a base's card that is looked into for its licence


def mixture_card(description: Mapping[str, Any], metrics: Sequence[str] = ()) -> str:
    """The card of a mixture, from its config.json.

    metrics: lines of a table of results, with its head.
    """
    base, moe = description["base_model_name_or_path"], description["moe"]
    experts, training = description["experts"], description["training"]
    live = [row for row in experts if row["state"] != "retired"]
    sources = [one for run in _runs(training) for one in run.get("data", {}).get("sources", [])]
    hub_sets = [one["path"] for one in sources if is_hub_name(one.get("path"))]
    routing = ["a plain LoRA, nothing is routed"]
    if moe.get("use_moe_routing", True):
        routing = [f"{key} {moe[key]}" for key in ("router_type", "router_scope", "top_k_experts")
                   if key in moe]  # fmt: skip
    lines = [
        *_front("dylora", base, "adapter", ("mixture-of-experts",), hub_sets),
        f"# {len(live)} LoRA experts on {_plain(base or 'a base that is not named')}",
        "",
        "Experts and routers of a mixture on a frozen base, made with dylora; no weight of the "
        "base is among the files.",
        "",
        "## Base",
        "",
        *_base_lines(description),
        "",
        "## Experts",
        "",
        f"Routing: {_plain(', '.join(map(str, routing)))}.",
        "",
        "| expert | state | rank | alpha | maturity | steps | skill |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {_plain(row['name'])} | {row['state']} | {row['rank']} | {row['alpha']:g} | "
            f"{row['maturity']:.3f} | {row['steps']} | {_plain(row['skill'] or '')} |"
            for row in experts
        ),
        "",
        "## Data",
        "",
        *(_data_lines(training, sources) or ["Not recorded."]),
        "",
        *(["## Results", "", *metrics, ""] if metrics else []),
        "## Use",
        "",
        *_code(
            "from dylora import DyLoRA_MoE",
            "",
            'model = DyLoRA_MoE.from_pretrained("THIS FOLDER OR REPOSITORY")',
        ),
        "",
        "Each expert is an ordinary adapter of peft as well, without the routing:",
        "",
        *_code(
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base, "THIS FOLDER OR REPOSITORY", '
            'subfolder="peft_adapters/expert_0")',
        ),
    ]
    return "\n".join(lines) + "\n"


def adapter_card(config: Mapping[str, Any]) -> str:
    """The card of one PEFT adapter, from its adapter_config.json."""
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    alpha = config.get("lora_alpha", config.get("alpha"))
    lines = [
        *_front("peft", base, "adapter", ("lora",)),
        f"# {_plain(str(config.get('peft_type')))} of rank {rank} on {_plain(base or 'a base')}",
        "",
        f"Rank {rank}, alpha {alpha}. Written by dylora.",
        *_licence_line(base, config.get("revision")),
        "",
        *_code(
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(base, "THIS FOLDER OR REPOSITORY")',
        ),
    ]
    return "\n".join(lines) + "\n"


def merged_card(record: Mapping[str, Any]) -> str:
    """The card of a whole model with experts in its weights, from its dylora_export.json."""
    base = record.get("base")
    what = f"expert {record['expert']}" if "expert" in record else "a constant mixture of experts"
    lines = [
        *_front("transformers", base, "finetune"),
        f"# {_plain(base or 'A base')} with {what} in its weights",
        "",
        f"Merged by dylora from {_plain(Path(str(record.get('checkpoint'))).name)}.",
        *_licence_line(base, None),
        "",
        *_code(
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER OR REPOSITORY")',
        ),
    ]
    return "\n".join(lines) + "\n"


def licence_of(base: str | None, revision: str | None = None) -> str | None:
    """What the card of a base says, be it embedded, a folder, or in the hub's cache; nothing is
    fetched."""
    from dylora.base_models import EMBEDDED_BASES  # it imports transformers, which takes seconds

    if base is None:
        return None
    file = Path(EMBEDDED_BASES.get(base, base)) / CARD
    if not file.is_file() and is_hub_name(base):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(base, CARD, revision=revision)
        file = Path(cached) if isinstance(cached, str) else file
    if not file.is_file() or file.stat().st_size > MAX_CARD:
        return None
    front = _FRONT.match(file.read_text(encoding="utf-8", errors="replace"))
    found = _LICENCE.search(front[1]) if front else None
    return found[1] if found else None


def is_hub_name(name: Any) -> bool:
    """Whether it can be a repository: user/name, and no folder here."""
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _front(
    library: str,
    base: str | None,
    relation: str,
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
) -> Iterator[str]:
    """The metadata that the hub reads, in YAML; every value as JSON, which is YAML too."""
    yield from ("---", f"library_name: {library}", "pipeline_tag: text-generation")
    if is_hub_name(base):
        yield f"base_model: {json.dumps(base)}"
        yield f"base_model_relation: {relation}"
    if datasets:
        yield f"datasets: {json.dumps(sorted(set(datasets)))}"
    yield f"tags: {json.dumps(['dylora', *tags])}"
    yield from ("---", "")


def _base_lines(description: Mapping[str, Any]) -> list[str]:
    name, revision = description["base_model_name_or_path"], description["base_revision"]
    mark = description.get("base_fingerprint") or {}
    rows = {
        "name": name,
        "revision": revision or "not recorded",
        "stored as": description["quantization"] if description["quantization"] != "none" else None,
        "licence": licence_of(name, revision) or "not known here: see the base",
        **{key: mark.get(key) for key in ("layers", "width", "vocabulary", "dtype")},
        **{f"SHA-256 of {key}": mark.get(key) for key in ("embedding", "projections", "tokenizer")},
    }
    told = (f"| {key} | {_plain(value)} |" for key, value in rows.items() if value is not None)
    return ["| | |", "|---|---|", *told]


def _licence_line(base: str | None, revision: str | None) -> list[str]:
    found = licence_of(base, revision)
    return [f"Licence of the base: {found}."] if found else []


def _data_lines(training: Mapping[str, Any], sources: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    if sources:
        lines += ["| set | from | rows | split | SHA-256 of the rows |", "|---|---|---|---|---|"]
        for one in sources:
            cells = (one["name"], one.get("path") or "generated", one.get("training_rows", "?"),
                     one.get("split_scheme") or "", one.get("training_sha256", ""))  # fmt: skip
            lines.append(f"| {' | '.join(map(_plain, cells))} |")
    if {"step", "targets", "seed"} <= training.keys():
        told = f"{training['step']} steps, {training['targets']:,} target tokens"
        lines += ["", f"Trained for {told}, seed {training['seed']}."]
    return lines


def _runs(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of all runs that led here, the first one first."""
    earlier = training.get("earlier", [])
    return [*(run for run in earlier if isinstance(run, dict)), training]


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _plain(value: Any) -> str:
    """Text that cannot end a cell of a table, or be markup of its own."""
    text = " ".join(str(value).split())
    return re.sub(r"([|<>\[\]`*])", r"\\\1", text)
