"""Experts of a live model or of a checkpoint as PEFT adapters: one by one, or a constant mixture.

A mixture whose weights do not depend on the token is one LoRA again:

    A = [w_1 s_1 A_1; …; w_E s_E A_E]   [Σr, D],    B = [B_1 … B_E]   [O, Σr],    scale 1

Each projection has an A and a B of its own, so weights may differ from site to site.

Shape letters: D input width, O output width, E experts, N sites, R rank.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dylora.integrations.static_weights import Weights, by_projection, site_weights, static_weights
from dylora.model import DyLoRA_MoE
from dylora.model_io import bias_shifts, expert_adapter
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import STAGING, check_place, write_folder
from dylora.storage.peft_config import adapter_config, scaling_of
from dylora.storage.peft_format import PeftAdapter, of_rank, portable_form, write_adapter
from dylora.storage.schema import EXPORT_FILE


class _Source(NamedTuple):
    """What an export takes from, be it in memory or on the disk."""

    what: str  # for errors
    live: list[bool]  # an expert each; False: retired
    sites: list[str]
    projections: list[str]
    adapter: Callable[[int], PeftAdapter]
    shifts: Callable[[], Mapping[str, Tensor]]  # see `Checkpoint.bias_shifts`

    def adapters(self, expert: str | int = "all") -> dict[str, PeftAdapter]:
        """By name: all that are not retired, or one. Raises ValueError where it is not there."""
        numbers = {f"expert_{n}": n for n, is_live in enumerate(self.live) if is_live}
        if expert != "all":
            name = f"expert_{expert}"
            if name not in numbers:
                raise ValueError(f"{self.what} has no {name}, only {', '.join(numbers)}")
            numbers = {name: numbers[name]}
        return {name: self.adapter(number) for name, number in numbers.items()}


def _open(model: DyLoRA_MoE | Checkpoint | str | Path) -> _Source:
    if isinstance(model, DyLoRA_MoE):
        mixture = model.mixture
        live = [row.state != "retired" for row in mixture.table]
        readers = (partial(expert_adapter, mixture), partial(bias_shifts, mixture))
        return _Source("the model", live, mixture.site_names, list(mixture.adapters), *readers)
    checkpoint = Checkpoint.open(model)
    sites, projections = (checkpoint.description[key] for key in ("sites", "projections"))
    readers = (checkpoint.adapter, checkpoint.bias_shifts)
    return _Source(str(checkpoint.path), checkpoint.live, sites, projections, *readers)


def export_peft(
    model: DyLoRA_MoE | Checkpoint | str | Path,
    folder: str | Path,
    expert: str | int = "all",
    portable: bool = False,
    base_name: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write experts as folders that PEFT, vLLM or llama.cpp can load.

    Args:
        model: or a folder written by `save_pretrained` or by training, which is verified first and
            whose base is not loaded.
        folder: gets one folder `expert_<i>` each.
        expert: an index, or all.
        portable: fold the scale into B and set lora_alpha = r, one for all that are written, so
            that readers that ignore rslora or patterns agree too; exact up to float32 rounding.
        base_name: what the adapters name as their base; by default what the model does.
        overwrite: replace all of an earlier export.

    Returns the folders. Raises ValueError for an expert that is not there, retired, or without a
    portable form, FileExistsError as `check_place`; nothing is written then.
    """
    source, folder = _open(model), Path(folder)
    adapters = source.adapters(expert)
    check_place(folder, overwrite=overwrite)
    return _write_experts(folder, adapters, portable, base_name)


export_checkpoint = export_peft  # the name under which folders are exported


def export_mixture(
    model: DyLoRA_MoE | Checkpoint | str | Path,
    folder: str | Path,
    weights: Weights | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
    **record: Any,
) -> Path:
    """Write a mixture of constant weights as one PEFT adapter of rank Σ r.

    Args:
        model: or a checkpoint's folder, whose base is not loaded; it needs weights.
        folder: becomes the adapter's.
        weights: one an expert, [E], or one a site and expert, [N, E]; used as gates, as they are.
            None: those of router_type fixed.
        base_name: what the adapter names as its base; by default what the model does.
        overwrite: replace an earlier export.
        record: more to keep in dylora_export.json.

    Raises ValueError for weights that do not fit, for DoRA experts, and where routing depends on
    the token and no weights are given; FileExistsError as `check_place`; nothing is written then.
    """
    source, folder = _open(model), Path(folder)
    check_place(folder, overwrite=overwrite)
    if isinstance(model, DyLoRA_MoE):
        weights_NE = static_weights(model.mixture, weights=weights)
    elif weights is None:
        raise ValueError("a mixture from a checkpoint's folder needs weights")
    else:
        weights_NE = site_weights(weights, len(source.sites), source.live)
        record = {"checkpoint": source.what, **record}
    adapters = source.adapters()
    shares = by_projection(weights_NE, source.live, source.sites, source.projections)
    adapter = joined_adapter(adapters, shares, source.shifts())
    rows = dict(zip(source.sites, weights_NE.tolist(), strict=True))
    record = {"kind": "mixture", "experts": list(adapters), "weights": rows, **record}

    def write(files: Path) -> None:
        write_adapter(files, _named(adapter, base_name))
        (files / EXPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

    write_folder(folder, write)
    return folder


def _write_experts(
    out: Path, adapters: Mapping[str, PeftAdapter], portable: bool, base_name: str | None
) -> list[Path]:
    """One folder an adapter in `out`, and nothing else; or what was there, where one fails."""
    if portable:
        for name, adapter in adapters.items():
            try:
                adapters = {**adapters, name: portable_form(adapter)}
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        rank = max(adapter.config["r"] for adapter in adapters.values())  # one, as Arrow wants it
        adapters = {name: of_rank(adapter, rank) for name, adapter in adapters.items()}
    adapters = {name: _named(adapter, base_name) for name, adapter in adapters.items()}
    staging = out / STAGING
    try:
        for name, adapter in adapters.items():
            write_folder(staging / name, partial(write_adapter, adapter=adapter))
        for path in out.iterdir():  # the new ones are complete and on the disk
            if path != staging:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in adapters:
            (staging / name).rename(out / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [out / name for name in adapters]


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
        if adapter.type != "LORA":
            raise ValueError(
                f"{name} is a {adapter.type}, and only a mixture of LoRAs is one adapter: export "
                "single experts, or merge the mixture into the base"
            )
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
        base_model_name_or_path=first.config.get("base_model_name_or_path"),
        revision=first.config.get("revision"),
        bias=first.config.get("bias", "none"),
        fan_in_fan_out=first.config.get("fan_in_fan_out", False),
    )
    return of_rank(PeftAdapter(config, pairs, biases=biases), rank)


def _named(adapter: PeftAdapter, base_name: str | None) -> PeftAdapter:
    if base_name is None:
        return adapter
    changes = {"base_model_name_or_path": base_name, "revision": None}
    return adapter._replace(config=adapter.config | changes)
