"""Neighbouring experts of one projection as stacked tensors, and their initial values.

Shape letters: E experts, R rank, D input width, O output width.
"""

import math

import torch
from torch import Tensor, nn

from dylora.adapters.lora import mixture_update
from dylora.config import MoELoraConfig


class ExpertStack(nn.Module):
    """Neighbouring experts of one projection whose tensors lie in one piece.

    lora_A [E, R, D] and lora_B [E, R, O], R being the largest rank among them. An expert of a
    smaller rank has zeros in the rows beyond it, in A and in B alike: the gradient of either is
    then exactly 0 there, so any optimizer leaves them at 0.

    With DoRA lora_magnitude [E, O] holds the lengths of the rows of each expert's merged weight;
    with trained biases lora_bias [E, O] is added to the projection's own bias.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_bias: nn.Parameter | None
    scaling_E: Tensor

    def __init__(
        self,
        first: int,
        ranks: list[int],
        scalings: list[float],
        lora_A: Tensor | None,
        lora_B: Tensor,
        lora_magnitude: Tensor | None = None,
        lora_bias: Tensor | None = None,
    ):
        """The experts `first`, `first + 1`, …; lora_A is None when the projection shares one A."""
        super().__init__()
        self.first = first
        self.ranks = ranks
        self.register_buffer("scaling_E", torch.tensor(scalings, device=lora_B.device))
        values = {"lora_A": lora_A, "lora_B": lora_B}
        values |= {"lora_magnitude": lora_magnitude, "lora_bias": lora_bias}
        for name, value in values.items():
            parameter = None if value is None else nn.Parameter(value.detach())
            self.register_parameter(name, parameter)

    @property
    def experts(self) -> range:
        """Their places on the E axis of the gates."""
        return range(self.first, self.first + len(self.ranks))

    def forward(self, x: Tensor, gates: Tensor, A_ERD: Tensor, ratio_EO: Tensor | None) -> Tensor:
        """x [..., D], gates [..., E] of all experts -> the update [..., O], in x's precision.

        A_ERD may be one for all, [1, R, D]; ratio_EO multiplies the outputs of B (DoRA).
        """
        B = self.lora_B if ratio_EO is None else self.lora_B * ratio_EO[:, None]
        return mixture_update(x, self.own(gates), A_ERD, B, self.scaling_E)

    def own(self, gates: Tensor) -> Tensor:
        """The columns of this stack's experts in the gates [..., E] of all."""
        return gates[..., self.first : self.first + len(self.ranks)]


def initial_A(
    count: int, rank: int, width: int, config: MoELoraConfig, device: torch.device | None
) -> Tensor:
    """A [E, R, D] by init_lora_weights."""
    A = torch.empty(count, rank, width, device=device)
    if config.init_lora_weights == "gaussian":
        return nn.init.normal_(A, std=1 / rank)
    bound = 1 / math.sqrt(width)  # PEFT's kaiming_uniform_(a=sqrt(5))
    return nn.init.uniform_(A, -bound, bound)


def orthogonal_pair(
    rank: int, in_features: int, out_features: int, device: torch.device | None
) -> tuple[Tensor, Tensor]:
    """A [R, D] and B [R, O] with Bᵀ A = 0: they use complementary halves of an orthonormal basis.

    Both are random, with deviation 0.1, as in PEFT's orthogonal initialisation.
    """
    basis = torch.linalg.qr(torch.randn(rank, rank)).Q.to(device)
    A = basis[0::2].T @ torch.randn(rank // 2, in_features, device=device)
    B = basis[1::2].T @ torch.randn(rank // 2, out_features, device=device)
    return A / 10, B / 10
