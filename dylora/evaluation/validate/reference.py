"""Two ways to compute a mixture, which the checks compare: its own pass, and the formula.

Shape letters: B batch, S sequence, T real tokens of a batch in row order, N sites, E experts,
D input width, O output width, r rank, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
Hook = Callable[[nn.Module, Any, Any], Tensor]


class TokenOutputs(NamedTuple):
    """Outputs for every token that is not padding."""

    logits: Tensor  # [T, V] float32
    gates: Tensor  # [T, N, E]
    probabilities: Tensor  # [T, N, E]


@torch.no_grad()
def base_logits(base: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, S, V] of a base called as the mixture calls it."""
    return base(input_ids=ids, attention_mask=None, use_cache=False).logits


def full_pass(
    model: DyLoRA_MoE, ids: Tensor, gates: Tensor | None = None, mask: Tensor | None = None
) -> TokenOutputs:
    """One pass over ids [B, S]; the outputs of the tokens where mask [B, S] is 1, or of all.

    gates [T, N, E] of those tokens replace the routers' own.
    """
    options = {}
    if mask is not None and "position_ids" in signature(model.base.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    if gates is not None:
        gates_T, gates = gates, gates.new_zeros(*ids.shape, *gates.shape[1:])  # [B, S, N, E]
        gates[real] = gates_T
    output = model(ids, mask, routing_weights=gates, **options)
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

    Shares no code with the adapters, which are disabled. gates [B, S, N, E]; experts: those in the
    sum, by default all.
    """
    chosen = model.experts.live if experts is None else experts
    parts = {expert: expert_adapter(model.mixture, expert) for expert in chosen}

    def hook(path: str) -> Hook:
        site = model.site_names.index(path.rpartition(".")[0])

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

    hooks = {path: hook(path) for path in model.mixture.adapters}
    common = next(iter(parts.values()))  # biases outside the projections are the same for all

    def shift_hook(path: str) -> Hook:
        shift = shift_of(common, path, model.base.get_submodule(path))
        return lambda module, args, output: output + shift.to(output.dtype)

    hooks |= {path: shift_hook(path) for path in common.biases.keys() - common.weights.keys()}
    with changed_outputs(model, hooks):
        return model(ids).logits


@contextmanager
def changed_outputs(model: DyLoRA_MoE, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Within this context the adapters are off and the hooks run behind the base's modules."""
    handles = [model.base.get_submodule(p).register_forward_hook(h) for p, h in hooks.items()]
    try:
        with model.disable_adapters():
            yield
    finally:
        for handle in handles:
            handle.remove()


def shift_of(adapter: PeftAdapter, path: str, module: nn.Module) -> Tensor:
    """The difference of a trained bias and the base's, [O]."""
    bias: Any = module.bias
    return adapter.biases[path].to(bias.device) - bias.float()


def rounding_noise(model: DyLoRA_MoE, ids: Tensor) -> float:
    """How far the logits move, relative to the largest, when projections are rounded up or down.

    Measured with the adapters off, because a faulty mixture must not widen its own tolerance.
    """
    draw = torch.Generator().manual_seed(SEED)

    def add_rounding(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        sign = 2 * torch.randint(2, output.shape, generator=draw).to(output.device) - 1
        return (output.float() * (1 + torch.finfo(output.dtype).eps * sign)).to(output.dtype)

    with changed_outputs(model, dict.fromkeys(model.mixture.adapters, add_rounding)):
        rounded = model(ids).logits
    with model.disable_adapters():
        return relative_difference(rounded, model(ids).logits)


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
