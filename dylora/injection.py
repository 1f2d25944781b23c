"""Finding the sites of a model, giving them routers and adapters, and taking them off again.

Nothing of the base is replaced: adapters and routers are submodules added to its blocks, and
PyTorch's forward hooks call them. Class, parameter names and weights stay as they were, so
`generate`, HF Trainer and lm-evaluation-harness see an ordinary transformers model.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dylora.adapter import BiasShift, StackedLoRA
from dylora.config import MoELoraConfig, ends_with, nearest
from dylora.router import DynamicHybridRouter, RoutingState
from dylora.site import Site

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
ROUTER_NAME, ADAPTER_NAME, STATE_NAME = "dylora_router", "dylora_adapter", "dylora_state"
BIAS_NAME = "dylora_bias"


class Injection(NamedTuple):
    """What was added to a base."""

    state: RoutingState
    sites: list[Site]  # in the order the model runs them
    adapters: dict[str, StackedLoRA]  # by the path of their projection
    biases: dict[str, BiasShift]  # by the path of their module; bias all only
    handles: list[RemovableHandle]


def inject(base: PreTrainedModel, config: MoELoraConfig, *, with_experts: bool = True) -> Injection:
    """Freeze the base and add routers and adapters to its sites, in place.

    Without experts the adapters are empty: a loader makes those that its files hold.

    Raises ValueError when the base has been injected before, when no projection matches, when a
    block holds no place for a router, or when DoRA or trained biases find nothing to work on.
    """
    if hasattr(base, STATE_NAME):
        raise ValueError("this base already carries adapters: unload() them first")
    targets = find_targets(base, config)
    by_site: dict[str, list[str]] = {}
    for path in targets:
        by_site.setdefault(path.rpartition(".")[0], []).append(path)
    if "" in by_site:
        raise ValueError(f"{by_site['']} lie at the root of the model, outside any block")

    for field in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config, field):
            if not any(ends_with(path, name) for path in targets):
                names = sorted({path.rpartition(".")[2] for path in targets})
                raise ValueError(f"{field}: {name!r} matches no target{nearest(name, names)}")
    if config.use_dora:
        for path in targets:
            check_plain_weight(path, base.get_submodule(path))
    biased: dict[str, Any] = {
        path: module
        for path, module in base.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
    }
    if config.bias == "lora_only" and not biased.keys() & set(targets):
        raise ValueError("bias is 'lora_only', but none of the projections has a bias")
    if config.bias == "all" and not biased:
        raise ValueError("bias is 'all', but nothing in this model has a bias")

    base.requires_grad_(False)
    weights = config.fixed_routing_weights if config.use_moe_routing else None
    state = RoutingState(config.expert_count, weights, device_of(base, targets[0]))
    base.add_module(STATE_NAME, state)
    handles = [
        base.register_forward_pre_hook(state.begin_pass, with_kwargs=True),
        base.register_forward_hook(state.end_pass),
    ]
    ranks = config.expert_ranks or [config.r] * config.expert_count
    alphas = config.expert_alphas or [config.lora_alpha] * config.expert_count
    sites, adapters, biases = [], {}, {}
    for index, (site_path, paths) in enumerate(by_site.items()):
        block = base.get_submodule(site_path)
        site = Site(site_path, index, state)
        site.shares_first = config.router_scope == "shared" and index > 0 and is_learned(config)
        if is_learned(config) and not site.shares_first:
            attach_router(base, site, new_router(base, site_path, config, paths[0]))
        handles.append(block.register_forward_pre_hook(site.route, with_kwargs=True))
        sites.append(site)
        state.sites.append(site)
        for path in paths:
            projection = base.get_submodule(path)
            sizes = projection_sizes(projection)
            adapter = StackedLoRA(site, path, *sizes, config, device_of(base, path))
            if with_experts:
                adapter.stacks.append(adapter.create_stack(0, ranks, alphas, projection))
            projection.add_module(ADAPTER_NAME, adapter)
            handles.append(projection.register_forward_pre_hook(adapter.take_over))
            handles.append(projection.register_forward_hook(adapter.add_update))
            adapters[path] = adapter
            site.adapters[adapter.name] = adapter
    if config.bias == "all":
        for path, module in biased.items():
            if path not in adapters:
                shift = BiasShift(state, module.bias)
                module.add_module(BIAS_NAME, shift)
                handles.append(module.register_forward_hook(shift.add_shift))
                biases[path] = shift
    base.train(base.training)  # what was added takes the base's mode
    return Injection(state, sites, adapters, biases, handles)


def remove(base: PreTrainedModel, injection: Injection) -> None:
    """Undo `inject`: the base has its own modules, hooks and parameters again, all still frozen."""
    for handle in injection.handles:
        handle.remove()
    for path in injection.adapters:
        delattr(base.get_submodule(path), ADAPTER_NAME)
    for path in injection.biases:
        delattr(base.get_submodule(path), BIAS_NAME)
    for site in injection.sites:
        attach_router(base, site, None)
    delattr(base, STATE_NAME)


def attach_router(
    base: PreTrainedModel, site: Site, router: DynamicHybridRouter | None
) -> DynamicHybridRouter | None:
    """Put a router (or none) at a site; returns the one that was there."""
    block, previous = base.get_submodule(site.name), site.router
    if previous is not None:
        delattr(block, ROUTER_NAME)
    if router is not None:
        block.add_module(ROUTER_NAME, router.train(block.training))
    site.router = router
    return previous


def new_router(
    base: PreTrainedModel, site_path: str, config: MoELoraConfig, projection_path: str
) -> DynamicHybridRouter:
    """A fresh router as wide as the hidden state that enters the site."""
    width = base.config.get_text_config().hidden_size
    return DynamicHybridRouter(width, config, device_of(base, projection_path))


def find_targets(base: PreTrainedModel, config: MoELoraConfig) -> list[str]:
    """Paths of the projections to adapt, in the model's order.

    Without target_modules: projections with a known name inside a module called attention, where a
    pass over text alone runs it: not in a vision tower, not in cross-attention.
    Raises ValueError for a target that matches nothing, naming the nearest candidate, and for one
    whose updates could not be right.
    """
    candidates = [path for path, module in base.named_modules() if is_projection(module)]
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
    if any(path.endswith(".kv_b_proj") for path in chosen):
        raise ValueError(
            "kv_b_proj expands the cached latents of all past tokens at every step, and their "
            "gates are gone by then: leave it out of target_modules"
        )
    if getattr(base.config, "slow_but_exact", False) and base.config.pretraining_tp > 1:
        raise ValueError(
            "with slow_but_exact BLOOM reads weights past its projections, so their updates would "
            "be lost: load the base with slow_but_exact=False"
        )
    return chosen


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
    """Where a projection's weight lies."""
    return next(base.get_submodule(path).parameters()).device


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


def is_learned(config: MoELoraConfig) -> bool:
    return config.use_moe_routing and config.router_type != "fixed"


def _is_attention_projection(path: str) -> bool:
    parents, _, name = path.rpartition(".")
    crosses = any(word in parents for word in CROSS_ATTENTION)
    attends = "attn" in parents or "attention" in parents
    return name in ATTENTION_PROJECTIONS and attends and not crosses


def _layer_of(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
