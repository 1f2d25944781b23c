"""The optimizer over experts and routers, and its state by name."""

import importlib.util
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dylora.fields import is_number, shown
from dylora.model import DyLoRA_MoE
from dylora.run_config import TrainConfig
from dylora.storage.tensors import is_plain
from dylora.training.adafactor import Adafactor
from dylora.training.by_matrix import ByMatrix
from dylora.training.muon import Muon

STACK = re.compile(r"(.*\.experts_)(\d{1,9})-(\d{1,9})(\.\w+)")  # a parameter's name
NONNEGATIVE = (
    *("step", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"),
    *("exp_avg_scale", "exp_avg_sq_scale"),
)
PACKAGES = {  # of dylora[optim]
    "lion": "lion_pytorch",
    "schedule_free": "schedulefree",
    "adamw_8bit": "bitsandbytes",
}


def build_optimizer(model: DyLoRA_MoE, config: TrainConfig) -> Optimizer:
    """What train.optim names, with the experts' life.

    Frozen experts are in it too (without a gradient nothing touches them): they keep their moments.
    Raises ValueError when its package is not installed.
    """
    optimizer = make_optimizer(model, config)
    optimizer.register_step_post_hook(increment_versions)
    model.experts.attach_optimizer(optimizer)
    return optimizer


def make_optimizer(model: DyLoRA_MoE, config: TrainConfig) -> Optimizer:
    """What train.optim names, over `parameter_groups`. Raises ValueError as `build_optimizer`."""
    package = PACKAGES.get(config.optim)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"train.optim is {config.optim}, which is not installed: pip install 'dylora[optim]'"
        )
    groups, betas = parameter_groups(model, config), (config.adam_beta1, config.adam_beta2)
    adam = {"betas": betas, "eps": config.adam_epsilon}
    # Of the groups too, each with its own; schedules divide min_lr and lr_end by it.
    rate = config.learning_rate
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.adam_beta1)
    if config.optim == "adafactor":
        return Adafactor(groups, lr=rate)
    if config.optim == "muon":
        return Muon(groups, lr=rate, **adam)
    if config.optim == "lion":
        from lion_pytorch import Lion

        return Lion(groups, lr=rate, betas=betas)
    if config.optim == "schedule_free":
        from dylora.training.schedule_free import ScheduleFree

        return ScheduleFree(groups, lr=rate, **adam)
    if config.optim == "adamw_8bit":
        from dylora.training.adamw_8bit import AdamW8bit

        return AdamW8bit(groups, lr=rate, **adam)
    return torch.optim.AdamW(groups, lr=rate, fused=True, **adam)


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


def state_like(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor | None]:
    """What an optimizer's state of a parameter is in a checkpoint: shapes and types, as tensors
    without values; None: a number."""
    kind, full = type(optimizer).__name__, torch.empty(parameter.shape, device="meta")
    if isinstance(optimizer, ByMatrix):
        if full.ndim > 2:
            state = optimizer.new_state(full)
            return {key: like if torch.is_tensor(like) else None for key, like in state.items()}
        kind = "AdamW"
    if kind == "Adafactor" and full.ndim > 2:
        rows, columns = full[..., 0], full[..., 0, :]
        return {"step": None, "exp_avg_sq_row": rows, "exp_avg_sq_col": columns}
    kinds: dict[str, dict[str, Tensor | None]] = {
        "AdamW": {"step": full.new_empty(()), "exp_avg": full, "exp_avg_sq": full},
        "Adafactor": {"step": None, "exp_avg_sq": full},
        "Lion": {"exp_avg": full},
        "ScheduleFree": {
            "y": full,
            "z": full,
            "exp_avg_sq": full,
            **dict.fromkeys(("k", "weight_sum", "lr_max")),
        },
        "SGD": {"momentum_buffer": full},
    }
    return kinds[kind]


def empty_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer's state of a parameter is before its first step, on the CPU."""
    state = state_like(optimizer, parameter).items()
    return {k: 0.0 if like is None else torch.zeros_like(like, device="cpu") for k, like in state}


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

    Raises ValueError naming a parameter that has none, is unknown, or whose moments are not of its
    shape and type, or not finite.
    """
    parameters = named_parameters(model)
    if not isinstance(saved, dict):
        raise ValueError(f"the optimizer state does not fit: it is a {type(saved).__name__}")
    saved = _cut_padded(saved, parameters)
    for name in [*(parameters.keys() - saved.keys()), *(saved.keys() - parameters.keys())]:
        raise ValueError(f"the optimizer state does not fit: {shown(name)} is on one side only")
    for name, parameter in parameters.items():
        if problem := _moments_problem(saved[name], state_like(optimizer, parameter)):
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


def _moments_problem(state: Any, likes: dict[str, Tensor | None]) -> str | None:
    """What is wrong with the saved moments of a parameter; an empty entry is fine."""
    if not isinstance(state, dict) or (state and set(state) != set(likes)):
        found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        return f"has {found}, not {', '.join(likes)}"
    for key, value in state.items():
        like, least = likes[key], 0 if key in NONNEGATIVE else -math.inf
        if like is None:
            if not is_number(value, 0):
                return f"has {key}, which must be a number of at least 0"
        elif torch.is_tensor(value) and value.shape != like.shape:
            return f"has {key} of the shape {list(value.shape)}, not {list(like.shape)}"
        elif like.dtype == torch.uint8:
            if not is_plain(value, torch.uint8):
                return f"has {key}, which must be uint8"
        elif not (is_plain(value, torch.float32) and (value.isfinite() & (value >= least)).all()):
            return f"has {key}, which must be finite float32" + " of at least 0" * (least == 0)
    return None
