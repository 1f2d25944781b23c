"""The dense kernel: every expert for every token, as one LoRA of rank E·R with a diagonal between.

Projections with one input share the first product; the second is added into the base's output.

Shape letters: T tokens, D input width, O output width, E experts, R rank, C columns (E·R summed
over stacks).
"""

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dylora.kernels.common import flatten_tokens, without_autocast
from dylora.kernels.frozen_linear import FrozenLinearGrads, gradients_of_y


class Block(NamedTuple):
    """The columns of one stack in h."""

    first: int  # its first expert's place on the E axis of the gates
    experts: int
    rank: int
    shared: bool  # h has the columns of one A for all experts

    @property
    def h_columns(self) -> int:
        return self.rank * (1 if self.shared else self.experts)


def down_products(
    x: Tensor, As: list[list[Tensor]], dtype: torch.dtype, grads: FrozenLinearGrads | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """x [..., D] and for every projection its A's -> h [T, C] of every projection, and with `grads`
    the gradient carriers of every projection.

    An A is [E, R, D] of a stack, or [C, D].
    """
    sizes = [sum(A.shape[:-1].numel() for A in own) for own in As]
    flat = [A for own in As for A in own]
    if torch.is_grad_enabled():
        found = _DownProducts.apply(x, dtype, sizes, grads, *flat)
        return list(found[: len(sizes)]), list(found[len(sizes) :])  # type: ignore[index]
    return list((flatten_tokens(x).to(dtype) @ _joined(flat, dtype).T).split(sizes, 1)), []


def add_dense(
    y: Tensor,
    h: Tensor,
    gates: Tensor,
    scaling_E: Tensor,
    blocks: list[Block],
    Bs: list[Tensor],
    carrier: Tensor | None = None,
) -> Tensor:
    """y [..., O] + the mixture, in place where y lies in one piece.

    h [T, C]; gates [T, E] of all experts; scaling_E: of those in the blocks, in order; Bs: of each
    block, [E, R, O] or [C, O]; carrier: of y, where it ran outside autograd.
    """
    if torch.is_grad_enabled():
        return _AddDense.apply(y, carrier, h, gates, scaling_E, blocks, *Bs)  # type: ignore[return-value]
    gated = _gated(h, _weights(gates, scaling_E, blocks, h.dtype), blocks)
    return _add_product(y, gated, _joined(Bs, h.dtype))


class _DownProducts(torch.autograd.Function):
    """h = x Aᵀ of all projections that share x, as one product; one gradient for x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dtype: torch.dtype,
        sizes: list[int],
        grads: FrozenLinearGrads | None,
        *As: Tensor,
    ) -> Any:
        # With every A frozen (LoRA-FA, or none trained here) x is of no more use.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, *As)
        ctx.dtype, ctx.like_x, ctx.sizes, ctx.grads = dtype, (x.shape, x.dtype), sizes, grads
        ctx.set_materialize_grads(False)
        with without_autocast(x):
            h = flatten_tokens(x).to(dtype) @ _joined(As, dtype).T
        return (*h.split(sizes, 1), *(grads.carriers(x) if grads else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *As = ctx.saved_tensors
        shape, dtype_of_x = ctx.like_x
        dhs, dys = given[: len(ctx.sizes)], given[len(ctx.sizes) :]
        gradients: list[Tensor | None] = [None] * len(As)
        with without_autocast(As[0]):
            dx = ctx.grads.gradient(dys) if ctx.grads else None
            dh = _side_by_side(dhs, ctx.sizes)
            if dh is not None:
                if ctx.needs_input_grad[0]:
                    A_CD = _joined(As, ctx.dtype)
                    dx = dh @ A_CD if dx is None else _add_product(dx, dh, A_CD)
                if x is not None:
                    wanted = ctx.needs_input_grad[4:]
                    _fill_products(gradients, As, wanted, dh, flatten_tokens(x).to(ctx.dtype))
        dx = None if dx is None else dx.view(shape).to(dtype_of_x)
        return (dx, None, None, None, *gradients)


class _AddDense(torch.autograd.Function):
    """y += (h · g·s) B, without a second [T, O]: nothing of the base needs its output before."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        carrier: Tensor | None,
        h: Tensor,
        gates: Tensor,
        scaling_E: Tensor,
        blocks: list[Block],
        *Bs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(h, gates, scaling_E, *Bs)
        ctx.blocks = blocks
        with without_autocast(h):
            gated = _gated(h, _weights(gates, scaling_E, blocks, h.dtype), blocks)
            # Not marked as dirty: the base's product does not read its own output in backward, and
            # for a view (which y often is) autograd would copy the whole gradient twice. Detached,
            # or it would count as a view of an input, which a base may not change in place (OLMo).
            return _add_product(y, gated, _joined(Bs, h.dtype)).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, gates, scaling_E, *Bs = ctx.saved_tensors
        blocks, wanted = ctx.blocks, ctx.needs_input_grad[6:]
        dy_TO = flatten_tokens(dy).to(h.dtype)
        gradients: list[Tensor | None] = [None] * len(Bs)
        with without_autocast(h):
            weights = _weights(gates, scaling_E, blocks, h.dtype)
            if any(wanted):
                _fill_products(gradients, Bs, wanted, _gated(h, weights, blocks), dy_TO)
            dgated = dy_TO @ _joined(Bs, h.dtype).T  # [T, C]
            dh, dweights = _ungated(dgated, h, weights, blocks)
            dgates = None
            if ctx.needs_input_grad[3]:
                dgates = _gates_gradient(dweights * scaling_E, gates, blocks)
        return (*gradients_of_y(ctx, dy), dh, dgates, None, None, *gradients)


# Pieces


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
        return (h.view(*weights.shape, blocks[0].rank) * weights[..., None]).view(h.shape)
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
        grad = dgated.view(*weights.shape, blocks[0].rank)  # [T, E, R]
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


def _side_by_side(dhs: tuple[Tensor | None, ...], sizes: list[int]) -> Tensor | None:
    """[T, C of all]; zeros for a projection whose output nobody used, None where nobody did."""
    used = next((dh for dh in dhs if dh is not None), None)
    if used is None or len(dhs) == 1:
        return used
    parts = zip(dhs, sizes, strict=True)
    return torch.cat([used.new_zeros(len(used), n) if dh is None else dh for dh, n in parts], 1)


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
        return flatten_tokens(parts[0]).to(dtype)
    return torch.cat([flatten_tokens(part).to(dtype) for part in parts])


def _runs(wanted: tuple[bool, ...]) -> list[tuple[int, int]]:
    """Begin and end of the runs of True."""
    runs = [list(run) for _, run in groupby(range(len(wanted)), lambda index: wanted[index])]
    return [(run[0], run[-1] + 1) for run in runs if wanted[run[0]]]
