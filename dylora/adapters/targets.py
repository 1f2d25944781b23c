"""Which projections of a base are adapted."""

import inspect
import logging
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dylora.adapters.trace import Trace, is_projection
from dylora.config import MoELoraConfig, ends_with
from dylora.fields import nearest

FUSED = re.compile(r"w?[qkvz]+")  # the word in q_proj, Wqkv, kv_a_proj_with_mqa, in_proj_qkvz
# What belongs to attention besides, where its output is changed before the block gives it, and the
# gates of linear attention (Qwen3-Next, Qwen3.5).
OTHERS = ("o_proj", "out_proj", "dense", "c_proj")
OTHERS += ("in_proj_ba", "in_proj_z", "in_proj_b", "in_proj_a")


def find_targets(base: PreTrainedModel, config: MoELoraConfig, trace: Trace) -> list[str]:
    """Paths of the projections to adapt, their blocks in the order in which a pass enters them:
    some bases register an MLP before the mixer that runs first.

    Without target_modules: of every block that a pass over text ran, and that holds queries and
    keys, the projections of queries, keys and values, and that of the output. Others of such a
    block stay as they are, which is said in one line of the log.
    Raises ValueError for a target that matches nothing, naming the nearest candidate.
    """
    candidates = [path for path, module in base.named_modules() if is_projection(module)]
    if config.target_modules is None:
        found = _attention_projections(base, trace)
        chosen = [path for path in candidates if path in found]
    elif config.target_modules == "all-linear":
        chosen = [path for path in candidates if _maps_tokens(base, path, trace)]
    else:
        for target in config.target_modules:
            _check_matches(base, candidates, target)
        chosen = [p for p in candidates if any(ends_with(p, t) for t in config.target_modules)]
    excluded = config.exclude_modules or []
    for name in excluded:
        if not any(ends_with(path, name) for path in candidates):
            names = sorted({path.rpartition(".")[2] for path in candidates})
            raise ValueError(f"exclude_modules: {name!r} matches nothing{nearest(name, names)}")
    kept = {path for path in candidates if not any(ends_with(path, name) for name in excluded)}
    chosen = [path for path in chosen if path in kept]
    if config.layers_to_transform is not None:
        layers = set(config.layers_to_transform)
        missing = layers - {layer_of(path) for path in chosen}
        if missing:
            raise ValueError(f"layers_to_transform: layers {sorted(missing)} adapt nothing")
        chosen = [path for path in chosen if layer_of(path) in layers]
    if not chosen:
        names = sorted({path.rpartition(".")[2] for path in candidates})
        raise ValueError(
            f"found no projection to adapt in {type(base).__name__}; "
            f"set target_modules to some of {', '.join(names)}"
        )
    if config.target_modules is None:
        _say_what_is_left(chosen, [path for path in trace.maps_tokens if path in kept])
    place = {block: index for index, block in enumerate(trace.widths)}
    return sorted(chosen, key=lambda path: place.get(path.rpartition(".")[0], len(place)))


def check_targets(base: PreTrainedModel, chosen: list[str], trace: Trace) -> None:
    """Raises ValueError for projections whose updates could not be right."""
    if not chosen:
        raise ValueError("config.json lists no projections")
    projections = {path for path, module in base.named_modules() if is_projection(module)}
    for path in chosen:
        if path not in projections:
            raise ValueError(
                f"config.json lists {path}, which is no projection of {type(base).__name__}"
            )
        if (reason := _why_not(base, path, trace)) is not None:
            raise ValueError(
                f"{path} {reason}: leave it out of target_modules, or name it in exclude_modules"
            )


def _why_not(base: PreTrainedModel, path: str, trace: Trace) -> str | None:
    """Why the update of a projection could not be right, to stand after its path; None: it can."""
    parent = path.rpartition(".")[0]
    if path.endswith(".kv_b_proj"):
        return (
            "expands the cached latents of all past tokens at every step, and their gates are gone "
            "by then"
        )
    block = base.get_submodule(parent)
    if path.endswith(".out_proj") and hasattr(block, "conv1d") and _reads_weight(block):
        return "is the output of a Mamba block, whose fused kernels read its weight by themselves"
    if path not in trace.maps_tokens:
        return "is not run by a pass over text"
    if not trace.maps_tokens[path] or (parent and parent not in trace.widths):
        return "does not map the tokens of a pass one by one, so no gate would be theirs"
    return None


