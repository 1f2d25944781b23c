"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for stacks of experts.

Shape letters: D width, E experts, R rank.
"""

import math
from typing import Any

import torch
from torch import Tensor

from dylora.training.by_matrix import ByMatrix

MOMENTUM, STEPS, EPSILON = 0.95, 5, 1e-7  # those of torch.optim.Muon, and its polynomial:
A, B, C = 3.4445, -4.7750, 2.0315


class Muon(ByMatrix):
    """torch.optim.Muon with adjust_lr_fn="match_rms_adamw" for each expert's matrices, in float32.

    With that adjustment (Liu et al. 2025, arXiv:2502.16982) an update is about as large as AdamW's
    in a long run, whatever the shape of a matrix and whichever of its sides comes first.
    """

    def new_state(self, p_ERD: Tensor) -> dict[str, Any]:
        """A momentum of every value."""
        return {"momentum_buffer": torch.zeros_like(p_ERD)}

    def move(
        self, p_ERD: Tensor, gradient_ERD: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        """One step; an expert to which a batch gives no gradient stays as it is.

        Its last momentum would otherwise move it as far as any gradient does, in every such step.
        """
        momentum_ERD = state["momentum_buffer"]
        used_E11 = gradient_ERD.flatten(1).any(1)[:, None, None]
        momentum_ERD.lerp_(gradient_ERD, used_E11 * (1 - MOMENTUM))
        update_ERD = orthogonalised(gradient_ERD.lerp(momentum_ERD, MOMENTUM))
        rate_E11 = group["lr"] * used_E11
        p_ERD.mul_(1 - rate_E11 * group["weight_decay"])
        p_ERD.sub_(rate_E11 * 0.2 * math.sqrt(max(p_ERD.shape[1:])) * update_ERD)


def orthogonalised(x_ERD: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, roughly: Newton–Schulz brings its singular values near 1."""
    norms = torch.linalg.vector_norm(x_ERD, dim=(1, 2), keepdim=True)
    x_ERD = x_ERD / norms.clamp(min=EPSILON)
    for _ in range(STEPS):
        gram_ERR = x_ERD @ x_ERD.mT
        x_ERD = A * x_ERD + (B * gram_ERR + C * gram_ERR @ gram_ERR) @ x_ERD
    return x_ERD
