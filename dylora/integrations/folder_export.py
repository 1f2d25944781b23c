"""Experts as PEFT adapters: one by one, or a frozen mixture of them as one.

A mixture whose weights do not depend on the token is one LoRA again:

    A = [w_1 s_1 A_1; …; w_E s_E A_E]   [Σr, D],    B = [B_1 … B_E]   [O, Σr],    scale 1

Each projection has an A and a B of its own, so weights may differ from site to site.

Shape letters: D input width, O output width, E experts, N sites, R rank.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dylora.integrations.site_weights import Weights, by_projection, site_weights
from dylora.storage.checkpoint import read_description
from dylora.storage.folders import check_place, write_folder
from dylora.storage.peft_format import (
    PeftAdapter,
    adapter_config,
    portable_form,
    read_adapter,
    scaling_of,
    write_adapter,
)
from dylora.storage.schema import ADAPTERS, SHIFTS_FILE
from dylora.storage.tensors import read_tensors

EXPORT_FILE = "dylora_export.json"  # what a mixture or a merged model was made of; ours alone


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    expert: str | int = "all",
    portable: bool = False,
    base_name: str | None = None,
) -> list[Path]:
    """Write experts as folders that PEFT, vLLM or llama.cpp can load; no base is loaded.

    Args:
        checkpoint: a folder written by `save_pretrained` or by training; verified first.
        out: gets one folder `expert_<i>` each.
        expert: an index, or all.
        portable: fold the scale into B and set lora_alpha = r, one for all that are written, so
            that readers that ignore rslora or patterns agree too; exact up to float32 rounding.
        base_name: what the adapters name as their base; by default what the checkpoint does.

    Returns the folders. Raises ValueError for an expert that is not there, retired, or without a
    portable form, FileExistsError where something else is in the way; nothing is written then.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    live = [e["name"] for e in read_description(checkpoint)["experts"] if e["state"] != "retired"]
    check_outside(checkpoint, out)
    names = chosen_names(live, expert, checkpoint)
    adapters = {name: read_adapter(checkpoint / ADAPTERS / name) for name in names}
    return write_experts(out, adapters, portable, base_name)


