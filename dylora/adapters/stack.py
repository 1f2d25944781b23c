"""Neighbouring experts of equal rank as stacked tensors, and the initial values of LoRA's.

Shape letters: E experts, R rank, D input width, O output width.
"""

import itertools
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from dylora.config import MoELoraConfig


class ExpertStack(nn.Module):
    """Neighbouring experts of one projection and one rank, whose tensors lie in one piece.

    Every parameter has the experts in its first dimension, and matrices the rank in the second.
    Experts of unequal rank lie in stacks of their own, so they cost what their ranks add up to.
    """

    NAMES: ClassVar[tuple[str, ...]]  # of its parameters
    scaling_E: Tensor

    def __init__(
        self, first: int, rank: int, scalings: list[float], values: Mapping[str, Tensor | None]
    ):
        """The experts `first`, `first + 1`, …; scalings: one of each; values: of the parameters, by
        their names."""
        super().__init__()
        self.first = first
        self.rank = rank
        self.count = len(scalings)
        device = next(value.device for value in values.values() if value is not None)
        self.register_buffer("scaling_E", torch.tensor(scalings, device=device))
        assert values.keys() <= set(self.NAMES)
        for name in self.NAMES:
            value = values.get(name)
            self.register_parameter(name, None if value is None else nn.Parameter(value.detach()))

    @property
    def experts(self) -> range:
        """Their numbers on the E axis of the gates."""
        return range(self.first, self.first + self.count)

    def own(self, gates: Tensor) -> Tensor:
        """The columns of this stack's experts in the gates [..., E] of all."""
        return gates[..., self.first : self.first + self.count]


class LoRAStack(ExpertStack):
    """lora_A [E, R, D], None where the projection's experts share one, and lora_B [E, R, O].

    With DoRA lora_magnitude [E, O] holds the lengths of the rows of each expert's merged weight;
    with trained biases lora_bias [E, O] is added to the projection's own bias.
    """

    NAMES = ("lora_A", "lora_B", "lora_magnitude", "lora_bias")
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_bias: nn.Parameter | None


def equal_runs(ranks: list[int]) -> list[list[int]]:
    """The numbers of neighbours of equal rank, in order: those of one stack each."""
    numbers = range(len(ranks))
    return [list(run) for _, run in itertools.groupby(numbers, lambda number: ranks[number])]


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
