"""Finding the blocks of a model, giving them routers and adapters, and taking them off again.

Nothing of the base is replaced: adapters and routers are submodules added to its blocks, and
PyTorch's forward hooks call them. Class, parameter names and weights stay as they were, so
`generate`, HF Trainer and lm-evaluation-harness see an ordinary transformers model.
"""

from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from dylora.adapters.adapter import Adapter, adapter_class
from dylora.adapters.bias import BiasShift
from dylora.adapters.block import RoutedBlock
from dylora.adapters.stack import equal_runs
from dylora.adapters.targets import check_targets, find_targets, layer_of
from dylora.adapters.trace import decoder_of, device_of, projection_sizes, trace_base
from dylora.config import MoELoraConfig, ends_with
from dylora.fields import nearest
from dylora.routing.prompt import PromptedGenerate
from dylora.routing.prompt_tokens import PromptTokens
from dylora.routing.router import Router, router_class
from dylora.routing.state import RoutingState

ROUTER_NAME, ADAPTER_NAME, STATE_NAME = "dylora_router", "dylora_adapter", "dylora_state"
BIAS_NAME = "dylora_bias"


class Injected(NamedTuple):
    """What was added to a base."""

    state: RoutingState
    blocks: list[RoutedBlock]  # in the order of a pass, or of the file that lists them
    adapters: dict[str, Adapter]  # by the path of their projection
    biases: dict[str, BiasShift]  # by the path of their module; bias all only
    handles: list[RemovableHandle]


def inject(
    base: PreTrainedModel,
    config: MoELoraConfig,
    projections: list[str] | None = None,
    *,
    with_experts: bool = True,
) -> Injected:
    """Freeze the base and add routers and adapters to its blocks, in place.

    projections: paths of those to adapt, from a file, whose first block is the one that others
    follow; by default what the configuration says, in the order of a pass.
    Without experts the adapters are empty: a loader makes those that its files hold.

    Raises ValueError when the base has been injected before, when no projection matches or one
    cannot be adapted, or when trained biases find nothing to work on.
    """
    if hasattr(base, STATE_NAME):
        raise ValueError("this base already carries adapters: unload() them first")
    trace = trace_base(base)
    targets = find_targets(base, config, trace) if projections is None else projections
    paths_by_block = _group_by_block(targets)
    check_targets(base, targets, trace)
    _check_targets(base, targets, config)
    biased = _biased_modules(base, targets, config)
    counts = _counts_by_layer(list(paths_by_block), config)

    base.requires_grad_(False)
    state = _add_state(base, config, targets[0])
    decoder = decoder_of(base, list(paths_by_block))
    handles = state.hook_pass(base, "base")
    handles += state.hook_pass(decoder, "decoder") if decoder is not base else []
    blocks, adapters, biases = [], {}, {}
    for index, (path, paths) in enumerate(paths_by_block.items()):
        block = RoutedBlock(path, index, state, trace.widths[path])
        block.shares_first = config.router_scope != "site" and index > 0 and config.is_learned
        block.count = counts.get(layer_of(path))
        if config.is_learned and not block.shares_first:
            attach_router(base, block, new_router(base, config, block, paths[0]))
        module = base.get_submodule(path)
        handles.append(module.register_forward_pre_hook(block.route, with_kwargs=True))
        handles.append(module.register_forward_hook(block.leave, always_call=True))
        blocks.append(block)
        for path in paths:
            adapter = _new_adapter(base, block, path, config, with_experts)
            handles += adapter.add_hooks(base.get_submodule(path))
            adapters[path] = adapter
    if config.bias == "all":
        for path, module in biased.items():
            if path not in adapters:
                shift = BiasShift(state, module.bias)
                module.add_module(BIAS_NAME, shift)
                handles.append(module.register_forward_hook(shift.add_shift))
                biases[path] = shift
    base.train(base.training)  # what was added takes the base's mode
    return Injected(state, blocks, adapters, biases, handles)


