"""How the routed update is computed: three ways to one meaning, and the rule that chooses.

    y += Σ_e g_e · s_e · B_e A_e x

wide      every expert for every token: two products, the gate folded into the rank axis between
          them, the second added into the base's output in place. Projections with one input share
          the first product.
grouped   mature experts only where they are chosen: tokens sorted by expert, grouped products.
gathered  a handful of tokens without gradient: the rows of the chosen experts are looked up
          (`packed.py`, which also has the wide way of a few tokens).

Immature experts are mixed for every token, so beside the last two they go the wide way.

The functions below do by hand what autograd would do, to keep less (x once for all projections
that share it, h, and the gates), to add into the base's output instead of making a second one, and
to compute no gradient of frozen experts.

Shape letters: T tokens, D input width, O output width, E experts, R rank, C columns (E·R summed
over stacks), K top-k, P pairs of a token and an expert (T·K).
"""

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Block(NamedTuple):
    """The columns of one stack in h."""

    first: int  # its first expert's place on the E axis of the gates
    experts: int
    rank: int
    shared: bool  # h has the columns of one A for all experts

    @property
    def h_columns(self) -> int:
        return self.rank * (1 if self.shared else self.experts)


# The wide way


def products_with_A(x: Tensor, As: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """x [..., D] and for every projection its A's -> h [T, C] of every projection.

    An A is [E, R, D] of a stack, or [C, D].
    """
    sizes = [sum(A.shape[:-1].numel() for A in own) for own in As]
    flat = [A for own in As for A in own]
    if torch.is_grad_enabled():
        return list(_ProductsWithA.apply(x, dtype, sizes, *flat))  # type: ignore[misc]
    return list((_rows(x).to(dtype) @ _joined(flat, dtype).T).split(sizes, 1))


def add_mixture(
    y: Tensor, h: Tensor, gates: Tensor, scaling_E: Tensor, blocks: list[Block], Bs: list[Tensor]
) -> Tensor:
    """y [..., O] + the mixture, in place where y lies in one piece.

    h [T, C]; gates [T, E] of all experts; scaling_E: of those in the blocks, in order; Bs: of each
    block, [E, R, O] or [C, O].
    """
    if torch.is_grad_enabled():
        return _AddMixture.apply(y, h, gates, scaling_E, blocks, *Bs)  # type: ignore[return-value]
    gated = _gated(h, _weights(gates, scaling_E, blocks, h.dtype), blocks)
    return _add_product(y, gated, _joined(Bs, h.dtype))


class _ProductsWithA(torch.autograd.Function):
    """h = x Aᵀ of all projections that share x, as one product; one gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, sizes: list[int], *As: Tensor) -> Any:
        # With every A frozen (LoRA-FA, or none trained here) x is of no more use.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *As)
        ctx.dtype, ctx.like_x = dtype, (x.shape, x.dtype)
        with _without_autocast(x):
            h = _rows(x).to(dtype) @ _joined(As, dtype).T
        return h.split(sizes, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dhs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *As = ctx.saved_tensors
        dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs, 1)
        dx = None
        gradients: list[Tensor | None] = [None] * len(As)
        with _without_autocast(dh):
            if ctx.needs_input_grad[0]:
                shape, dtype = ctx.like_x
                dx = (dh @ _joined(As, ctx.dtype)).view(shape).to(dtype)
            if x is not None:
                _fill_products(gradients, As, ctx.needs_input_grad[3:], dh, _rows(x).to(ctx.dtype))
        return (dx, None, None, *gradients)


class _AddMixture(torch.autograd.Function):
    """y += (h · g·s) B, without a second [T, O]: nothing of the base needs its output before."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        h: Tensor,
        gates: Tensor,
        scaling_E: Tensor,
        blocks: list[Block],
        *Bs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(h, gates, scaling_E, *Bs)
        ctx.blocks = blocks
        with _without_autocast(h):
            gated = _gated(h, _weights(gates, scaling_E, blocks, h.dtype), blocks)
            # Not marked as dirty: the base's product does not read its own output in backward, and
            # for a view (which y often is) autograd would copy the whole gradient twice.
            return _add_product(y, gated, _joined(Bs, h.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, gates, scaling_E, *Bs = ctx.saved_tensors
        blocks, wanted = ctx.blocks, ctx.needs_input_grad[5:]
        dy_TO = _rows(dy).to(h.dtype)
        gradients: list[Tensor | None] = [None] * len(Bs)
        with _without_autocast(h):
            weights = _weights(gates, scaling_E, blocks, h.dtype)
            if any(wanted):
                _fill_products(gradients, Bs, wanted, _gated(h, weights, blocks), dy_TO)
            dgated = dy_TO @ _joined(Bs, h.dtype).T  # [T, C]
            dh, dweights = _ungated(dgated, h, weights, blocks)
            dgates = None
            if ctx.needs_input_grad[2]:
                dgates = _gates_gradient(dweights * scaling_E, gates, blocks)
        return (dy, dh, dgates, None, None, *gradients)


# The grouped way


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


def add_grouped(
    y: Tensor, x: Tensor, weights_TK: Tensor, plan: Plan, A_ERD: Tensor, B_ERO: Tensor
) -> Tensor:
    """y [..., O] + Σ over each token's K experts of weight · B A x, in place where possible.

    x [..., D]; weights_TK: g·s of the pairs; 0 where a place of the K is not used.
    """
    return _AddGrouped.apply(y, x, weights_TK, plan, A_ERD, B_ERO)  # type: ignore[return-value]


class _AddGrouped(torch.autograd.Function):
    """Gather the tokens of every expert, two grouped products, add the rows back."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        weights_TK: Tensor,
        plan: Plan,
        A_ERD: Tensor,
        B_ERO: Tensor,
    ) -> Tensor:
        dtype = y.dtype
        with _without_autocast(x):
            x_PD = x.flatten(0, -2).index_select(0, plan.token_P).to(dtype)
            h_PR = _grouped(x_PD, A_ERD.to(dtype).transpose(1, 2), plan.ends_E)
            weights_P1 = weights_TK.flatten()[plan.pair_P, None].to(dtype)
            y_PO = _grouped(h_PR * weights_P1, B_ERO.to(dtype), plan.ends_E)
            out = y if y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
            _add_rows(out.view(-1, y.shape[-1]), y_PO, plan)
        ctx.save_for_backward(x, h_PR, weights_TK, A_ERD, B_ERO, *plan)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h_PR, weights_TK, A_ERD, B_ERO, *parts = ctx.saved_tensors
        plan, dtype = Plan(*parts), h_PR.dtype
        dx = dweights = dA = dB = None
        with _without_autocast(x):
            dy_PO = dy.flatten(0, -2).to(dtype).index_select(0, plan.token_P)
            weights_P1 = weights_TK.flatten()[plan.pair_P, None].to(dtype)
            dgated_PR = _grouped(dy_PO, B_ERO.to(dtype).transpose(1, 2), plan.ends_E)
            dh_PR = dgated_PR * weights_P1
            if ctx.needs_input_grad[5]:
                dB = _grouped((h_PR * weights_P1).T, dy_PO, plan.ends_E)
            if ctx.needs_input_grad[4]:
                x_PD = x.flatten(0, -2).index_select(0, plan.token_P).to(dtype)
                dA = _grouped(dh_PR.T, x_PD, plan.ends_E)
            if ctx.needs_input_grad[2]:
                sums_P = (dgated_PR * h_PR).sum(1)
                dweights = sums_P[plan.sorted_P].view_as(weights_TK).to(weights_TK.dtype)
            if ctx.needs_input_grad[1]:
                dx_PD = _grouped(dh_PR, A_ERD.to(dtype), plan.ends_E)
                dx = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
                _add_rows(dx.view(-1, x.shape[-1]), dx_PD, plan)
                dx = dx.to(x.dtype)
        return dy, dx, dweights, None, dA, dB


def _grouped(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
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


def _is_aligned(matrix: Tensor) -> bool:
    """Whether torch's grouped product takes it: rows or columns a multiple of 16 bytes apart."""
    strides = [stride for stride in matrix.stride()[-2:] if stride != 1]
    return all(stride * matrix.element_size() % 16 == 0 for stride in strides)


def _add_rows(target_TO: Tensor, rows_PO: Tensor, plan: Plan) -> None:
    """Add the row of every pair to that of its token.

    On CUDA index_add_ adds in an order that changes from run to run; so the pairs of a token are
    laid side by side there, and summed.
    """
    if target_TO.is_cuda:
        per_token = len(rows_PO) // len(target_TO)
        target_TO += rows_PO[plan.sorted_P].view(len(target_TO), per_token, -1).sum(1)
    else:
        target_TO.index_add_(0, plan.token_P, rows_PO)


# The rule


# Measured by experiments/speed/benchmark.py --section sparse (numbers in docs/performance.md): the
# grouped way wins where a token leaves out enough experts and there are tokens to fill its products
# (on CUDA not measured: an estimate); looking rows up wins where reading all experts costs more.
GROUPED_FROM = {"cpu": 4.0, "cuda": 16.0}  # mature experts per place of the top-k
GROUPED_TOKENS = 64
GATHERED_TOKENS = 16
GATHERED_FROM = 32.0


def choose_way(*, tokens: int, mature: int, top_k: int, needs_grad: bool, device: str) -> str:
    """wide, grouped or gathered, from what is known without looking at the gates.

    Args:
        tokens: T of this pass.
        mature: how many experts only their chosen tokens use.
        top_k: how many of those a token may use.
        needs_grad: whether a backward pass follows.
    """
    if mature <= top_k:
        return "wide"
    per_place = mature / top_k
    if not needs_grad and tokens <= GATHERED_TOKENS:
        return "gathered" if per_place >= GATHERED_FROM else "wide"
    threshold = GROUPED_FROM.get(device, GROUPED_FROM["cuda"])
    if tokens >= GROUPED_TOKENS and per_place >= threshold:
        return "grouped"
    return "wide"


# Pieces


def _rows(x: Tensor) -> Tensor:
    """[..., D] -> [T, D]."""
    return x.reshape(-1, x.shape[-1])


# One stack of one rank is what nearly every mixture has, and at short sequences a step's time goes
# into the number of operations: so the pieces below take it without slices and lists.


def _is_plain(blocks: list[Block]) -> bool:
    return len(blocks) == 1 and not blocks[0].shared


def _weights(gates: Tensor, scaling_E: Tensor, blocks: list[Block], dtype: torch.dtype) -> Tensor:
    """g·s [T, E] of the blocks' experts, in their order."""
    if len(blocks) > 1:
        own = torch.cat([gates[:, b.first : b.first + b.experts] for b in blocks], 1)
    else:
        own = gates
        if blocks[0].experts < gates.shape[1]:
            own = gates[:, blocks[0].first : blocks[0].first + blocks[0].experts]
    return (own * scaling_E).to(dtype)


def _gated(h: Tensor, weights: Tensor, blocks: list[Block]) -> Tensor:
    """h [T, C] times the weight of each column's expert, [T, C]."""
    if _is_plain(blocks):
        return (h.view(*weights.shape, -1) * weights[..., None]).view(h.shape)
    parts, column, expert = [], 0, 0
    for b in blocks:
        own = h[:, column : column + b.h_columns].unflatten(1, (-1, b.rank))  # [T, E or 1, R]
        part = own * weights[:, expert : expert + b.experts, None]
        parts.append(part.flatten(1))
        column, expert = column + (0 if b.shared else b.h_columns), expert + b.experts
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _ungated(
    dgated: Tensor, h: Tensor, weights: Tensor, blocks: list[Block]
) -> tuple[Tensor, Tensor]:
    """Gradients of h [T, C] and of the weights [T, E] from that of their product.

    May write over `dgated`.
    """
    if _is_plain(blocks):
        grad = dgated.view(*weights.shape, -1)  # [T, E, R]
        dweights = (grad * h.view(grad.shape)).sum(-1)
        return grad.mul_(weights[..., None]).view(h.shape), dweights
    dhs, dweights, column, expert, out = [], [], 0, 0, 0
    for b in blocks:
        width = b.experts * b.rank
        grad = dgated[:, out : out + width].unflatten(1, (-1, b.rank))  # [T, E, R]
        own = h[:, column : column + b.h_columns].unflatten(1, (-1, b.rank))
        weight = weights[:, expert : expert + b.experts, None]
        dh = grad * weight
        dhs.append(dh.sum(1) if b.shared else dh.flatten(1))
        dweights.append((grad * own).sum(-1))
        column, expert, out = column + (0 if b.shared else width), expert + b.experts, out + width
    if blocks[0].shared:
        dh = dhs[0] if len(dhs) == 1 else torch.stack(dhs).sum(0)
    else:
        dh = dhs[0] if len(dhs) == 1 else torch.cat(dhs, 1)
    return dh, dweights[0] if len(dweights) == 1 else torch.cat(dweights, 1)


def _gates_gradient(own: Tensor, gates: Tensor, blocks: list[Block]) -> Tensor:
    """The gradient of the blocks' experts [T, E], laid out like the gates; 0 for all others."""
    if len(blocks) == 1 and blocks[0].experts == gates.shape[1]:
        return own.to(gates.dtype)
    dgates, column = torch.zeros_like(gates), 0
    for b in blocks:
        dgates[:, b.first : b.first + b.experts] = own[:, column : column + b.experts]
        column += b.experts
    return dgates


def _fill_products(
    gradients: list[Tensor | None],
    parts: list[Tensor],
    wanted: tuple[bool, ...],
    left: Tensor,
    right: Tensor,
) -> None:
    """leftᵀ right for the parts that want a gradient: left [T, C of all parts], right [T, N].

    One product for neighbours that want it, none for the others.
    """
    if len(parts) == 1:
        gradients[0] = (left.T @ right).view(parts[0].shape)
        return
    rows = [part.shape[:-1].numel() for part in parts]
    for first, last in _runs(wanted):
        begin, width = sum(rows[:first]), sum(rows[first:last])
        found = (left[:, begin : begin + width].T @ right).split(rows[first:last])
        for index, gradient in enumerate(found, first):
            gradients[index] = gradient.view(parts[index].shape)


def _add_product(y: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """y [..., O] + left [T, C] right [C, O]; y itself where it can be viewed as [T, O]."""
    if y.is_contiguous() and y.dtype == left.dtype:
        y.view(-1, y.shape[-1]).addmm_(left, right)
        return y
    return y + (left @ right).view_as(y).to(y.dtype)


def _joined(parts: Any, dtype: torch.dtype) -> Tensor:
    """Rows of several matrices (or stacks of them) under each other, in one precision.

    One alone is not copied.
    """
    if len(parts) == 1:
        return _rows(parts[0]).to(dtype)
    return torch.cat([_rows(part).to(dtype) for part in parts])


def _runs(wanted: tuple[bool, ...]) -> list[tuple[int, int]]:
    """Begin and end of the runs of True."""
    runs, begin = [], None
    for index, value in enumerate((*wanted, False)):
        if value and begin is None:
            begin = index
        if not value and begin is not None:
            runs.append((begin, index))
            begin = None
    return runs


def _without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Operands are cast by hand here: an addition in place is not autocast."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
