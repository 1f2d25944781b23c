"""The table of experts: who they are, and which of them lie in one tensor."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from dylora.adapters.adapter import Adapter
from dylora.adapters.optimizer_state import check_state, is_by_row
from dylora.config import MoELoraConfig
from dylora.fields import is_name, shown

State = Literal["active", "frozen", "retired"]


@dataclass
class Expert:
    """One row of the table; a checkpoint's config.json holds it as it is."""

    name: str
    rank: int
    alpha: float
    state: State = "active"  # active: trained; frozen: computed but never changed; retired: gone
    enabled: bool = True  # False: set_active_expert chose another one
    skill: str | None = None
    steps: int = 0  # optimizer steps that could change it
    stack: int = 0  # neighbours of one number and one rank lie in one tensor
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_trained(self) -> bool:
        """Whether an optimizer step changes it."""
        return self.state == "active" and self.enabled


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
        state = row.state if row.enabled or row.state == "retired" else "off"
        line = f"{row.name:10} {state:8} {row.rank:4} {row.alpha:6g} {mature:8.3f} {row.steps:7}"
        lines.append(line + (f"  {row.skill}" if row.skill else ""))
    return "\n".join(lines)


def beginning_with(config: MoELoraConfig, table: list[Expert]) -> dict[str, Any]:
    """The settings of a mixture that begins with the experts of this table."""
    lists = {"expert_ranks": [r.rank for r in table], "expert_alphas": [r.alpha for r in table]}
    given = {name: values for name, values in lists.items() if getattr(config, name) is not None}
    return {"num_experts": len(table)} | given


def check_new(
    config: MoELoraConfig, rank: int, alpha: float, skill: str | None, share: float
) -> None:
    """Raises ValueError for an expert that cannot be created."""
    if not config.use_moe_routing:
        raise ValueError("use_moe_routing is false: a plain LoRA has one expert")
    check_equal_layers(config, "created")
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank is {rank} and alpha {alpha}, but both must be above 0")
    if skill is not None and not is_name(skill):
        raise ValueError(f"skill is {shown(skill)}, but must be a short text of one line")
    if config.share_A and rank != config.r:
        raise ValueError(f"rank is {rank}, but with share_A it must be r ({config.r})")
    if config.init_lora_weights == "orthogonal" and rank % 2:
        raise ValueError(f"rank is {rank}, but must be even for orthogonal values")
    if not 0 < share < 1:
        raise ValueError(f"share is {share}, but must lie between 0 and 1")


def check_merge(
    table: list[Expert],
    config: MoELoraConfig,
    evidence_E: Tensor,
    pair: tuple[int, int],
    rank: int | None,
    shares: tuple[float, float] | None,
) -> tuple[int, tuple[float, float]]:
    """The rank and the shares of a merge. Raises ValueError for one that cannot be."""
    check_equal_layers(config, "merged")
    i, j = pair
    if i == j:
        raise ValueError(f"expert {i} cannot be merged with itself")
    if table[i].state != table[j].state:
        raise ValueError(
            f"expert {i} is {table[i].state} and expert {j} {table[j].state}: "
            "freeze or unfreeze one of them first"
        )
    rank = rank or max(table[i].rank, table[j].rank)
    if config.share_A and rank != config.r:
        raise ValueError(f"rank is {rank}, but with share_A it must be r ({config.r})")
    sums = (float(evidence_E[i]), float(evidence_E[j]))
    if shares is None:
        shares = sums if sum(sums) > 0 else (1.0, 1.0)
    if min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise ValueError(f"shares are {shares}, but must be two weights of at least 0")
    return rank, (shares[0] / sum(shares), shares[1] / sum(shares))


def check_equal_layers(config: MoELoraConfig, done: str) -> None:
    """Raises ValueError where layers differ in which experts they have: nothing may change that."""
    if config.experts_per_layer is not None:
        raise ValueError(f"no expert can be {done}: experts_per_layer says which layer has which")


def check_left(adapters: Mapping[str, Adapter], left: list[int]) -> None:
    """Raises ValueError where a projection would be left without an expert."""
    for path, adapter in adapters.items():
        if not any(map(adapter.has, left)):
            where = f" at {path}" if left else ""
            raise ValueError(f"the last expert{where} cannot be retired")


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
    number, previous, ages = -1, None, {}
    for index, row in enumerate(table):
        if row.state == "retired":
            row.stack = -1
            continue
        before, ages = ages, _ages(adapters, optimizer, index)
        key = (row.is_trained, row.stack if optimizer is None else None)
        alike = all(before.get(path) == age for path, age in ages.items())
        number += not (alike and previous == (index - 1, key))
        row.stack, previous = number, (index, key)
    return groups_of(table)


def _ages(
    adapters: Iterable[Adapter], optimizer: Optimizer | None, expert: int
) -> dict[str, tuple[Any, ...]]:
    """What the parameters of a stack must have in common, by the projections that have the
    expert."""
    found = {}
    for adapter in adapters:
        if not adapter.has(expert):
            continue
        stack, _ = adapter.stack_of(expert)
        ages = []
        for parameter in stack.parameters():
            ages.append(parameter.shape[1:])
            state = {} if optimizer is None else optimizer.state.get(parameter, {})
            check_state(state, parameter)
            for name, value in state.items():
                if is_by_row(name, value, parameter):
                    # One without a momentum cannot join those with one.
                    ages.append(name)
                else:
                    ages.append((name, float(value) if torch.is_tensor(value) else value))
        found[adapter.path] = tuple(ages)
    return found
