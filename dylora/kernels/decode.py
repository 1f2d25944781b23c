"""The decode kernel: a few tokens without gradient, with the stacks laid out once for them.

At one token a step the time goes into launching operations, not into arithmetic. So the matrices of
all projections that share an input are laid out for as few operations as can be: one product with
A, one multiplication by the gates, and one product with B a projection, added in place.

A layout lives as long as one decoding (`routing/state.py`).

Shape letters: T tokens, D input width, O output width, E experts, R rank, C columns (E·R summed
over stacks), K top-k.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DECODE_TOKENS = 64  # more of them are better served by the other kernels


class ProjectionWeights(NamedTuple):
    """The matrices of one projection, by stack."""

    As: list[Tensor]  # [E, R, D], or one [1, R, D] for all stacks
    Bs: list[Tensor]  # [E, R, O]
    scalings: list[Tensor]  # [E]


@dataclass(eq=False)
class DecodeCache:
    """The projections of a block that share an input."""

    projections: dict[str, ProjectionWeights]
    dtype: torch.dtype

    @cached_property
    def dense(self) -> "DenseLayout":
        """For every expert at once."""
        return dense_layout(self.projections, self.dtype)

    @cached_property
    def gathered(self) -> "GatherLayout":
        """For gathering experts; of a single stack."""
        return gather_layout(self.projections, self.dtype)


class DenseLayout(NamedTuple):
    """All experts of all projections side by side."""

    A_CD: Tensor
    rank: int | None  # of every expert at every projection; None where they differ
    expert_C: Tensor  # whose column it is
    columns: dict[str, int]  # how many are each projection's
    Bs: dict[str, Tensor]  # [C, O] of each, the scale inside


class GatherLayout(NamedTuple):
    """All projections of an expert under each other."""

    A_ERD: Tensor  # R summed over the projections
    rows: dict[str, int]  # how many are each projection's
    Bs: dict[str, Tensor]  # [E, R, O] of each, the scale inside


class DecodePass:
    """One pass of a few tokens through a block: what its projections share.

    gates [T, E], or with `experts_TK` the gates [T, K] of those experts, which are gathered;
    caches: of each projection.
    """

    def __init__(
        self, caches: dict[str, DecodeCache], gates: Tensor, experts_TK: Tensor | None = None
    ):
        self.caches = caches
        self.gates = gates
        self.tokens = len(gates)
        self.experts_TK = experts_TK
        self._input: Tensor | None = None
        self._products: dict[str, Tensor] = {}  # gated h of projections that are still to come

    def fits(self, x: Tensor, y: Tensor) -> bool:
        """Whether y [..., O], the output for x, can take the update in place."""
        same = x.dtype == self.gates.dtype == y.dtype and y.is_contiguous()
        return same and x.numel() == self.tokens * x.shape[-1]

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y + the mixture's update of the projection `name`, in place.

        The first projection of those that share an input computes the products with A for all.
        """
        cache, tokens = self.caches[name], self.tokens
        if self._input is not x or name not in self._products:
            x_TD = x.view(tokens, -1)
            self._input = x
            if self.experts_TK is None:
                self._products = gated_products(cache.dense, x_TD, self.gates)
            else:
                layout, experts_TK = cache.gathered, self.experts_TK
                self._products = gathered_products(layout, x_TD, self.gates, experts_TK)
        gated, y_TO = self._products.pop(name), y.view(tokens, -1)
        if self.experts_TK is None:
            y_TO.addmm_(gated, cache.dense.Bs[name])
        elif tokens == 1:
            y_TO.addmm_(gated.view(1, -1), _gather(cache.gathered.Bs[name], self.experts_TK))
        else:
            B_TCO = cache.gathered.Bs[name][self.experts_TK].flatten(1, 2)
            y_TO[:, None].baddbmm_(gated.reshape(tokens, 1, -1), B_TCO)
        return y


@torch.no_grad()
def dense_layout(projections: dict[str, ProjectionWeights], dtype: torch.dtype) -> DenseLayout:
    """Lay the projections out for one product with A."""
    exact = torch.promote_types(dtype, torch.float32)  # the scale is not to round what B holds
    parts, experts, Bs = [], [], {}
    for name, weights in projections.items():
        own, first = [], 0
        for index, B in enumerate(weights.Bs):
            A = weights.As[index if len(weights.As) > 1 else 0]
            own.append(A.expand(B.shape[0], -1, -1).flatten(0, 1))
            numbers = torch.arange(first, first + B.shape[0], device=B.device)
            experts.append(numbers.repeat_interleave(B.shape[1]))
            first += B.shape[0]
        scaled = [
            (B.to(exact) * s[:, None, None]).flatten(0, 1)
            for B, s in zip(weights.Bs, weights.scalings, strict=True)
        ]
        parts += own
        Bs[name] = torch.cat(scaled).to(dtype)
    columns = {name: B.shape[0] for name, B in Bs.items()}
    ranks = {B.shape[1] for weights in projections.values() for B in weights.Bs}
    rank = ranks.pop() if len(ranks) == 1 else None
    return DenseLayout(torch.cat(parts).to(dtype), rank, torch.cat(experts), columns, Bs)


@torch.no_grad()
def gather_layout(projections: dict[str, ProjectionWeights], dtype: torch.dtype) -> GatherLayout:
    """Lay the projections out for looking up an expert's rows at once."""
    exact = torch.promote_types(dtype, torch.float32)
    Bs = {}
    for name, weights in projections.items():
        [B], [scaling_E] = weights.Bs, weights.scalings
        Bs[name] = (B.to(exact) * scaling_E[:, None, None]).to(dtype)
    A_ERD = torch.cat([weights.As[0] for weights in projections.values()], 1)
    return GatherLayout(A_ERD.to(dtype), {name: B.shape[1] for name, B in Bs.items()}, Bs)


def gated_products(layout: DenseLayout, x_TD: Tensor, gates_TE: Tensor) -> dict[str, Tensor]:
    """x -> the gated h [T, C] of every projection."""
    gated = F.linear(x_TD, layout.A_CD)
    projections = len(layout.columns)
    if layout.rank is None:
        gated *= gates_TE.index_select(1, layout.expert_C)
        parts = gated.split(list(layout.columns.values()), 1)
    else:
        tokens, experts = gates_TE.shape
        by_expert = gated.view(tokens, projections, experts, layout.rank)
        by_expert *= gates_TE.view(tokens, 1, experts, 1)
        parts = (gated,) if projections == 1 else gated.chunk(projections, 1)
    return dict(zip(layout.columns, parts, strict=True))


def gathered_products(
    layout: GatherLayout, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor
) -> dict[str, Tensor]:
    """x -> the gated h [T, K, R] of every projection, for the chosen experts."""
    if x_TD.shape[0] == 1:
        A_CD = _gather(layout.A_ERD, experts_TK)
        h_TKR = F.linear(x_TD, A_CD).view(*experts_TK.shape, -1)
    else:
        h_TKR = torch.matmul(layout.A_ERD[experts_TK], x_TD[:, None, :, None]).squeeze(-1)
    h_TKR *= gates_TK[..., None]
    pieces = h_TKR.split(list(layout.rows.values()), -1)
    return {n: piece.contiguous() for n, piece in zip(layout.rows, pieces, strict=True)}


def _gather(stack: Tensor, experts_1K: Tensor) -> Tensor:
    """The matrices of one token's experts, [E, R, N] -> [K·R, N]."""
    return stack.index_select(0, experts_1K[0]).flatten(0, 1)
