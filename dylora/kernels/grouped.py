"""The grouped kernel: mature experts only for the tokens that choose them.

Tokens sorted by expert, two grouped products, and their rows added back.

Shape letters: T tokens, D input width, O output width, E experts, R rank, K top-k, P pairs of a
token and an expert (T·K).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dylora.kernels.common import flatten_tokens, without_autocast
from dylora.kernels.frozen_linear import FrozenLinearGrads, gradients_of_y

SMALL_GROUP = 48  # rows of an expert, on average


class Plan(NamedTuple):
    """The pairs of a token and an expert it uses, sorted by expert; P = T·K of them, always."""

    pair_P: Tensor  # place in [T, K] of each sorted pair
    token_P: Tensor  # its token
    sorted_P: Tensor  # where each pair of [T, K] went
    ends_E: Tensor  # int32: where each expert's pairs end; experts without any have none


def plan_pairs(experts_TK: Tensor, experts: int) -> Plan:
    """Sort pairs by expert, without asking the device how many each has."""
    flat = experts_TK.flatten()
    pair_P = flat.argsort(stable=True)
    counts_E = torch.zeros(experts, dtype=torch.long, device=flat.device)
    counts_E.scatter_add_(0, flat, torch.ones_like(flat))
    sorted_P = torch.empty_like(pair_P)
    sorted_P[pair_P] = torch.arange(len(flat), device=flat.device)
    token_P = pair_P // experts_TK.shape[1]
    return Plan(pair_P, token_P, sorted_P, counts_E.cumsum(0).to(torch.int32))


def grouped_products(
    x: Tensor,
    As: list[Tensor],
    dtype: torch.dtype,
    plan: Plan,
    grads: FrozenLinearGrads | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """x [..., D] and A [E, R, D] of every projection -> h [P, R] of every projection, and with
    `grads` the gradient carriers of every projection.

    On a CPU in float32 at least where groups are small: half precision is no faster then, even with
    instructions for it, and the stacks would have to be cast.
    """
    if x.device.type == "cpu" and len(plan.token_P) < SMALL_GROUP * len(plan.ends_E):
        dtype = torch.promote_types(dtype, torch.float32)
    found = _GroupedProducts.apply(x, dtype, plan, grads, *As)
    return list(found[: len(As)]), list(found[len(As) :])  # type: ignore[index]


def add_grouped(
    y: Tensor,
    h: Tensor,
    weights_TK: Tensor,
    B_ERO: Tensor,
    plan: Plan,
    carrier: Tensor | None = None,
) -> Tensor:
    """y [..., O] + Σ over each token's K experts of weight · B h, in place where possible.

    h [P, R]; weights_TK: g·s of the pairs, 0 where a choice is not used; carrier: of y, where it
    ran outside autograd.
    """
    return _AddGrouped.apply(y, carrier, h, weights_TK, B_ERO, plan)  # type: ignore[return-value]


class _GroupedProducts(torch.autograd.Function):
    """Gather the tokens of every expert once for all projections that share x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        plan: Plan,
        grads: FrozenLinearGrads | None,
        *As: Tensor,
    ) -> Any:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, *plan, *As)
        ctx.dtype, ctx.like_x, ctx.grads = dtype, (x.shape, x.dtype), grads
        ctx.set_materialize_grads(False)
        with without_autocast(x):
            x_PD = flatten_tokens(x).index_select(0, plan.token_P).to(dtype)
            h = grouped(x_PD, _side_by_side(As, dtype).transpose(1, 2), plan.ends_E)
        return (*h.split([A.shape[1] for A in As], 1), *(grads.carriers(x) if grads else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *saved = ctx.saved_tensors
        plan, As = Plan(*saved[: len(Plan._fields)]), saved[len(Plan._fields) :]
        dhs, dys = given[: len(As)], given[len(As) :]
        dAs: list[Tensor | None] = [None] * len(As)
        # Of the projections whose output somebody used.
        used = [(n, dh, As[n]) for n, dh in enumerate(dhs) if dh is not None]
        shape, dtype_of_x = ctx.like_x
        with without_autocast(As[0]):
            dx = ctx.grads.gradient(dys) if ctx.grads else None
            wanted = [(n, dh) for n, dh, _ in used if ctx.needs_input_grad[4 + n]]
            if wanted:
                x_PD = flatten_tokens(x).index_select(0, plan.token_P).to(ctx.dtype)
                for n, dh_PR in wanted:
                    dAs[n] = grouped(dh_PR.T, x_PD, plan.ends_E)
            if ctx.needs_input_grad[0] and used:
                dh = torch.cat([dh for _, dh, _ in used], 1)
                A_ECD = _side_by_side([A for _, _, A in used], ctx.dtype)
                if dx is None:
                    dx = dh.new_zeros(shape[:-1].numel(), shape[-1], dtype=dtype_of_x)
                _add_rows(dx, grouped(dh, A_ECD, plan.ends_E), plan)
        dx = None if dx is None else dx.view(shape).to(dtype_of_x)
        return (dx, None, None, None, *dAs)


class _AddGrouped(torch.autograd.Function):
    """One grouped product, its rows weighted and added to those of their tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        carrier: Tensor | None,
        h_PR: Tensor,
        weights_TK: Tensor,
        B_ERO: Tensor,
        plan: Plan,
    ) -> Tensor:
        dtype = h_PR.dtype
        with without_autocast(h_PR):
            weights_P1 = weights_TK.flatten()[plan.pair_P, None].to(dtype)
            y_PO = grouped(h_PR * weights_P1, B_ERO.to(dtype), plan.ends_E)
            out = y if y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
            _add_rows(out.view(-1, y.shape[-1]), y_PO, plan)
        ctx.save_for_backward(h_PR, weights_TK, B_ERO, *plan)
        return out.detach()  # as in the dense kernel

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        h_PR, weights_TK, B_ERO, *parts = ctx.saved_tensors
        plan, dtype = Plan(*parts), h_PR.dtype
        dweights = dB = None
        with without_autocast(h_PR):
            dy_PO = flatten_tokens(dy).to(dtype).index_select(0, plan.token_P)
            weights_P1 = weights_TK.flatten()[plan.pair_P, None].to(dtype)
            dgated_PR = grouped(dy_PO, B_ERO.to(dtype).transpose(1, 2), plan.ends_E)
            if ctx.needs_input_grad[3]:
                sums_P = (dgated_PR * h_PR).sum(1)
                dweights = sums_P[plan.sorted_P].view_as(weights_TK).to(weights_TK.dtype)
            if ctx.needs_input_grad[4]:
                dB = grouped((h_PR * weights_P1).T, dy_PO, plan.ends_E)
        return (*gradients_of_y(ctx, dy), dgated_PR.mul_(weights_P1), dweights, dB, None)


def grouped(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """Products of the rows (or, for two matrices, the columns) of each group.

    left [P, K], right [E, K, N] -> [P, N]; left [M, P], right [P, N] -> [E, M, N].
    """
    if left.dtype != torch.float64 and _is_aligned(left) and _is_aligned(right):
        return F.grouped_mm(left, right, offs=ends_E)
    ends = [0, *ends_E.tolist()]
    spans = list(pairwise(ends))
    if right.ndim == 3:
        parts = [left[begin:end] @ right[e] for e, (begin, end) in enumerate(spans)]
        return torch.cat(parts)
    return torch.stack([left[:, begin:end] @ right[begin:end] for begin, end in spans])


def _side_by_side(As: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A [E, R, D] of several projections -> [E, R of all, D]: wider groups make better products."""
    return As[0].to(dtype) if len(As) == 1 else torch.cat([A.to(dtype) for A in As], 1)


def _is_aligned(matrix: Tensor) -> bool:
    """Whether torch's grouped product takes it: rows or columns a multiple of 16 bytes apart."""
    strides = [stride for stride in matrix.stride()[-2:] if stride != 1]
    return all(stride * matrix.element_size() % 16 == 0 for stride in strides)


def _add_rows(target_TO: Tensor, rows_PO: Tensor, plan: Plan) -> None:
    """Add the row of every pair to that of its token.

    On CUDA index_add_ adds in an order that changes from run to run; so the pairs of a token are
    laid side by side there, and summed.
    """
    rows_PO = rows_PO.to(target_TO.dtype)
    if target_TO.is_cuda:
        per_token = len(rows_PO) // len(target_TO)
        target_TO += rows_PO[plan.sorted_P].view(len(target_TO), per_token, -1).sum(1)
    else:
        target_TO.index_add_(0, plan.token_P, rows_PO)
