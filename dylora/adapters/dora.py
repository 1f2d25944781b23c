"""DoRA: the lengths of the rows of a merged weight, and what a mixture makes of them.

Shape letters: D input width, O output width, E experts, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dylora.adapters.stack import LoRAStack


def magnitude_ratio(stack: LoRAStack, A_ERD: Tensor, weight: Tensor) -> Tensor:
    """c_e = magnitude_e / ‖W + s_e B_e A_e‖ by row, [E, O]; the norm counts as a constant.

    One DoRA expert is y = c ∘ ((W + s B A) x) + bias (Liu et al. 2024; 4.3 on the constant).
    A mixture of them mixes what each adds to the base:
        y = base(x) + Σ_e g_e [ (c_e - 1) ∘ W x + c_e ∘ s_e B_e A_e x ],
    so a one-hot gate is that DoRA expert, and fresh ones (c = 1, B = 0) are the identity.

    weight: W [O, D]. The norms come from ‖w‖² + 2 s b·(A w) + s² b·(A Aᵀ) b, without an [E, O, D].
    """
    with torch.no_grad():
        assert stack.lora_magnitude is not None
        weight = weight.to(torch.promote_types(weight.dtype, stack.lora_B.dtype))
        A, B = A_ERD.to(weight), stack.lora_B.to(weight)
        scale_E11 = stack.scaling_E.to(weight)[:, None, None]
        crossed_ERO = F.linear(A, weight)  # A w, for every row w of W
        gram_ERR = A @ A.transpose(1, 2)
        square_EO = (2 * scale_E11 * B * crossed_ERO).sum(1)
        square_EO = square_EO + (scale_E11**2 * B * (gram_ERR @ B)).sum(1)
        own_O = row_norms(weight)
        growth_EO = (1 + square_EO / own_O.square()).clamp_min(0).sqrt()  # exactly 1 where B = 0
        norm_EO = torch.where(own_O > 0, own_O * growth_EO, square_EO.clamp_min(0).sqrt())
    # A row of exact zeros has no direction: its ratio is defined as 1.
    safe_EO = torch.where(norm_EO > 0, norm_EO, 1.0)
    return torch.where(norm_EO > 0, stack.lora_magnitude / safe_EO, 1.0)


def row_norms(weight: Tensor) -> Tensor:
    """‖w_o‖ of W [O, D], in float32 at least."""
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).norm(dim=1)


def weight_OD(projection: nn.Module) -> Tensor:
    """The weight of a projection as [O, D]; GPT-2's Conv1D keeps it the other way round."""
    weight: Any = projection.weight
    return weight.T if isinstance(projection, Conv1D) else weight
