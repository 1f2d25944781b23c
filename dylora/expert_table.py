"""The table of experts: who they are, and which of them lie in one tensor."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from dylora.adapters.adapter import Adapter

State = Literal["active", "frozen", "retired"]


@dataclass
class Expert:
    """One row of the table; a checkpoint's config.json holds it as it is."""

    name: str
    rank: int
    alpha: float
    state: State = "active"  # active: trained; frozen: computed but never changed; retired: gone
    takes_part: bool = True  # False: set_active_expert chose another one
    skill: str | None = None
    steps: int = 0  # optimizer steps that could change it
    stack: int = 0  # neighbours of one number and one rank lie in one tensor
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer step changes it."""
        return self.state == "active" and self.takes_part


class MergeReport(NamedTuple):
    """What became of two experts."""

    expert: int  # the place of the merged one
    retired: int
    rank: int
    shares: tuple[float, float]  # how much each counted
    errors: dict[str, float]  # by projection: ‖wanted - kept‖ / ‖wanted‖, Frobenius

    @property
    def worst(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values())


def format_table(table: list[Expert], maturity_E: Tensor) -> str:
    """State, rank, alpha, maturity, steps trained and skill of each."""
    lines = [f"{'expert':10} {'state':8} {'rank':>4} {'alpha':>6} {'maturity':>8} {'steps':>7}"]
    for index, row in enumerate(table):
        mature = float(maturity_E[index])
        state = row.state if row.takes_part or row.state == "retired" else "off"
        line = f"{row.name:10} {state:8} {row.rank:4} {row.alpha:6g} {mature:8.3f} {row.steps:7}"
        lines.append(line + (f"  {row.skill}" if row.skill else ""))
    return "\n".join(lines)


def groups_of(table: list[Expert]) -> list[list[int]]:
    """The live experts by stack, in order."""
    groups: list[list[int]] = []
    for index, row in enumerate(table):
        if row.state == "retired":
            continue
        before = table[index - 1]
        same = (before.stack, before.rank) == (row.stack, row.rank)
        if groups and groups[-1][-1] == index - 1 and same:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def number_stacks(
    table: list[Expert], adapters: Iterable[Adapter], optimizer: Optimizer | None
) -> list[list[int]]:
    """Which experts share a stack from here on: neighbours that are both trained or neither, of one
    rank and one age.

    Without an optimizer stacks are split but never joined, so that a parameter which an optimizer
    elsewhere may hold is not replaced without need.
    """
    number, previous = -1, None
    for index, row in enumerate(table):
        if row.state == "retired":
            row.stack = -1
            continue
        before = row.stack if optimizer is None else None
        key = (row.is_trained, before, _age(adapters, optimizer, index))
        if previous is None or previous != (index - 1, key):
            number += 1
        row.stack, previous = number, (index, key)
    return groups_of(table)


def _age(adapters: Iterable[Adapter], optimizer: Optimizer | None, expert: int) -> tuple[Any, ...]:
    """What the parameters of a stack must have in common."""
    ages = []
    for adapter in adapters:
        stack, _ = adapter.stack_of(expert)
        for parameter in stack.parameters():
            ages.append(parameter.shape[1:])
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            ages += [
                (name, float(value) if torch.is_tensor(value) else value)
                for name, value in state.items()
                if not torch.is_tensor(value) or value.numel() == 1
            ]
    return tuple(ages)
