"""The optimizer over experts and routers, and its state by name."""

import importlib.util
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dylora.fields import shown
from dylora.model import DyLoRA_MoE
from dylora.run_config import TrainConfig
from dylora.storage.tensors import is_plain

STACK = re.compile(r"(.*\.experts_)(\d{1,9})-(\d{1,9})(\.\w+)")  # a parameter's name
STATE = {  # what an optimizer keeps for each parameter, by its class
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Lion": ("exp_avg",),
    "SGD": ("momentum_buffer",),
}


def build_optimizer(model: DyLoRA_MoE, config: TrainConfig) -> Optimizer:
    """What train.optim names, over `parameter_groups`.

    Frozen experts are in it too (without a gradient nothing touches them): they keep their moments.
    Raises ValueError when its package is not installed.
    """
    groups, betas = parameter_groups(model, config), (config.adam_beta1, config.adam_beta2)
    rate = config.learning_rate  # of the groups too; schedules divide min_lr and lr_end by it
    if config.optim == "sgd":
        optimizer: Optimizer = torch.optim.SGD(groups, lr=rate, momentum=config.adam_beta1)
    elif config.optim == "lion":
        optimizer = _lion()(groups, lr=rate, betas=betas)
    else:
        eps = config.adam_epsilon
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)
    optimizer.register_step_post_hook(increment_versions)
    model.experts.attach_optimizer(optimizer)
    return optimizer


def _lion() -> Any:
    if importlib.util.find_spec("lion_pytorch") is None:
        raise ValueError("train.optim is lion, which is not installed: pip install 'dylora[optim]'")
    from lion_pytorch import Lion

    return Lion


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


def empty_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What an optimizer's state of a parameter is before its first step, on the CPU."""
    shapes = {key: () if key == "step" else parameter.shape for key in _state_keys(optimizer)}
    return {key: torch.zeros(shape) for key, shape in shapes.items()}


def _state_keys(optimizer: Optimizer) -> tuple[str, ...]:
    return STATE[type(optimizer).__name__]


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
        if problem := _moments_problem(saved[name], parameter, _state_keys(optimizer)):
            raise ValueError(f"the optimizer state does not fit: {name} {problem}")
        if saved[name]:
            optimizer.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in saved[name].items()
            }


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


def _moments_problem(state: Any, parameter: nn.Parameter, keys: tuple[str, ...]) -> str | None:
    """What is wrong with the saved moments of a parameter; an empty entry is fine."""
    if not isinstance(state, dict) or (state and set(state) != set(keys)):
        found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        return f"has {found}, not {', '.join(keys)}"
    for key, value in state.items():
        shape = torch.Size() if key == "step" else parameter.shape
        least = 0 if key in ("step", "exp_avg_sq") else -math.inf
        if torch.is_tensor(value) and value.shape != shape:
            return f"has {key} of the shape {list(value.shape)}, not {list(shape)}"
        plain = is_plain(value, torch.float32)
        if not plain or not bool((value.isfinite() & (value >= least)).all()):
            return f"has {key}, which must be finite float32" + " of at least 0" * (least == 0)
    return None
