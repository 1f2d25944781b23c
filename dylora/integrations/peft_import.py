"""Experts made elsewhere: stock PEFT LoRA adapters as the experts of one mixture.

Adapters may differ in rank, alpha, rslora and in what they adapt. All projections that any of them
adapts are injected. An expert has one rank and one scale: the largest rank, and the scale of most
of its projections. Where an adapter's rank is smaller, or it lacks the projection, rows of A and B
are exactly 0, and stay so in training; where its scale is another, B takes up the ratio.
"""

import dataclasses
import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack, get_args

import torch
from transformers import PreTrainedModel

from dylora.adapters.targets import shortest_targets
from dylora.adapters.trace import is_projection, projection_sizes
from dylora.base_models import BaseSpec, LoadOptions
from dylora.config import MoELoraConfig, ends_with
from dylora.fields import is_name, nearest
from dylora.integrations.arrow import set_prototypes
from dylora.model import DyLoRA_MoE
from dylora.routing.router import DynamicHybridRouter
from dylora.storage.checkpoint import AdapterFolder
from dylora.storage.peft_config import alpha_of
from dylora.storage.peft_format import PeftAdapter

RouterInit = Literal["learned", "arrow"]
DEFAULTS = MoELoraConfig()
# Settings that the adapters decide: they may be given only as they turn out.
DECIDED = ("num_experts", "r", "lora_alpha", "expert_ranks", "expert_alphas", "target_modules")
DECIDED += ("bias", "use_rslora", "use_dora")
# Settings for which adapters made elsewhere leave no room.
UNSET = (
    *("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "share_A"),
    "experts_per_layer",
)
UNSET += ("adapter_type",)
NEEDED_BY_ARROW = {"router_hidden_size": None, "router_scope": "site", "use_moe_routing": True}


class Shape(NamedTuple):
    """What an expert is, once all its projections have one rank and one scale."""

    rank: int
    alpha: float
    scale: float  # alpha / rank, or alpha / sqrt(rank) with rslora


def load_peft_experts(
    base: str | PreTrainedModel | None,
    adapters: Sequence[str | Path],
    config: MoELoraConfig | None = None,
    *,
    router_init: RouterInit = "learned",
    freeze: bool = True,
    revision: str | None = None,
    report: Callable[[str], Any] = warnings.warn,
    **options: Unpack[LoadOptions],
) -> DyLoRA_MoE:
    """A mixture whose experts are PEFT LoRA adapters: one-hot routing computes what peft does.

    Args:
        base: by name or as a model (which is changed in place); never taken from the adapters.
        adapters: folders, each with an adapter, or with several: a folder of adapters, a mixture
            of ours, or the layout of an older one (peft_adapters/ beside dylo_moe_state/).
        config: routing, losses and maturity; what the adapters decide is left at its default. One
            adapter needs use_moe_routing=False.
        router_init: learned: fresh routers, near uniform. arrow: see `set_prototypes`; it brings
            router_logits 'absolute' and gate_scale 'sum_to_one' along.
        freeze: the experts never change until `experts.unfreeze`; training then trains the routers.
        report: gets a line for everything that is left out or differs from what a file names.
        options: how a base given by name is loaded, as in `DyLoRA_MoE.from_base`.

    The experts begin immature, so that routing is dense until training or routing_mode says
    otherwise. Raises ValueError or FileNotFoundError, naming file and key, for adapters that are no
    plain LoRA, differ in use_dora, do not fit the base, or name a base when none is given; a base
    that was given as a model is then as it was.
    """
    found = [AdapterFolder.open(folder) for folder in adapters]
    read = [adapter for one in found for adapter in one.adapters()]
    _check_adapters(base, read, report)
    shapes, rslora = _shapes(read)
    config = config or MoELoraConfig(num_experts=max(2, len(read)))
    settings = _settings(read, shapes, rslora, config, router_init)
    model, name = base, None
    if isinstance(base, str):
        spec = BaseSpec.resolve(base, revision, **options)
        model, name = spec.load(), spec.name
    assert isinstance(model, PreTrainedModel)
    paths = _fitting_paths(model, read, report)
    settings = dataclasses.replace(settings, target_modules=shortest_targets(model, paths))
    mixture = DyLoRA_MoE(model, settings, base_name=name, base_revision=revision)
    try:
        _fill(mixture, read, shapes)
        if router_init == "arrow":
            for site in set_prototypes(mixture):
                report(f"no adapted projection of {site} reads its router's input: it mixes evenly")
        _take_routers(mixture, found, router_init, report)
    except Exception:
        mixture.unload()
        raise
    if freeze:
        mixture.experts.freeze(*range(len(read)))
    earlier = [record for one in found if (record := one.training_record()) is not None]
    mixture.training_record = {"earlier": earlier} if earlier else {}
    return mixture


# What the files say


def _check_adapters(
    base: str | PreTrainedModel | None, read: list[PeftAdapter], report: Callable[[str], Any]
) -> None:
    """Only LoRAs, none twice; and nobody is sent to a base that only a file names."""
    folders = [adapter.folder for adapter in read]
    for folder in folders:
        if not is_name(folder.name):  # it becomes the expert's skill
            raise ValueError(f"{folder.name!r} in {folder.parent} is no printable name: rename it")
    named: dict[str, str] = {}
    for adapter in read:
        if folders.count(adapter.folder) > 1:
            raise ValueError(f"{adapter.folder} is given twice: two equal experts stay equal")
        if adapter.type != "LORA":
            raise ValueError(f"{adapter.folder} is a {adapter.type}, and only LoRAs are imported")
        if adapter.base:
            named.setdefault(adapter.base, adapter.folder.name)
    shown = ", ".join(f"{other} ({name})" for other, name in named.items())
    if base is None and len(named) > 1:
        raise ValueError(f"the adapters name different bases: {shown}. Give one as the base")
    if base is None:
        made_for = f"give a base; the adapters were made for {next(iter(named), '')}, as they say"
        raise ValueError(made_for if named else "the adapters name no base: give one")
    given = base if isinstance(base, str) else base.config.name_or_path
    if set(named) - {given}:
        report(f"the base is {given or 'a model without a name'}; the adapters name {shown}")


def _shapes(read: list[PeftAdapter]) -> tuple[list[Shape], bool]:
    """Rank and alpha of each expert, and whether they are those of rslora.

    rslora stays where all adapters have it; where some do, all scales are written as alpha / r.
    """
    rslora = all(bool(adapter.config.get("use_rslora")) for adapter in read)
    shapes = []
    for adapter in read:
        rank = max(map(adapter.rank, adapter.weights))
        scales = Counter(adapter.scale(path) for path in adapter.weights)
        scale = scales.most_common(1)[0][0]
        pairs = {(adapter.rank(p), alpha_of(adapter.config, p)) for p in adapter.weights}
        if len(pairs) == 1 and rslora == bool(adapter.config.get("use_rslora")):
            alpha = next(iter(pairs))[1]  # as it is written
        else:
            alpha = scale * (rank**0.5 if rslora else rank)
        shapes.append(Shape(rank, alpha, scale))
    return shapes, rslora


def _settings(
    read: list[PeftAdapter],
    shapes: list[Shape],
    rslora: bool,
    config: MoELoraConfig,
    router_init: RouterInit,
) -> MoELoraConfig:
    """The mixture's configuration but for its targets.

    Raises ValueError for a setting that the adapters decide otherwise, or cannot have.
    """
    if router_init not in get_args(RouterInit):
        raise ValueError(
            f"router_init is {router_init!r}{nearest(router_init, [*get_args(RouterInit)])}"
        )
    dora = [bool(adapter.config.get("use_dora")) for adapter in read]
    if len(set(dora)) > 1:
        with_it, without = read[dora.index(True)], read[dora.index(False)]
        raise ValueError(
            f"{with_it.folder} is a DoRA and {without.folder} is none: experts are all DoRA or none"
        )
    if config.use_moe_routing and len(read) < 2:
        raise ValueError(
            f"{read[0].folder} alone makes no mixture: give another adapter, or "
            "use_moe_routing=False for a plain LoRA"
        )
    if not config.use_moe_routing and len(read) > 1:
        raise ValueError(f"use_moe_routing is false, but there are {len(read)} adapters")
    ranks, alphas = [shape.rank for shape in shapes], [shape.alpha for shape in shapes]
    decided = {
        "num_experts": len(read),
        "r": max(ranks),
        "lora_alpha": alphas[ranks.index(max(ranks))],
        "expert_ranks": ranks if len(set(ranks)) > 1 else None,
        "expert_alphas": alphas if len(set(alphas)) > 1 else None,
        "bias": "lora_only" if any(adapter.biases for adapter in read) else "none",
        "use_rslora": rslora,
        "use_dora": dora[0],
    }
    _check_given(config, decided)
    if router_init == "arrow":
        for name, value in NEEDED_BY_ARROW.items():
            if getattr(config, name) != value:
                raise ValueError(f"router_init arrow needs {name} to be {value!r}")
        if config.router_type == "fixed":
            raise ValueError("router_init arrow needs a router_type other than 'fixed'")
        decided |= {"router_logits": "absolute", "gate_scale": "sum_to_one"}
    return dataclasses.replace(config, **decided)


def _check_given(config: MoELoraConfig, decided: dict[str, Any]) -> None:
    """Raises ValueError for a setting of `config` that adapters made elsewhere do not have."""
    for name in (*UNSET, *DECIDED):
        value, default = getattr(config, name), getattr(DEFAULTS, name)
        if value == default or (name in decided and value == decided[name]):
            continue
        why = (
            "adapters made elsewhere leave no room for it"
            if name in UNSET
            else ("the adapters decide it" + (f": {decided[name]!r}" if name in decided else ""))
        )
        raise ValueError(f"{name} is {value!r}, but {why}")


def _fitting_paths(
    base: PreTrainedModel, read: list[PeftAdapter], report: Callable[[str], Any]
) -> list[str]:
    """The projections that any adapter adapts, in the base's order.

    Raises ValueError for a path that is no projection of the base, for other widths, and for a
    target whose tensors do not cover every projection of that name.
    """
    projections = {p: module for p, module in base.named_modules() if is_projection(module)}
    for adapter in read:
        for path, (A, B) in adapter.weights.items():
            if path not in projections:
                close = difflib.get_close_matches(path, projections, n=1)
                hint = f"; the nearest is {close[0]}" if close else ""
                raise ValueError(
                    f"{adapter.folder} adapts {path}, which is no projection of the base{hint}"
                )
            inputs, outputs = projection_sizes(projections[path])
            if (A.shape[1], B.shape[0]) != (inputs, outputs):
                raise ValueError(
                    f"{adapter.folder}: {path} is from {A.shape[1]} to {B.shape[0]}, but the "
                    f"base's is from {inputs} to {outputs}: it was made for another base"
                )
        config, folder = adapter.config, adapter.folder
        if config.get("layers_to_transform") is not None:
            continue
        if isinstance(config.get("exclude_modules"), str):
            report(f"{folder}: exclude_modules is a pattern, which is not run")
        elif adapter.targets is None:
            report(
                f"{folder}: target_modules is {config.get('target_modules')!r}, which is not run; "
                f"its {len(adapter.weights)} projections are those of its tensors"
            )
        else:
            for path in projections:
                wanted = any(ends_with(path, name) for name in adapter.targets)
                if wanted and not adapter.excludes(path) and path not in adapter.weights:
                    raise ValueError(
                        f"{folder}: its target_modules name {path}, but it has no tensors for it"
                    )
    adapted = {path for adapter in read for path in adapter.weights}
    return [path for path in projections if path in adapted]


# Into the model


@torch.no_grad()
def _fill(model: DyLoRA_MoE, read: list[PeftAdapter], shapes: list[Shape]) -> None:
    """Give the experts the values of the adapters; what an adapter lacks is 0."""
    for expert, (row, adapter) in enumerate(zip(model.experts.table, read, strict=True)):
        row.skill = adapter.folder.name
        row.history.append({"event": f"imported from {adapter.folder.name}", "step": 0})
        for path, stacked in model.mixture.adapters.items():
            stack, place = stacked.stack_of(expert)
            assert stack.lora_A is not None
            stack.lora_A[place] = stack.lora_B[place] = 0
            if path not in adapter.weights:
                continue  # with DoRA its magnitude is the base's own
            A, B = adapter.weights[path]
            ratio = adapter.scale(path) / shapes[expert].scale
            stack.lora_A[place, : len(A)] = A
            stack.lora_B[place, : len(A)] = B.T if ratio == 1 else B.T.double() * ratio
            if stack.lora_magnitude is not None:
                stack.lora_magnitude[place] = adapter.magnitudes[path]
            if path in adapter.biases:
                own: Any = model.base.get_submodule(path).bias
                if stack.lora_bias is None or own is None:
                    raise ValueError(
                        f"{adapter.folder}: {path} has a bias, but the base's has none"
                    )
                bias = adapter.biases[path].to(stack.lora_bias)
                stack.lora_bias[place] = bias - own.to(stack.lora_bias)


@torch.no_grad()
def _take_routers(
    model: DyLoRA_MoE,
    sources: list[AdapterFolder],
    router_init: RouterInit,
    report: Callable[[str], Any],
) -> None:
    """Say what becomes of all that lies beside the adapters, and take a router where it fits."""
    routers = list(model.routers())
    for source in sources:
        found = source.found
        for note in found.notes:
            report(note)
        if found.kind == "mixture":
            report(
                f"{found.adapters[0].parents[1]}: its experts are taken, its router is not; "
                "from_pretrained reads it whole"
            )
        if not found.routers:
            continue
        file, gate = found.routers[0], source.gate()
        router = routers[0][1] if len(routers) == 1 else None
        if gate is None:
            why = "it is no linear gate"
        elif len(sources) > 1 or router_init == "arrow":
            why = "other adapters were given beside its own, or router_init is arrow"
        elif router is None:
            why = "every block has a router of its own here (router_scope: shared has one)"
        elif not isinstance(router, DynamicHybridRouter) or router.inner is not None:
            why = "the router here is not linear"
        elif gate[0].shape != router.outer.weight.shape:
            here = list(router.outer.weight.shape)
            why = f"it is {list(gate[0].shape)}, and here it would be {here}"
        else:
            router.outer.weight.copy_(gate[0])
            router.outer.bias.copy_(gate[1])
            report(
                f"the router {file} is taken, but it was trained on the base's last hidden states "
                "and now reads those that enter the first block: train it before you trust it"
            )
            continue
        report(f"the router {file} is dropped and the experts are kept: {why}")