def _maps_tokens(base: PreTrainedModel, path: str, trace: Trace) -> bool:
    """Whether all-linear adapts a projection."""
    parent, head = path.rpartition(".")[0], base.get_output_embeddings()
    inside = parent in trace.widths and parent not in trace.choosers
    return inside and base.get_submodule(path) is not head and not _why_not(base, path, trace)


def _check_matches(base: PreTrainedModel, candidates: list[str], target: str) -> None:
    """Raises ValueError where one of target_modules names no projection."""
    if any(ends_with(path, target) for path in candidates):
        return
    if any(p.ndim == 3 and ends_with(name, target) for name, p in base.named_parameters()):
        raise ValueError(
            f"target_modules: {target!r} holds all experts of the base in one tensor, "
            "which cannot be adapted: leave it out"
        )
    names = sorted({path.rpartition(".")[2] for path in candidates})
    raise ValueError(f"target_modules: {target!r} matches nothing{nearest(target, names)}")


def _attention_projections(base: PreTrainedModel, trace: Trace) -> set[str]:
    """What is adapted by default."""
    held: dict[str, set[str]] = {}
    for path in trace.maps_tokens:
        held.setdefault(path.rpartition(".")[0], set()).update(_roles(path))
    blocks = {
        path: roles
        for path, roles in held.items()
        if path in trace.widths and path not in trace.choosers
    }
    # Later layers of Gemma 3n and Gemma 4 have no keys of their own, but are of the same class.
    kinds = {type(base.get_submodule(p)) for p, roles in blocks.items() if {"q", "k"} <= roles}
    attends = {
        path
        for path, roles in blocks.items()
        if "q" in roles and type(base.get_submodule(path)) in kinds
    }
    return {
        path
        for path, maps_tokens in trace.maps_tokens.items()
        if maps_tokens
        and path.rpartition(".")[0] in attends
        and (_roles(path) or path in trace.outputs or path.rpartition(".")[2] in OTHERS)
        and not path.endswith(".kv_b_proj")
    }


def _roles(path: str) -> set[str]:
    """Which of q, k and v a projection gives, by its name."""
    name = path.rpartition(".")[2].lower()
    if name == "c_attn":  # GPT-2's
        return {"q", "k", "v"}
    roles = set()
    for word in name.split("_"):
        if word in ("query", "key", "value"):
            roles.add(word[0])
        elif FUSED.fullmatch(word):
            roles |= set(word) & {"q", "k", "v"}
    return roles


def _say_what_is_left(chosen: list[str], candidates: list[str]) -> None:
    blocks = dict.fromkeys(path.rpartition(".")[0] for path in chosen)
    left = [p for p in candidates if p.rpartition(".")[0] in blocks and p not in chosen]
    if left:
        first, names = left[0].rpartition(".")[0], sorted({p.rpartition(".")[2] for p in left})
        logging.getLogger("dylora").warning(
            "%d of %d blocks are adapted in part, %s among them: %s stays as it is",
            *(len({p.rpartition(".")[0] for p in left}), len(blocks), first, ", ".join(names)),
        )


def _reads_weight(block: nn.Module) -> bool:
    """Whether a block's code takes the weight of out_proj, not its output."""
    try:
        return "self.out_proj.weight" in inspect.getsource(type(block))
    except (OSError, TypeError):  # no source to read
        return True


def check_plain_weight(path: str, projection: nn.Module) -> None:
    """Raises ValueError where DoRA could not read the lengths of the rows of a weight."""
    weight: Any = projection.weight
    if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        raise ValueError(
            f"use_dora needs the weight of {path} as numbers, but it is a quantised "
            f"{type(projection).__name__}: use a base that is not quantised, or plain LoRA"
        )


def shortest_targets(base: nn.Module, paths: list[str]) -> list[str]:
    """The shortest PEFT target_modules that name exactly these paths.

    PEFT matches a name against the end of every path, so `c_proj` would catch GPT-2's MLP as well:
    names grow by their parents until they are exact.
    """
    candidates = [path for path, module in base.named_modules() if is_projection(module)]
    wanted = set(paths)
    targets = set()
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[-length:])
            if all(other in wanted for other in candidates if ends_with(other, name)):
                targets.add(name)
                break
    return sorted(targets)


def layer_of(path: str) -> int | None:
    """The number of the layer that a path lies in."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
