"""Cutting and joining the stacks of a projection, optimizer moments included.

Every function takes the optimizer that holds the parameters, or None. Moments stay with their
rows, bit for bit; a parameter that is replaced leaves the optimizer, and what takes its place is
in the group that held it.

Shape letters: D input width, O output width, E experts, R rank.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dylora.adapters.adapter import Adapter
from dylora.adapters.optimizer_state import check_state, cut_rows, group_of
from dylora.adapters.stack import ExpertStack


def repartition(optimizer: Optimizer | None, adapter: Adapter, wanted: list[list[int]]) -> None:
    """Cut and join an adapter's stacks into these groups of neighbouring experts, as far as its
    layer has them; an expert in none of them is dropped."""
    present = [[expert for expert in group if adapter.has(expert)] for group in wanted]
    wanted = [group for group in present if group]
    if [list(stack.experts) for stack in adapter.stacks] == wanted:
        return
    stacks = []
    for group in wanted:
        kept = [stack for stack in adapter.stacks if list(stack.experts) == group]
        stacks.append(kept[0] if kept else concat(optimizer, adapter, group))
    gone = [stack for stack in adapter.stacks if stack not in stacks]
    adapter.set_stacks(stacks)
    for stack in gone:
        remove_from_optimizer(optimizer, stack)


def split_off(optimizer: Optimizer | None, adapter: Adapter, expert: int) -> None:
    """Give an expert a stack of its own."""
    wanted = []
    for own in (list(stack.experts) for stack in adapter.stacks):
        before, after = [e for e in own if e < expert], [e for e in own if e > expert]
        wanted += [before, [expert], after] if expert in own else [own]
    repartition(optimizer, adapter, wanted)


def replace_stack(
    optimizer: Optimizer | None, adapter: Adapter, old: ExpertStack, new: ExpertStack
) -> None:
    """Put another stack, with fresh moments, in the place of one."""
    add_to_optimizer(optimizer, adapter, new)
    adapter.set_stacks([new if stack is old else stack for stack in adapter.stacks])
    remove_from_optimizer(optimizer, old)


def concat(optimizer: Optimizer | None, adapter: Adapter, group: list[int]) -> ExpertStack:
    """A stack of neighbouring experts of equal rank, with their rows of parameters and moments."""
    pieces = [adapter.stack_of(expert) for expert in group]
    first, places = pieces[0][0], [place for _, place in pieces]

    def rows(tensors: list[Tensor]) -> Tensor:
        cut = [t.detach()[p : p + 1] for t, p in zip(tensors, places, strict=True)]
        return torch.cat(cut)

    olds = {
        name: [getattr(stack, name) for stack, _ in pieces] for name, _ in first.named_parameters()
    }
    joined = type(first)(
        group[0],
        first.rank,
        [float(stack.scaling_E[place]) for stack, place in pieces],
        {name: rows(parameters) for name, parameters in olds.items()},
    ).to(first.scaling_E.dtype)
    for name, parameter in joined.named_parameters():
        like = olds[name][0]
        parameter.requires_grad_(like.requires_grad)
        held = group_of(optimizer, like)
        if optimizer is None or held is None:
            continue
        place = [p is like for p in held["params"]].index(True)
        held["params"].insert(place, parameter)  # order decides how a norm over all is rounded
        states = [optimizer.state.get(old, {}) for old in olds[name]]
        if states[0]:
            for state, old in zip(states, olds[name], strict=True):
                check_state(state, old)
            optimizer.state[parameter] = cut_rows(states, olds[name], places)
    return joined.train(adapter.training)


def add_to_optimizer(optimizer: Optimizer | None, adapter: Adapter, stack: ExpertStack) -> None:
    """A new stack's parameters join the groups of their like, or else the first."""
    like = adapter.stacks[0].scaling_E
    stack.train(adapter.training).to(like.device, like.dtype)
    for name, parameter in stack.named_parameters():
        if optimizer is not None and name not in adapter.fixed:
            groups = (group_of(optimizer, getattr(other, name)) for other in adapter.stacks)
            group = next((found for found in groups if found), optimizer.param_groups[0])
            group["params"].append(parameter)


def remove_from_optimizer(optimizer: Optimizer | None, stack: ExpertStack) -> None:
    """A stack's parameters leave the optimizer."""
    if optimizer is None:
        return
    for parameter in stack.parameters():
        group = group_of(optimizer, parameter)
        if group is not None:
            group["params"] = [p for p in group["params"] if p is not parameter]
        optimizer.state.pop(parameter, None)


def set_requires_grad(parameter: nn.Parameter, trains: bool) -> None:
    """Without a gradient, no optimizer touches a parameter: not by decay, not by momentum."""
    parameter.requires_grad_(trains)
    if not trains:
        parameter.grad = None
