"""Finding the sites of a model, giving them routers and adapters, and taking them off again.

Nothing of the base is replaced: adapters and routers are submodules added to its blocks, and
PyTorch's forward hooks call them. Class, parameter names and weights stay as they were, so
`generate`, HF Trainer and lm-evaluation-harness see an ordinary transformers model.
"""

from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dylora.adapters.bias import BiasShift
from dylora.adapters.block import RoutedBlock
from dylora.adapters.projection import StackedLoRA
from dylora.adapters.targets import check_plain_weight, device_of, find_targets, projection_sizes
from dylora.config import MoELoraConfig, ends_with
from dylora.fields import nearest
from dylora.routing.router import Router, router_class
from dylora.routing.state import RoutingState

ROUTER_NAME, ADAPTER_NAME, STATE_NAME = "dylora_router", "dylora_adapter", "dylora_state"
BIAS_NAME = "dylora_bias"


class Injected(NamedTuple):
    """What was added to a base."""

    state: RoutingState
    blocks: list[RoutedBlock]  # in the order the model runs them
    adapters: dict[str, StackedLoRA]  # by the path of their projection
    biases: dict[str, BiasShift]  # by the path of their module; bias all only
    handles: list[RemovableHandle]


def inject(base: PreTrainedModel, config: MoELoraConfig, *, with_experts: bool = True) -> Injected:
    """Freeze the base and add routers and adapters to its sites, in place.

    Without experts the adapters are empty: a loader makes those that its files hold.

    Raises ValueError when the base has been injected before, when no projection matches, when a
    block holds no place for a router, or when DoRA or trained biases find nothing to work on.
    """
    if hasattr(base, STATE_NAME):
        raise ValueError("this base already carries adapters: unload() them first")
    targets = find_targets(base, config)
    by_block: dict[str, list[str]] = {}
    for path in targets:
        by_block.setdefault(path.rpartition(".")[0], []).append(path)
    if "" in by_block:
        raise ValueError(f"{by_block['']} lie at the root of the model, outside any block")

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
        base.register_forward_pre_hook(state.begin, with_kwargs=True),
        base.register_forward_hook(state.end, always_call=True),
    ]
    decoder: Any = base.get_decoder()
    if decoder is not None and decoder is not base:
        handles += [
            decoder.register_forward_pre_hook(state.begin_decoder, with_kwargs=True),
            decoder.register_forward_hook(state.end_decoder, always_call=True),
        ]
    ranks = config.expert_ranks or [config.r] * config.expert_count
    alphas = config.expert_alphas or [config.lora_alpha] * config.expert_count
    sites, adapters, biases = [], {}, {}
    for index, (block_path, paths) in enumerate(by_block.items()):
        block = base.get_submodule(block_path)
        site = RoutedBlock(block_path, index, state)
        site.shares_first = config.router_scope == "shared" and index > 0 and config.is_learned
        if config.is_learned and not site.shares_first:
            attach_router(base, site, new_router(base, config, paths[0]))
        handles.append(block.register_forward_pre_hook(site.route, with_kwargs=True))
        handles.append(block.register_forward_hook(site.leave, always_call=True))
        sites.append(site)
        for path in paths:
            projection = base.get_submodule(path)
            sizes = projection_sizes(projection)
            adapter = StackedLoRA(site, path, *sizes, config, device_of(base, path))
            if with_experts:
                adapter.stacks.append(adapter.create_stack(0, ranks, alphas, projection))
            projection.add_module(ADAPTER_NAME, adapter)
            handles.append(projection.register_forward_pre_hook(adapter.run_outside_autograd))
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
    return Injected(state, sites, adapters, biases, handles)


def remove(
    base: PreTrainedModel,
    blocks: list[RoutedBlock],
    adapters: dict[str, StackedLoRA],
    biases: dict[str, BiasShift],
) -> None:
    """Take off what `inject` added, but for its hooks; all parameters stay frozen."""
    for path in adapters:
        delattr(base.get_submodule(path), ADAPTER_NAME)
    for path in biases:
        delattr(base.get_submodule(path), BIAS_NAME)
    for block in blocks:
        attach_router(base, block, None)
    delattr(base, STATE_NAME)


def attach_router(
    base: PreTrainedModel, block: RoutedBlock, router: Router | None
) -> Router | None:
    """Put a router (or none) at a block; returns the one that was there."""
    module, previous = base.get_submodule(block.name), block.router
    if previous is not None:
        delattr(module, ROUTER_NAME)
    if router is not None:
        module.add_module(ROUTER_NAME, router.train(module.training))
    block.router = router
    return previous


def new_router(base: PreTrainedModel, config: MoELoraConfig, projection_path: str) -> Router:
    """A fresh router as wide as the hidden state that enters the block of this projection."""
    width = base.config.get_text_config().hidden_size
    return router_class(config)(width, config, device_of(base, projection_path))
