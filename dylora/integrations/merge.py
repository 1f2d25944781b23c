"""Experts written into the weights of their base, which is then an ordinary model.

    W' = W + Σ_e w_e (W_e - W),   b' = b + Σ_e w_e (b_e - b)

where W_e is the weight that expert e alone amounts to: W + ΔW_e, or with DoRA its rows at the
expert's magnitudes. Only weights that do not depend on the token can be merged.

Shape letters: D input width, O output width, E experts, N sites.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dylora.adapters.dora import weight_OD
from dylora.base_models import quantization_of
from dylora.integrations.static_weights import Weights, by_projection, static_weights
from dylora.kernels.common import at_least_float32
from dylora.mixture import Mixture
from dylora.model_io import expert_adapter
from dylora.storage.peft_format import PeftAdapter


def merge_and_unload(
    mixture: Mixture,
    expert: int | None = None,
    weights: Weights | None = None,
    *,
    dequantize: bool = False,
) -> PreTrainedModel:
    """See `DyLoRA_MoE.merge_and_unload`."""
    weights_NE = static_weights(mixture, expert, weights)
    live = [row.state != "retired" for row in mixture.table]
    paths = list(mixture.adapters)
    _check_mergeable(mixture.base, paths, dequantize)
    adapters = {mixture.table[index].name: expert_adapter(mixture, index) for index in mixture.live}
    base = mixture.unload()
    dtype = base.dtype
    replaced = _dequantized(base) if _is_quantised(base) else []
    merge_into(base, adapters, by_projection(weights_NE, live, mixture.site_names, paths))
    for path in replaced:
        base.get_submodule(path).to(dtype)  # rounded once, with the experts in it
    return base


@torch.no_grad()
def merge_into(
    base: nn.Module, adapters: Mapping[str, PeftAdapter], weights: Mapping[str, Sequence[float]]
) -> None:
    """Write a constant mixture of adapters into the weights of a base, in place.

    weights: path of a projection -> one weight an adapter, in the order of `adapters`. Sums are
    made in float32 (float64 for such a base) and rounded once; tied parameters stay tied.
    """
    first = next(iter(adapters.values()))
    for path in first.weights:
        module: Any = base.get_submodule(path)
        weight = weight_OD(module)
        W_OD = at_least_float32(weight)  # bf16 would lose most of a small update
        change_OD = torch.zeros_like(W_OD)
        for factor, adapter in zip(weights[path], adapters.values(), strict=True):
            if factor:
                change_OD += factor * (_weight_of(adapter, path, W_OD) - W_OD)
        weight.copy_(W_OD + change_OD)
    for path, own_bias in first.biases.items():
        module = base.get_submodule(path)
        b_O = at_least_float32(module.bias)
        if path not in first.weights:  # one shift, whatever the experts' weights are
            module.bias.copy_(own_bias.to(b_O))
            continue
        for factor, adapter in zip(weights[path], adapters.values(), strict=True):
            b_O = b_O + factor * (adapter.biases[path].to(b_O) - at_least_float32(module.bias))
        module.bias.copy_(b_O)


def _weight_of(adapter: PeftAdapter, path: str, W_OD: Tensor) -> Tensor:
    """The weight that a projection has with one expert, [O, D]."""
    merged_OD = W_OD + adapter.delta_weight(path, like=W_OD)
    if path not in adapter.magnitudes:
        return merged_OD
    norm_O = merged_OD.norm(dim=1)
    ratio_O = adapter.magnitudes[path].to(W_OD) / torch.where(norm_O > 0, norm_O, 1.0)
    # A row of exact zeros has no direction and stays as it is.
    return torch.where(norm_O > 0, ratio_O, 1.0)[:, None] * merged_OD


def _check_mergeable(base: PreTrainedModel, paths: list[str], dequantize: bool) -> None:
    """Raises ValueError where a merge would change more than the projections, or round anew."""
    if _is_quantised(base) and not dequantize:
        raise ValueError(
            "the base is quantised, and its weights with an expert in them would be rounded to its "
            "few levels again: load it whole (quantization none), or ask for the dequantised "
            "weights (dequantize, --dequantize)"
        )
    if _is_quantised(base) and quantization_of(base) == "none":
        quantizer: Any = base.hf_quantizer
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"a base quantised by {method} cannot be dequantised here: load it whole")
    held = Counter(id(p) for module in base.modules() for p in module._parameters.values())
    for path in paths:
        if held[id(base.get_submodule(path).weight)] > 1:
            raise ValueError(
                f"the weight of {path} is tied to that of another module, which would change with "
                "it: export an adapter instead"
            )


def _is_quantised(base: PreTrainedModel) -> bool:
    return getattr(base, "hf_quantizer", None) is not None


def _dequantized(base: PreTrainedModel) -> list[str]:
    """Turn quantised layers into plain ones in float32, in place; their paths.

    The values are the quantised ones: what quantising has lost stays lost.
    """
    modules: dict[str, Any] = dict(base.named_modules())
    if quantization_of(base) == "torchao-int8":
        # transformers 5.23 has nothing for torchao, but its tensors know the way themselves.
        # A torchao tensor is made of several.
        mark = "__tensor_flatten__"
        packed = [p for p, m in modules.items() if hasattr(getattr(m, "weight", None), mark)]
        for path in packed:
            plain = modules[path].weight.dequantize().float()
            modules[path].weight = nn.Parameter(plain, requires_grad=False)
        quantizer: Any = base.hf_quantizer
        quantizer.remove_quantization_config(base)
        return packed
    base.dequantize(dtype=torch.float32)
    base.requires_grad_(False)
    return [path for path, module in base.named_modules() if modules.get(path) is not module]
