"""How one pass mixes at a block: which experts are computed for every token, and which for the
tokens that choose them.

Shape letters: T tokens, E experts, R rank, K top-k, C columns (E·R summed over stacks), P pairs.
"""

from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.kernels.frozen_linear import FrozenLinearGrads
from dylora.kernels.grouped import Plan, plan_pairs


class Dense(NamedTuple):
    """Experts of a stack that every token uses."""

    stack: int  # its place among the stacks
    rows: Tensor | None  # theirs in it; None: all


class Sparse:
    """Mature experts of a stack, which only their chosen tokens use."""

    def __init__(self, stack: int, experts_TK: Tensor, gates_TK: Tensor, rows: int, gather: bool):
        self.stack = stack
        self.experts_TK = experts_TK  # rows of the stack
        self.gates_TK = gates_TK  # 0 where a place is not used
        self.rows = rows  # how many the stack has
        self.gather = gather  # wanted so, where packed matrices can serve

    @cached_property
    def plan(self) -> Plan:
        """For the grouped way; looking rows up needs none."""
        return plan_pairs(self.experts_TK, self.rows)


class DispatchPlan(NamedTuple):
    """How the projections of a site compute one pass."""

    dense: list[Dense]
    gates: Tensor  # [T, E] of the experts in `dense`, in that order
    sparse: list[Sparse]


class DownProjection(NamedTuple):
    """What enters one projection; made once for all that share its input."""

    dense: Tensor | None  # h [T, C] of the experts that every token uses
    sparse: list[Tensor]  # h [P, R] of every stack in Mix.sparse
    tie: Tensor | None  # of the projection's output, where it can be taken over
    taken: FrozenLinearGrads | None
    place: int  # the projection's among those that share the input

    def take_over(self, weight: Tensor) -> Tensor:
        """The tie, for a projection that has run outside autograd with this weight [O, D]."""
        assert self.taken is not None
        assert self.tie is not None
        self.taken.take(self.place, weight)
        return self.tie


def _columns(gates: Tensor, experts: list[int]) -> Tensor:
    """Columns of gates [T, E]; a view where they lie side by side."""
    if not experts:
        return gates[:, :0]
    first, count = experts[0], len(experts)
    if experts == list(range(first, first + count)):
        return gates if count == gates.shape[1] else gates[:, first : first + count]
    return gates.index_select(1, _indices(tuple(experts), gates.device))


@lru_cache(maxsize=1024)
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    """As a tensor, copied once: a copy to a device waits for it, and no CUDA graph may hold one."""
    with torch.inference_mode(False):  # or training could not use what inference made
        return torch.tensor(places, device=device)
