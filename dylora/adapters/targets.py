"""Which projections of a base are adapted."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylora.config import MoELoraConfig, ends_with
from dylora.fields import nearest

ATTENTION_PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),  # llama, gemma, qwen, opt, gptj, …
    *("query_key_value", "dense"),  # gpt_neox, bloom, falcon; phi's output
    *("c_attn", "c_proj"),  # gpt2
    *("qkv_proj", "Wqkv"),  # phi3, mpt
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa"),  # deepseek; kv_b_proj cannot be routed
    *("in_proj_qkvz", "in_proj_ba"),  # qwen3_next's linear attention
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # qwen3_5's
}
CROSS_ATTENTION = ("cross_attn", "crossattention", "encoder_attn")


def find_targets(base: PreTrainedModel, config: MoELoraConfig) -> list[str]:
    """Paths of the projections to adapt, in the model's order.

    Without target_modules: projections with a known name inside a module called attention, where a
    pass over text alone runs it: not in a vision tower, not in cross-attention.
    Raises ValueError for a target that matches nothing, naming the nearest candidate, and for one
    whose updates could not be right.
    """
    candidates = [path for path, module in base.named_modules() if is_projection(module)]
    _check_base(base)
    if config.target_modules is None:
        decoder = base.get_decoder()
        within = next(path for path, module in base.named_modules() if module is decoder)
        chosen = [
            path
            for path in candidates
            if _is_attention_projection(path) and path.startswith(within + "." if within else "")
        ]
    else:
        for target in config.target_modules:
            if not any(ends_with(path, target) for path in candidates):
                if any(p.ndim == 3 and ends_with(n, target) for n, p in base.named_parameters()):
                    raise ValueError(
                        f"target_modules: {target!r} holds all experts of the base in one tensor, "
                        "which cannot be adapted: leave it out"
                    )
                names = sorted({path.rpartition(".")[2] for path in candidates})
                hint = nearest(target, names)
                raise ValueError(f"target_modules: {target!r} matches nothing{hint}")
        chosen = [p for p in candidates if any(ends_with(p, t) for t in config.target_modules)]
    excluded = config.exclude_modules or []
    for name in excluded:
        if not any(ends_with(path, name) for path in candidates):
            names = sorted({path.rpartition(".")[2] for path in candidates})
            raise ValueError(f"exclude_modules: {name!r} matches nothing{nearest(name, names)}")
    chosen = [path for path in chosen if not any(ends_with(path, name) for name in excluded)]
    if config.layers_to_transform is not None:
        layers = set(config.layers_to_transform)
        missing = layers - {_layer_of(path) for path in chosen}
        if missing:
            raise ValueError(f"layers_to_transform: layers {sorted(missing)} adapt nothing")
        chosen = [path for path in chosen if _layer_of(path) in layers]
    if not chosen:
        names = sorted({path.rpartition(".")[2] for path in candidates})
        raise ValueError(
            f"found no projection to adapt in {type(base).__name__}; "
            f"set target_modules to some of {', '.join(names)}"
        )
    _check_targets(base, chosen)
    return chosen


def _check_base(base: PreTrainedModel) -> None:
    """Raises ValueError for a base whose loss or layers are not what they seem."""
    if base.config.is_encoder_decoder:
        raise ValueError(f"{type(base).__name__} is an encoder and a decoder: give a causal LM")
    for path, module in base.named_modules():
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"{path or 'the base'} is a layer of PEFT: give the model without its adapters "
                "(unload() or merge_and_unload()), and import those (run.py import)"
            )


def _check_targets(base: PreTrainedModel, chosen: list[str]) -> None:
    """Raises ValueError for projections whose updates could not be right."""
    if any(path.endswith(".kv_b_proj") for path in chosen):
        raise ValueError(
            "kv_b_proj expands the cached latents of all past tokens at every step, and their "
            "gates are gone by then: leave it out of target_modules"
        )
    for path in chosen:
        block = base.get_submodule(path.rpartition(".")[0])
        if path.endswith(".out_proj") and hasattr(block, "conv1d") and _reads_weight(block):
            raise ValueError(
                f"{path} is the output of a Mamba block, whose fused kernels read the weight past "
                "the projection: leave it out of target_modules"
            )
    if getattr(base.config, "slow_but_exact", False) and base.config.pretraining_tp > 1:
        raise ValueError(
            "with slow_but_exact BLOOM reads weights past its projections, so their updates would "
            "be lost: load the base with slow_but_exact=False"
        )


def _reads_weight(block: nn.Module) -> bool:
    """Whether a block's code takes the weight of out_proj, not its output."""
    try:
        return "self.out_proj.weight" in inspect.getsource(type(block))
    except (OSError, TypeError):  # no source to read
        return True


def is_projection(module: nn.Module) -> bool:
    """nn.Linear, its quantised subclasses, and GPT-2's Conv1D."""
    return isinstance(module, (nn.Linear, Conv1D))


def check_plain_weight(path: str, projection: nn.Module) -> None:
    """Raises ValueError where DoRA could not read the lengths of the rows of a weight."""
    weight: Any = projection.weight
    if type(weight.data) is not torch.Tensor or not weight.is_floating_point():
        raise ValueError(
            f"use_dora needs the weight of {path} as numbers, but it is a quantised "
            f"{type(projection).__name__}: use a base that is not quantised, or plain LoRA"
        )


def projection_sizes(module: Any) -> tuple[int, int]:
    """Input and output width; never from weight.shape, which quantised layers pack."""
    return (
        (module.nx, module.nf)
        if isinstance(module, Conv1D)
        else (
            module.in_features,
            module.out_features,
        )
    )


def device_of(base: nn.Module, path: str) -> torch.device:
    """Where a projection is computed.

    Raises ValueError for weights on the meta device that nothing brings to another.
    """
    module: Any = base.get_submodule(path)
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hook: Any = getattr(module, "_hf_hook", None)  # accelerate's, which loads offloaded weights
    if getattr(hook, "execution_device", None) is None:
        raise ValueError(f"{path} has no weights (device meta): load the base before injecting")
    return torch.device(hook.execution_device)


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


def _is_attention_projection(path: str) -> bool:
    parents, _, name = path.rpartition(".")
    crosses = any(word in parents for word in CROSS_ATTENTION)
    attends = "attn" in parents or "attention" in parents
    return name in ATTENTION_PROJECTIONS and attends and not crosses


def _layer_of(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
