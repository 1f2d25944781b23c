"""The optimizer over experts and routers, and its state by name."""

import importlib.util
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dylora.fields import is_number, shown
from dylora.model import DyLoRA_MoE
from dylora.run_config import TrainConfig
from dylora.storage.tensors import is_plain
from dylora.training.adafactor import Adafactor

STACK = re.compile(r"(.*\.experts_)(\d{1,9})-(\d{1,9})(\.\w+)")  # a parameter's name
NONNEGATIVE = ("step", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
PACKAGES = {"lion": "lion_pytorch", "schedule_free": "schedulefree"}  # of dylora[optim]


def build_optimizer(model: DyLoRA_MoE, config: TrainConfig) -> Optimizer:
    """What train.optim names, over `parameter_groups`.

    Frozen experts are in it too (without a gradient nothing touches them): they keep their moments.
    Raises ValueError when its package is not installed.
    """
    package = PACKAGES.get(config.optim)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"train.optim is {config.optim}, which is not installed: pip install 'dylora[optim]'"
        )
    groups, betas = parameter_groups(model, config), (config.adam_beta1, config.adam_beta2)
    # Of the groups too, each with its own; schedules divide min_lr and lr_end by it.
    rate = config.learning_rate
    if config.optim == "sgd":
        optimizer: Optimizer = torch.optim.SGD(groups, lr=rate, momentum=config.adam_beta1)
    elif config.optim == "lion":
        from lion_pytorch import Lion

        optimizer = Lion(groups, lr=rate, betas=betas)
    elif config.optim == "adafactor":
        optimizer = Adafactor(groups, lr=rate)
    elif config.optim == "schedule_free":
        from dylora.training.schedule_free import ScheduleFree

        optimizer = ScheduleFree(groups, lr=rate, betas=betas, eps=config.adam_epsilon)
    else:
        eps = config.adam_epsilon
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)
    optimizer.register_step_post_hook(increment_versions)
    model.experts.attach_optimizer(optimizer)
    return optimizer


def settle(optimizer: Optimizer) -> None:
    """Let the parameters be what is evaluated and saved: with schedule_free their averages, which
    are not what it trains; with any other they are that anyway."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()  # type: ignore[operator]


def unsettle(optimizer: Optimizer) -> None:
    """Let the parameters be what is trained again, bit for bit."""
    if hasattr(optimizer, "train"):
        optimizer.train()  # type: ignore[operator]


@contextmanager
def settled(optimizer: Optimizer) -> Iterator[None]:
    """Within, the parameters are what is evaluated and saved."""
    settle(optimizer)
    try:
        yield
    finally:
        unsettle(optimizer)


def increment_versions(optimizer: Optimizer, *_: Any) -> None:
    """A fused step does not raise the tensor versions by which autograd and caches see a write."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def parameter_groups(model: DyLoRA_MoE, config: TrainConfig) -> list[dict[str, Any]]:
    """The experts' matrices (three dimensions, stacked), which decay; magnitudes and biases, which
    do not; routers. Groups without parameters are left out.

    With lora_plus the B's are a group of their own, whose rate is lora_plus_ratio times that of the
    A's (Hayou et al. 2024, arXiv:2402.12354).
    """
    experts = expert_parameters(model)
    matrices = {name: p for name, p in experts.items() if p.ndim == 3}
    Bs = [p for name, p in matrices.items() if config.optim == "lora_plus" and name.endswith("_B")]
    held = {id(p) for p in Bs}
    routers = [parameter for _, parameter in model.router_parameters()]
    rate, router_rate = config.learning_rate, config.router_learning_rate
    rows = (
        ([p for p in matrices.values() if id(p) not in held], rate, config.weight_decay),
        (Bs, rate * config.lora_plus_ratio, config.weight_decay),
        ([p for p in experts.values() if p.ndim < 3], rate, 0.0),
        (routers, router_rate or rate, 0.0),
    )
    return [{"params": p, "lr": lr, "weight_decay": decay} for p, lr, decay in rows if p]


def regroup(optimizer: Optimizer, model: DyLoRA_MoE, config: TrainConfig) -> None:
    """Let an optimizer hold the parameters of a model whose experts have changed, without moments.

    For a run that resumes after its pool has changed; a live one keeps its moments
    (`ExpertManager.attach_optimizer`).
    """
    groups = zip(optimizer.param_groups, parameter_groups(model, config), strict=True)
    for group, wanted in groups:
        group["params"] = wanted["params"]
    optimizer.state.clear()
    model.experts.attach_optimizer(optimizer)


def expert_parameters(model: DyLoRA_MoE) -> dict[str, nn.Parameter]:
    """The experts' parameters that are ever trained, by name: with freeze_A all but the A's."""
    fixed = ("lora_A", "shared_A") if model.config.freeze_A else ()
    return {name: p for name, p in model.named_expert_parameters() if not name.endswith(fixed)}


def named_parameters(model: DyLoRA_MoE) -> dict[str, nn.Parameter]:
    """All parameters of the optimizer by name."""
    return expert_parameters(model) | dict(model.router_parameters())


