"""Two ways to compute a mixture, which the checks compare: its own pass, and the formula.

Shape letters: B batch, S sequence, T real tokens of a batch in row order, N sites, E experts,
D input width, O output width, r rank, V vocabulary.
"""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.adapters.dora import weight_OD
from dylora.model import DyLoRA_MoE
from dylora.model_io import expert_adapter
from dylora.storage.peft_format import PeftAdapter

SEED = 0


class TokenOutputs(NamedTuple):
    """The outputs of one way for every token that is not padding."""

    logits: Tensor  # [T, V] float32
    gates: Tensor  # [T, N, E]
    probabilities: Tensor  # [T, N, E]


@torch.no_grad()
def base_logits(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of a base called as the mixture calls it."""
    return base(input_ids=ids, attention_mask=None, use_cache=False).logits


def full_pass(model: DyLoRA_MoE, ids: Tensor, gates: Tensor | None = None) -> TokenOutputs:
    """One pass over ids [B, S]; with gates [B, S, N, E] instead of the routers' own."""
    return masked_pass(model, ids, None, gates)


def masked_pass(
    model: DyLoRA_MoE, ids: Tensor, mask: Tensor | None, gates: Tensor | None = None
) -> TokenOutputs:
    """One pass over ids [B, S]; the outputs of the tokens where mask [B, S] is 1."""
    options = {}
    if mask is not None and "position_ids" in signature(model.base.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    output = model(ids, mask, routing_weights=gates, **options)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    routing = output.routing
    assert routing is not None
    return TokenOutputs(
        output.logits[real].float(), routing.gates[real], routing.probabilities[real]
    )


def loop_logits(
    model: DyLoRA_MoE, ids: Tensor, gates: Tensor, experts: Iterable[int] | None = None
) -> Tensor:
    """Logits [B, S, V] from the formula, one expert and one product after another.

        y = base(x) + Σ_e g_e u_e(x),    u_e(x) = ΔW_e x,    of a LoRA s_e B_e A_e x
        with DoRA u_e(x) = c ∘ (s_e B_e A_e x) + (c - 1) ∘ W x,    c = magnitude / ‖W + s_e B_e A_e‖
        with trained biases u_e is larger by bias_e - bias

    It shares no code with the adapters, which are disabled, and takes each expert's weights as its
    files hold them. gates [B, S, N, E]; experts: those in the sum, by default all.
    """
    chosen = model.experts.live if experts is None else experts
    parts = {expert: expert_adapter(model.mixture, expert) for expert in chosen}
    sites = model.site_names

    def hook(path: str) -> Callable[..., Tensor]:
        site = sites.index(path.rpartition(".")[0])

        def add_experts(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            x = args[0].float()  # [B, S, D]; float32, so that the reference adds no rounding
            update = torch.zeros_like(output, dtype=torch.float32)  # [B, S, O]
            for expert, adapter in parts.items():
                delta_OD = adapter.delta_weight(path, like=x)
                own = x @ delta_OD.T
                if path in adapter.magnitudes:
                    W_OD = weight_OD(module).float()
                    c = adapter.magnitudes[path] / (W_OD + delta_OD).norm(dim=1)
                    own = c * own + (c - 1) * (x @ W_OD.T)
                if path in adapter.biases:
                    own = own + shift_of(adapter, path, module)
                update += gates[:, :, site, expert, None].to(x) * own  # g is [B, S, 1]
            return output + update.to(output.dtype)

        return add_experts

    handles = [
        model.base.get_submodule(path).register_forward_hook(hook(path))
        for path in model.mixture.adapters
    ]
    common = next(iter(parts.values()))  # biases outside the projections are the same for all
    for path in common.biases.keys() - common.weights.keys():
        module = model.base.get_submodule(path)
        shift = shift_of(common, path, module)

        def add_shift(
            module: nn.Module, args: Any, output: Tensor, shift: Tensor = shift
        ) -> Tensor:
            return output + shift.to(output.dtype)

        handles.append(module.register_forward_hook(add_shift))
    try:
        with model.disable_adapters():
            return model(ids).logits
    finally:
        for handle in handles:
            handle.remove()


def shift_of(adapter: PeftAdapter, path: str, module: nn.Module) -> Tensor:
    """The difference of a trained bias and the base's, [O]."""
    bias: Any = module.bias
    return adapter.biases[path].to(bias.device) - bias.float()


def rounding_noise(model: DyLoRA_MoE, ids: Tensor) -> float:
    """How far the logits move when every adapted projection is rounded one unit up or down.

    Relative to the largest logit. Measured with the adapters off, because a faulty mixture must not
    widen its own tolerance.
    """
    draw = torch.Generator().manual_seed(SEED)

    def add_rounding(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        sign = 2 * torch.randint(2, output.shape, generator=draw).to(output.device) - 1
        return (output.float() * (1 + torch.finfo(output.dtype).eps * sign)).to(output.dtype)

    paths = model.mixture.adapters
    hooks = [model.base.get_submodule(p).register_forward_hook(add_rounding) for p in paths]
    try:
        with model.disable_adapters():
            rounded = model(ids).logits
    finally:
        for hook in hooks:
            hook.remove()
    with model.disable_adapters():
        return relative_difference(rounded, model(ids).logits)


# Differences


def largest_gap(a: Tensor, b: Tensor) -> float:
    """max |a - b|; NaN where either holds one, 0 where both hold the same infinity."""
    return float((a - b).float().abs().masked_fill(a == b, 0.0).max())


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|, in float32."""
    size = float(b.float().abs().max())
    return largest_gap(a.float(), b.float()) / size if size else largest_gap(a, b)


def largest(values: Iterable[float]) -> float:
    """The maximum, or NaN if any value is NaN, which Python's `max` may skip."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())