def export_checkpoint_mixture(
    checkpoint: str | Path,
    out: str | Path,
    weights: Weights,
    base_name: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write a mixture of constant weights as one adapter; no base is loaded.

    Args:
        checkpoint: a folder written by `save_pretrained` or by training; verified first.
        out: becomes the adapter's folder.
        weights: one an expert, [E], or one a site and expert, [N, E]; used as gates, as they are.
        base_name: what the adapter names as its base; by default what the checkpoint does.
        record: more to keep in dylora_export.json.

    Raises ValueError for weights that do not fit and for DoRA experts, FileExistsError where
    something else is in the way; nothing is written then.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    description = read_description(checkpoint)
    check_outside(checkpoint, out)
    experts = description["experts"]
    live = [entry["state"] != "retired" for entry in experts]
    weights_NE = site_weights(weights, len(description["sites"]), live)
    names = [entry["name"] for entry in experts if entry["state"] != "retired"]
    adapters = {name: read_adapter(checkpoint / ADAPTERS / name) for name in names}
    shifts = checkpoint / SHIFTS_FILE
    adapter = joined_adapter(
        adapters,
        by_projection(weights_NE, live, description["sites"], description["projections"]),
        read_tensors(shifts) if shifts.exists() else {},
    )
    record = {"checkpoint": str(checkpoint), **(record or {})}
    return write_mixture(out, adapter, names, description["sites"], weights_NE, base_name, record)


def chosen_names(live: list[str], expert: str | int, source: object) -> list[str]:
    """The names that `expert` (a number, or all) stands for, of those that are not retired."""
    if expert == "all":
        return live
    name = f"expert_{expert}"
    if name not in live:
        raise ValueError(f"{source} has no {name}, only {', '.join(live)}")
    return [name]


def check_outside(checkpoint: Path, out: Path) -> None:
    """Raises ValueError where an export would come to lie in its checkpoint."""
    if checkpoint.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(
            f"{out} lies in the checkpoint {checkpoint}, which would not verify any more: "
            "name a folder outside"
        )


def write_experts(
    out: Path, adapters: Mapping[str, PeftAdapter], portable: bool, base_name: str | None
) -> list[Path]:
    """One folder an adapter below `out`: all of them, or none where one cannot be written."""
    if portable:
        adapters = {name: _portable(name, adapter) for name, adapter in adapters.items()}
        rank = max(adapter.config["r"] for adapter in adapters.values())  # one, as Arrow wants it
        adapters = {name: _of_rank(adapter, rank) for name, adapter in adapters.items()}
    folders = {out / name: _named(adapter, base_name) for name, adapter in adapters.items()}
    for folder in folders:
        check_place(folder)
    staged = {folder: folder.with_name(f".{folder.name}.staged") for folder in folders}
    try:
        for folder, adapter in folders.items():
            write_folder(
                staged[folder], lambda files, adapter=adapter: write_adapter(files, adapter)
            )
        for folder, stage in staged.items():  # complete and on the disk, all of them
            if folder.exists():
                shutil.rmtree(folder)
            stage.rename(folder)
    finally:
        for stage in staged.values():
            shutil.rmtree(stage, ignore_errors=True)
    return list(folders)


def write_mixture(
    out: Path,
    adapter: PeftAdapter,
    experts: list[str],
    sites: list[str],
    weights_NE: Tensor,
    base_name: str | None,
    record: Mapping[str, Any],
) -> Path:
    """A joined adapter, and beside it the weights it was made with. weights_NE: of all experts."""
    rows = dict(zip(sites, weights_NE.tolist(), strict=True))
    record = {"kind": "mixture", "experts": experts, "weights": rows, **record}

    def write(folder: Path) -> None:
        write_adapter(folder, _named(adapter, base_name))
        (folder / EXPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

    check_no_checkpoint(out)
    write_folder(out, write)
    return out


def check_no_checkpoint(out: Path) -> None:
    """Raises FileExistsError where `out` is a checkpoint, which an export must not replace."""
    if (out / ADAPTERS).exists():
        raise FileExistsError(f"{out} is a checkpoint: name another folder")


def joined_adapter(
    adapters: Mapping[str, PeftAdapter],
    weights: Mapping[str, Sequence[float]],
    shifts: Mapping[str, Tensor],
) -> PeftAdapter:
    """A constant mixture as one adapter of scale 1 and of one rank, which every reader takes.

    Args:
        adapters: by name, of the same projections.
        weights: path of a projection -> one weight an adapter, in the same order.
        shifts: <path>/<name> -> the shift of a bias [O] that `adapters` hold added to the base's.

    Experts with weight 0 everywhere are left out; those that share one A (share_A) keep it, so
    that the rank does not grow. Raises ValueError for DoRA experts: each scales the rows of the
    base's weight by a ratio of its own, which no LoRA can say.
    """
    for name, adapter in adapters.items():
        if adapter.magnitudes:
            raise ValueError(
                f"{name} is a DoRA expert, and a mixture of those is no LoRA: export single "
                "experts, or merge the mixture into the base"
            )
    first = next(iter(adapters.values()))
    used = {
        name: (adapter, {path: weights[path][place] for path in first.weights})
        for place, (name, adapter) in enumerate(adapters.items())
        if any(weights[path][place] for path in first.weights)
    }
    pairs = {}
    for path in first.weights:
        factors = [own[path] * scaling_of(a.config, path) for a, own in used.values()]
        As = [a.weights[path][0] for a, _ in used.values()]
        Bs = [a.weights[path][1] for a, _ in used.values()]
        if all(torch.equal(A, As[0]) for A in As):
            summed = torch.stack([f * B for f, B in zip(factors, Bs, strict=True)]).sum(0)
            pairs[path] = (As[0], summed)
        else:
            scaled = [f * A for f, A in zip(factors, As, strict=True)]
            pairs[path] = (torch.cat(scaled), torch.cat(Bs, dim=1))
    rank = max(len(A) for A, _ in pairs.values())
    biases = {path: bias.clone() for path, bias in first.biases.items()}
    for path in biases.keys() & pairs.keys():  # the others are shifted alike by all experts
        biases[path] -= shifts[f"{path}/{next(iter(adapters))}"]  # the base's own
        for name, (_, own) in used.items():
            biases[path] += own[path] * shifts[f"{path}/{name}"]
    config = adapter_config(
        r=rank,
        lora_alpha=rank,
        target_modules=first.config["target_modules"],
        base_model=first.config.get("base_model_name_or_path"),
        revision=first.config.get("revision"),
        bias=first.config.get("bias", "none"),
        fan_in_fan_out=first.config.get("fan_in_fan_out", False),
    )
    return _of_rank(PeftAdapter(config, pairs, biases=biases), rank)


def _of_rank(adapter: PeftAdapter, rank: int) -> PeftAdapter:
    """An adapter of scale 1 with A and B filled up with zeros to a rank."""
    weights = {
        path: (F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A))))
        for path, (A, B) in adapter.weights.items()
    }
    return adapter._replace(
        config=adapter.config | {"r": rank, "lora_alpha": rank}, weights=weights
    )


def _portable(name: str, adapter: PeftAdapter) -> PeftAdapter:
    try:
        return portable_form(adapter)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _named(adapter: PeftAdapter, base_name: str | None) -> PeftAdapter:
    if base_name is None:
        return adapter
    changes = {"base_model_name_or_path": base_name, "revision": None}
    return adapter._replace(config=adapter.config | changes)
