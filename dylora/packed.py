"""Stacks packed once for a few tokens without gradient: decoding.

At one token a step the time goes into launching operations, not into arithmetic. So the matrices of
all projections that share an input are laid out for as few operations as can be: one product with
A, one multiplication by the gates, and one product with B a projection, added in place.

A pack is made anew when a parameter of it has changed (its version says so) or has moved.

Shape letters: T tokens, D input width, O output width, E experts, R rank, C columns (E·R summed
over stacks), K top-k.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PACKED_TOKENS = 64  # more of them are better served by the ways of compute.py


class Member(NamedTuple):
    """The matrices of one projection, by stack."""

    As: list[Tensor]  # [E, R, D], or one [1, R, D] for all stacks
    Bs: list[Tensor]  # [E, R, O]
    scalings: list[Tensor]  # [E]


class Pack:
    """The projections of a site that share an input."""

    def __init__(self, members: dict[str, Member], dtype: torch.dtype):
        tensors = [m for member in members.values() for part in member for m in part]
        self.watched = tensors
        self.state = _state(tensors, dtype)
        self.dtype = dtype
        self._members = members
        self._wide: Wide | None = None
        self._tall: Tall | None = None

    def is_current(self, dtype: torch.dtype) -> bool:
        """Whether nothing has changed since it was packed."""
        return self.state == _state(self.watched, dtype)

    @property
    def wide(self) -> "Wide":
        """Packed for every expert at once."""
        if self._wide is None:
            self._wide = pack_wide(self._members, self.dtype)
        return self._wide

    @property
    def tall(self) -> "Tall":
        """Packed for looking experts up; of a single stack."""
        if self._tall is None:
            self._tall = pack_tall(self._members, self.dtype)
        return self._tall


class Wide(NamedTuple):
    """All experts of all members side by side."""

    A_CD: Tensor
    expert_C: Tensor  # whose column it is
    spans: dict[str, tuple[int, int]]  # columns of each member
    Bs: dict[str, Tensor]  # [C, O] of each member, the scale inside


class Tall(NamedTuple):
    """All members of an expert under each other."""

    A_ERD: Tensor  # R summed over the members
    spans: dict[str, tuple[int, int]]  # rows of each member
    Bs: dict[str, Tensor]  # [E, R, O] of each member, the scale inside


@torch.no_grad()
def pack_wide(members: dict[str, Member], dtype: torch.dtype) -> Wide:
    """Lay the members out for one product with A."""
    exact = torch.promote_types(dtype, torch.float32)  # the scale is not to round what B holds
    parts, experts, spans, Bs, column = [], [], {}, {}, 0
    for name, member in members.items():
        own, first = [], 0
        for index, B in enumerate(member.Bs):
            A = member.As[index if len(member.As) > 1 else 0]
            own.append(A.expand(B.shape[0], -1, -1).flatten(0, 1))
            numbers = torch.arange(first, first + B.shape[0], device=B.device)
            experts.append(numbers.repeat_interleave(B.shape[1]))
            first += B.shape[0]
        scaled = [
            (B.to(exact) * s[:, None, None]).flatten(0, 1)
            for B, s in zip(member.Bs, member.scalings, strict=True)
        ]
        parts += own
        Bs[name] = torch.cat(scaled).to(dtype)
        spans[name] = (column, column := column + len(Bs[name]))
    return Wide(torch.cat(parts).to(dtype), torch.cat(experts), spans, Bs)


@torch.no_grad()
def pack_tall(members: dict[str, Member], dtype: torch.dtype) -> Tall:
    """Lay the members out for looking up an expert's rows at once."""
    exact = torch.promote_types(dtype, torch.float32)
    spans, Bs, row = {}, {}, 0
    for name, member in members.items():
        [B], [scaling_E] = member.Bs, member.scalings
        Bs[name] = (B.to(exact) * scaling_E[:, None, None]).to(dtype)
        spans[name] = (row, row := row + B.shape[1])
    A_ERD = torch.cat([member.As[0] for member in members.values()], 1)
    return Tall(A_ERD.to(dtype), spans, Bs)


def gated_products(wide: Wide, x_TD: Tensor, gates_TE: Tensor) -> dict[str, Tensor]:
    """x -> the gated h [T, C] of every member."""
    gated = F.linear(x_TD, wide.A_CD) * gates_TE.index_select(1, wide.expert_C).to(x_TD.dtype)
    return {name: gated[:, begin:end] for name, (begin, end) in wide.spans.items()}


def looked_up_products(
    tall: Tall, x_TD: Tensor, gates_TK: Tensor, experts_TK: Tensor
) -> dict[str, Tensor]:
    """x -> the gated h [T, K, R] of every member, for the chosen experts."""
    A_TKRD = tall.A_ERD[experts_TK]
    h_TKR = torch.matmul(A_TKRD, x_TD[:, None, :, None]).squeeze(-1)
    gated = h_TKR * gates_TK[..., None].to(x_TD.dtype)
    return {name: gated[..., begin:end] for name, (begin, end) in tall.spans.items()}


def add_wide(wide: Wide, name: str, gated_TC: Tensor, y: Tensor) -> Tensor:
    """y [..., O] + gated h B, in place."""
    y.view(-1, y.shape[-1]).addmm_(gated_TC, wide.Bs[name])
    return y


def add_looked_up(
    tall: Tall, name: str, gated_TKR: Tensor, experts_TK: Tensor, y: Tensor
) -> Tensor:
    """y [..., O] + Σ over the chosen experts of gated h B, in place."""
    B_TCO = tall.Bs[name][experts_TK].flatten(1, 2)
    y.view(-1, 1, y.shape[-1]).baddbmm_(gated_TKR.flatten(1)[:, None], B_TCO)
    return y


def _state(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Any, ...]:
    """Changes when one of the tensors is written to or moved."""
    return (dtype, *[(t._version, t.data_ptr()) for t in tensors])