def _add_state(base: PreTrainedModel, config: MoELoraConfig, path: str) -> RoutingState:
    """What the blocks will share, where the projection `path` is computed."""
    weights = config.fixed_routing_weights if config.use_moe_routing else None
    device = device_of(base, path)
    state = RoutingState(config.expert_count, weights, device, config.shared_experts)
    base.add_module(STATE_NAME, state)
    if config.routes_text:
        by_prompt = config.routes_prompts
        state.prompts = PromptTokens.of(base.config) if by_prompt else PromptTokens(whole=True)
        running = config.router_scope != "prompt"
        generate: Any = PromptedGenerate(base, state, running=running)
        base.generate = generate
    return state


def _group_by_block(targets: list[str]) -> dict[str, list[str]]:
    """Path of a block -> those of its projections."""
    found: dict[str, list[str]] = {}
    for path in targets:
        found.setdefault(path.rpartition(".")[0], []).append(path)
    if "" in found:
        raise ValueError(f"{found['']} lie at the root of the model, outside any block")
    return found


def _counts_by_layer(blocks: list[str], config: MoELoraConfig) -> dict[int | None, int]:
    """Number of a layer -> how many experts it has; empty: each has all."""
    if config.experts_per_layer is None or not config.use_moe_routing:
        return {}
    layers = list(dict.fromkeys(layer_of(path) for path in blocks))
    if len(layers) != len(config.experts_per_layer):
        raise ValueError(
            f"experts_per_layer has {len(config.experts_per_layer)} numbers, but {len(layers)} "
            "layers are adapted: give one for each, the lowest layer first"
        )
    return dict(zip(layers, config.experts_per_layer, strict=True))


def _check_targets(base: PreTrainedModel, targets: list[str], config: MoELoraConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config, field):
            if not any(ends_with(path, name) for path in targets):
                names = sorted({path.rpartition(".")[2] for path in targets})
                raise ValueError(f"{field}: {name!r} matches no target{nearest(name, names)}")
    for path in targets:
        adapter_class(config).check_projection(path, base.get_submodule(path), config)


def _biased_modules(
    base: PreTrainedModel, targets: list[str], config: MoELoraConfig
) -> dict[str, Any]:
    """The modules of the base that have a bias, by their paths."""
    biased = {
        path: module
        for path, module in base.named_modules()
        if isinstance(getattr(module, "bias", None), nn.Parameter)
    }
    if config.bias == "lora_only" and not biased.keys() & set(targets):
        raise ValueError("bias is 'lora_only', but none of the projections has a bias")
    if config.bias == "all" and not biased:
        raise ValueError("bias is 'all', but nothing in this model has a bias")
    return biased


def _new_adapter(
    base: PreTrainedModel, block: RoutedBlock, path: str, config: MoELoraConfig, with_experts: bool
) -> Adapter:
    """The adapter of a projection, as a submodule of it."""
    projection = base.get_submodule(path)
    sizes, device = projection_sizes(projection), device_of(base, path)
    adapter = adapter_class(config)(block, path, *sizes, config, device)
    if with_experts:
        ranks = config.expert_ranks or [config.r] * config.expert_count
        alphas = config.expert_alphas or [config.lora_alpha] * config.expert_count
        for run in equal_runs(ranks[: block.count]):
            own = [alphas[expert] for expert in run]
            adapter.stacks.append(adapter.create_stack(run[0], ranks[run[0]], own, projection))
    projection.add_module(ADAPTER_NAME, adapter)
    block.add(adapter)
    return adapter


def remove(
    base: PreTrainedModel,
    blocks: list[RoutedBlock],
    adapters: dict[str, Adapter],
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
    vars(base).pop("generate", None)


def attach_router(
    base: PreTrainedModel, block: RoutedBlock, router: Router | None
) -> Router | None:
    """Put a router (or none) at a block; returns the one that was there."""
    module, previous = base.get_submodule(block.name), block.router
    if previous is not None:
        delattr(module, ROUTER_NAME)
    if router is not None:
        router.count = block.count
        module.add_module(ROUTER_NAME, router.train(module.training))
    block.router = router
    return previous


def new_router(
    base: PreTrainedModel, config: MoELoraConfig, block: RoutedBlock, projection_path: str
) -> Router:
    """A fresh router of a block, where one of its projections is computed."""
    return router_class(config)(block.width, config, device_of(base, projection_path))