def state_shapes(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, torch.Size | None]:
    """What an optimizer's state of a parameter is in a checkpoint, by its class; None: a number."""
    full, one = parameter.shape, torch.Size()
    kinds: dict[str, dict[str, torch.Size | None]] = {
        "AdamW": {"step": one, "exp_avg": full, "exp_avg_sq": full},
        "Adafactor": {"step": None, "exp_avg_sq": full},
        "Lion": {"exp_avg": full},
        "ScheduleFree": {
            "y": full,
            "z": full,
            "exp_avg_sq": full,
            "k": None,
            "weight_sum": None,
            "lr_max": None,
        },
        "SGD": {"momentum_buffer": full},
    }
    found = kinds[type(optimizer).__name__]
    if isinstance(optimizer, Adafactor) and len(full) > 2:
        rows, columns = full[:-1], full[:-2] + full[-1:]
        found = {"step": None, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
    return found


def empty_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer's state of a parameter is before its first step, on the CPU."""
    shapes = state_shapes(optimizer, parameter).items()
    return {key: 0.0 if shape is None else torch.zeros(shape) for key, shape in shapes}


def state_by_name(optimizer: Optimizer, model: DyLoRA_MoE) -> dict[str, Any]:
    """Moments keyed by parameter name: by position, two experts of one shape could be swapped.

    A parameter that has not been trained yet has an empty entry.
    """
    return {
        name: dict(optimizer.state.get(parameter, {}))
        for name, parameter in named_parameters(model).items()
    }


def load_state_by_name(optimizer: Optimizer, model: DyLoRA_MoE, saved: dict[str, Any]) -> None:
    """Put copies of saved moments back, those of padded stacks cut to the experts' own ranks.

    Raises ValueError naming a parameter that has none, is unknown, or whose moments are not finite
    float32 of its shape.
    """
    parameters = named_parameters(model)
    if not isinstance(saved, dict):
        raise ValueError(f"the optimizer state does not fit: it is a {type(saved).__name__}")
    saved = _cut_padded(saved, parameters)
    for name in [*(parameters.keys() - saved.keys()), *(saved.keys() - parameters.keys())]:
        raise ValueError(f"the optimizer state does not fit: {shown(name)} is on one side only")
    for name, parameter in parameters.items():
        if problem := _moments_problem(saved[name], state_shapes(optimizer, parameter)):
            raise ValueError(f"the optimizer state does not fit: {name} {problem}")
        if saved[name]:
            optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) if torch.is_tensor(value) else value
                for key, value in saved[name].items()
            }
    unsettle(optimizer)


def _cut_padded(saved: dict[str, Any], parameters: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Moments by today's stacks: earlier ones held experts of unequal rank, padded with zeros to
    the largest. What cannot be cut so stays as it is."""
    stacks: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for name in parameters:
        if (match := STACK.fullmatch(name)) is not None:
            stacks.setdefault((match[1], match[4]), []).append((int(match[2]), int(match[3]), name))
    found: dict[str, Any] = {}
    for name, state in saved.items():
        match = STACK.fullmatch(name) if isinstance(name, str) else None
        if match is None or not isinstance(state, dict):
            found[name] = state
            continue
        first, last = int(match[2]), int(match[3])
        parts = [s for s in stacks.get((match[1], match[4]), ()) if first <= s[0] and s[1] <= last]
        if sum(end - begin + 1 for begin, end, _ in parts) != last - first + 1:
            found[name] = state
            continue
        for begin, end, part in parts:
            rows = slice(begin - first, end - first + 1)
            found[part] = {
                key: _cut(value, last - first + 1, rows, parameters[part].shape)
                for key, value in state.items()
            }
    return found


def _cut(value: Any, count: int, rows: slice, shape: torch.Size) -> Any:
    """Some of the `count` rows of a saved moment, without padding beyond this shape."""
    if not is_plain(value, torch.float32) or value.ndim != len(shape) or len(value) != count:
        return value
    cut, rank = value[rows], shape[1]
    return cut[:, :rank].contiguous() if len(shape) == 3 and not cut[:, rank:].any() else cut


def _moments_problem(state: Any, shapes: dict[str, torch.Size | None]) -> str | None:
    """What is wrong with the saved moments of a parameter; an empty entry is fine."""
    if not isinstance(state, dict) or (state and set(state) != set(shapes)):
        found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        return f"has {found}, not {', '.join(shapes)}"
    for key, value in state.items():
        shape = shapes[key]
        if shape is None:
            if not is_number(value, 0):
                return f"has {key}, which must be a number of at least 0"
            continue
        least = 0 if key in NONNEGATIVE else -math.inf
        if torch.is_tensor(value) and value.shape != shape:
            return f"has {key} of the shape {list(value.shape)}, not {list(shape)}"
        plain = is_plain(value, torch.float32)
        if not plain or not bool((value.isfinite() & (value >= least)).all()):
            return f"has {key}, which must be finite float32" + " of at least 0" * (least == 0)
    return None
