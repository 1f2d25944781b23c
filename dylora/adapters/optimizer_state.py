"""What an optimizer keeps for a parameter, cut by expert and grown by a row.

Its state can be taken along where it has a number for every element (or for every row, column or
block of each expert's matrix, or one for all), its step on one expert does not look at the others
of the tensor, and it is known what a new expert begins with.

Shape letters: D input width, E experts, R rank.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# By the names that torch and the common optimizers beside it use: what a new row begins with.
ZEROS = {"exp_avg", "momentum_buffer", "grad_avg"}
# With squares of 0 beside an old step count, the first updates would be several times too large.
FACTORS = {"exp_avg_sq_row", "exp_avg_sq_col"}  # [E, R] and [E, D] of a stack [E, R, D]
MEANS = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "exp_inf", *FACTORS}
SCALES = {"exp_avg_scale", "exp_avg_sq_scale"}  # [E, N] of blocks of each matrix of a stack
WEIGHTS = {"z", "y"}  # other values of the parameter: those of its own new row
ADVICE = "use an optimizer with moments of every element, such as AdamW, Lion or SGD"


def group_of(optimizer: Optimizer | None, parameter: nn.Parameter) -> dict[str, Any] | None:
    """The parameter group that holds a parameter."""
    for group in optimizer.param_groups if optimizer else []:
        if any(p is parameter for p in group["params"]):
            return group
    return None


def check_held_once(optimizer: Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raises ValueError unless each of these that is trained is in the optimizer exactly once."""
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    for name, parameter in named:
        times = held[id(parameter)]
        if times > 1 or (parameter.requires_grad and times == 0):
            raise ValueError(f"the optimizer holds {name} {times} times, not once")


