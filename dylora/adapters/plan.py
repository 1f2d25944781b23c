"""How one pass mixes at a block: which experts are computed for every token, and which only for the
tokens that choose them.

Shape letters: T tokens, E experts, R rank, K top-k, C columns (E·R summed over stacks), P pairs of
a token and an expert (T·K).
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dylora.kernels.common import product_dtype
from dylora.kernels.frozen_linear import FrozenLinearGrads
from dylora.kernels.grouped import Plan, plan_pairs
from dylora.kernels.select import select_kernel
from dylora.routing.gating import RouterOutput, top_k_indices
from dylora.routing.state import RoutingState


class Dense(NamedTuple):
    """Experts of a stack that every token uses."""

    stack: int  # its place among the stacks
    expert_ids: Tensor | None  # theirs in the stack; None: all


@dataclass(eq=False)
class Sparse:
    """Mature experts of a stack, which only the tokens that choose them use."""

    stack: int  # its place among the stacks
    experts_TK: Tensor  # numbers within the stack
    gates_TK: Tensor  # 0 where a choice is not used
    experts: int  # how many the stack has
    gather: bool  # the kernel wanted where it can serve

    @cached_property
    def pairs(self) -> Plan:
        """For the grouped kernel; gathering needs none."""
        return plan_pairs(self.experts_TK, self.experts)


class DispatchPlan(NamedTuple):
    """How the projections of a block compute one pass."""

    dense: list[Dense]
    gates: Tensor  # [T, E] of the experts in `dense`, in that order
    sparse: list[Sparse]


class DownProjection(NamedTuple):
    """What enters one projection; made once for all that share its input."""

    dense: Tensor | None  # h [T, C] of the experts that every token uses
    sparse: list[Tensor]  # h [P, R] of every stack in DispatchPlan.sparse
    grad_carrier: Tensor | None  # of the projection's output, where it may run outside autograd
    frozen_grads: FrozenLinearGrads | None
    order: int  # the projection's among those that share the input

    def carry_gradient(self, weight: Tensor) -> Tensor:
        """The carrier, for a projection that has run outside autograd with this weight [O, D]."""
        assert self.frozen_grads is not None
        assert self.grad_carrier is not None
        self.frozen_grads.record(self.order, weight)
        return self.grad_carrier


def make_plan(
    decision: RouterOutput, stacks: Any, state: RoutingState, top_k: int, dtype: torch.dtype
) -> DispatchPlan:
    """The plan of a pass whose inputs have this precision; all projections of a block share it."""
    gates, mature, used = decision.gates.flatten(0, -2), decision.mature, decision.used
    everyone = mature is None or (state.all_active and not any(mature))
    if everyone and used is None:
        dense = [Dense(index, None) for index in range(len(stacks))]
        if len(stacks) != 1 or stacks[0].count != gates.shape[1]:
            gates = _columns(gates, [e for s in stacks for e in s.experts])
        return DispatchPlan(dense, gates, [])
    mature = mature or [False] * gates.shape[1]
    dense, columns, sparse = [], [], []
    for index, stack in enumerate(stacks):
        experts = stack.experts
        own = list(experts)
        if used is not None and stack.lora_A is not None:
            own = [e for e in used or stacks[0].experts[:1] if e in experts]
        if not any(state.active[e] or used is not None for e in own):
            continue  # its gates are all 0
        ids = [e for e in own if mature[e]]
        immature = [e for e in own if not mature[e]]
        k = min(top_k, len(ids))
        kernel = select_kernel(
            tokens=gates.shape[0],
            mature=len(ids),
            top_k=k,
            needs_grad=torch.is_grad_enabled(),
            device=gates.device.type,
            half=product_dtype(dtype, gates.device).itemsize == 2,
        )
        dense_ids = own if kernel == "dense" or not ids or stack.lora_A is None else immature
        if dense_ids:
            whole = len(dense_ids) == len(experts)
            places = tuple(e - stack.first for e in dense_ids)
            dense.append(Dense(index, None if whole else indices(places, gates.device)))
            columns += dense_ids
        if dense_ids is own:
            continue
        chosen = _columns(gates, ids)
        chosen_TK = top_k_indices(chosen, k)
        gates_TK = chosen.gather(-1, chosen_TK)
        if len(ids) < len(experts):
            chosen_TK = indices(tuple(e - stack.first for e in ids), gates.device)[chosen_TK]
        sparse.append(Sparse(index, chosen_TK, gates_TK, stack.count, kernel == "gather"))
    return DispatchPlan(dense, _columns(gates, columns), sparse)


def _columns(gates: Tensor, experts: list[int]) -> Tensor:
    """Columns of gates [T, E]; a view where they lie side by side."""
    if not experts:
        return gates[:, :0]
    first, count = experts[0], len(experts)
    if experts == list(range(first, first + count)):
        return gates if count == gates.shape[1] else gates[:, first : first + count]
    return gates.index_select(1, indices(tuple(experts), gates.device))


@lru_cache(maxsize=1024)
def indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """As a tensor, copied once: a copy to a device waits for it, and no CUDA graph may hold one."""
    with torch.inference_mode(False):  # or training could not use what inference made
        return torch.tensor(numbers, device=device)