def is_by_row(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state has the experts' rows: a number for every element, or for every row, column
    or block of each matrix of a stack."""
    if key in SCALES:
        return torch.is_tensor(value) and value.ndim == 2 and len(value) == len(parameter)
    shapes, shape = [parameter.shape], parameter.shape
    if key in FACTORS and parameter.ndim > 2:
        shapes += [shape[:-1], shape[:-2] + shape[-1:]]
    return torch.is_tensor(value) and value.shape in shapes


def check_state(state: dict[str, Any], parameter: Tensor) -> None:
    """Raises ValueError for a state that cannot be cut by expert, or not grown by one."""
    for key, value in state.items():
        if is_by_row(key, value, parameter):
            if key not in ZEROS | MEANS | WEIGHTS | SCALES:
                raise ValueError(
                    f"the optimizer keeps {key!r}, of which it is not known what a new expert "
                    f"begins with: {ADVICE}"
                )
        elif torch.is_tensor(value) and value.numel() != 1:
            raise ValueError(
                f"the optimizer's state {key!r} has the shape {list(value.shape)}, which cannot be "
                f"cut by expert: {ADVICE}"
            )


def cut_rows(states: list[dict[str, Any]], parameters: list[Tensor], places: list[int]) -> Any:
    """The state of a tensor that is made of one row of each of these parameters; copies."""
    first = {}
    for key, value in states[0].items():
        if is_by_row(key, value, parameters[0]):
            rows = [s[key][p : p + 1] for s, p in zip(states, places, strict=True)]
            first[key] = torch.cat(rows)
        else:
            first[key] = value.clone() if torch.is_tensor(value) else value
    return first


def grow(optimizer: Optimizer | None, old: nn.Parameter, new: nn.Parameter) -> None:
    """A router's parameter has grown by a row: its moments do, too."""
    group = group_of(optimizer, old)
    if group is None or optimizer is None:
        return
    group["params"] = [new if p is old else p for p in group["params"]]
    state = optimizer.state.pop(old, None)
    if not state:
        return
    check_state(state, old)
    for key, value in state.items():
        if is_by_row(key, value, old):
            row = value.mean(0, keepdim=True) if key in MEANS else torch.zeros_like(value[:1])
            row = new.detach()[len(old) :] if key in WEIGHTS else row
            state = state | {key: torch.cat([value, row])}
    optimizer.state[new] = state


# Before anything is trained


def check_separable(
    optimizer: Optimizer, stacked: Iterable[nn.Parameter], others: Iterable[nn.Parameter]
) -> None:
    """Raises ValueError where this optimizer's state will not be one that can be taken along.

    A copy of it steps small tensors of the same dimensions, as its own state is empty at first: two
    experts together (of `stacked`, parameters with the experts in their first dimension) must move
    as each by itself does, with its rows of their state. Of `others`, which are never cut, only
    the state is looked at.
    """
    for parameters, is_cut in ((stacked, True), (others, False)):
        seen = set()
        for parameter in parameters:
            group, state = group_of(optimizer, parameter), optimizer.state.get(parameter)
            if state:
                check_state(state, parameter)
            if group is None or (id(group), parameter.ndim) in seen:
                continue
            seen.add((id(group), parameter.ndim))
            _check_steps(optimizer, group, parameter, is_cut)


def _check_steps(
    optimizer: Optimizer, group: dict[str, Any], like: nn.Parameter, is_cut: bool
) -> None:
    kind = type(optimizer).__name__
    # Optimizers of 8 bits keep small tensors in 32, so each of the two has 4096 elements.
    shape = {1: (8192,), 2: (2, 4096)}.get(like.ndim, (2, 8, 512))
    ramp = torch.arange(8192, dtype=like.dtype, device=like.device).view(shape)  # no random state
    size = 1 + ramp / 4096  # of one expert 1 to 2, of the other 2 to 3
    weights, gradients = size * ramp.cos(), [size**2 * ramp.sin(), ramp.cos() / size]
    try:
        [whole], state = _stepped(optimizer, group, [weights], [{}], [gradients[0]])
        check_state(state[0], whole)
        if not is_cut:
            return
        cut = [cut_rows(state, [whole], [place]) for place in (0, 1)]
        [twice], _ = _stepped(optimizer, group, [whole], state, [gradients[1]])
        rows, _ = _stepped(optimizer, group, list(whole.split(1)), cut, list(gradients[1].split(1)))
    except ValueError:
        raise
    except Exception as error:  # of any kind: it is somebody else's code
        raise ValueError(
            f"{kind} cannot take experts along ({type(error).__name__}: {error}): {ADVICE}"
        ) from error
    if not torch.allclose(torch.cat(rows), twice, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"{kind} moves an expert by what the others of its tensor do, so its state cannot be "
            f"cut by expert: {ADVICE}"
        )


def _stepped(
    optimizer: Optimizer,
    group: dict[str, Any],
    weights: list[Tensor],
    states: list[dict[str, Any]],
    gradients: list[Tensor],
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Weights and states after one step of a copy of the optimizer which holds these alone."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps them
    copy = object.__new__(type(optimizer))
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    vars(copy).update(vars(optimizer) | {hook: OrderedDict() for hook in hooks})
    rate = {"lr": 0.01}  # a schedule may begin with 0
    vars(copy)["param_groups"] = [group | rate | {"params": parameters}]
    copied = [
        {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
        for state in states
    ]
    pairs = zip(parameters, copied, strict=True)
    vars(copy)["state"] = defaultdict(dict, {p: state for p, state in pairs if state})
    before = dict(copy.param_groups[0])
    type(copy).step(copy)  # of the class: a schedule counts the steps of the instance
    for key, value in copy.param_groups[0].items():
        if value is not before[key] and value != before[key]:
            raise ValueError(
                f"{type(optimizer).__name__} keeps {key!r} for a whole group of parameters, for an "
                f"expert that comes later as well: {ADVICE}"
            )
    return [p.detach() for p in parameters], [dict(copy.state.get(p, {})) for p in parameters]
