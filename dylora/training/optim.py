"""AdamW over experts and routers, the learning-rate schedule, and their state by name."""

import math
from typing import Any

import torch
from torch import nn

from dylora.fields import shown
from dylora.model import DyLoRA_MoE
from dylora.run_config import TrainConfig
from dylora.storage.tensors import is_plain

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's, for each parameter


def build_optimizer(model: DyLoRA_MoE, config: TrainConfig) -> torch.optim.AdamW:
    """Groups: the experts' matrices (three dimensions, stacked), which decay; magnitudes and
    biases, which do not; routers.

    Frozen experts are in it too (without a gradient nothing touches them): they keep their moments.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,  # of the groups too; schedules divide min_lr and lr_end by it
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    optimizer.register_step_post_hook(note_the_change)
    model.experts.attach_optimizer(optimizer)
    return optimizer


def note_the_change(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """A fused step leaves the versions of what it changes as they were, by which packed matrices
    and autograd know a change."""
    for group in optimizer.param_groups:
        torch.autograd.graph.increment_version(group["params"])


def parameter_groups(model: DyLoRA_MoE, config: TrainConfig) -> list[dict[str, Any]]:
    """The groups of `build_optimizer`; those without parameters are left out."""
    experts = expert_parameters(model)
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in experts.values() if p.ndim == 3],
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {
            "params": [p for p in experts.values() if p.ndim < 3],
            "lr": config.learning_rate,
            "weight_decay": 0.0,
        },
        {
            "params": [parameter for _, parameter in model.router_parameters()],
            "lr": config.router_learning_rate or config.learning_rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


def regroup(optimizer: torch.optim.Optimizer, model: DyLoRA_MoE, config: TrainConfig) -> None:
    """Let an optimizer hold the parameters of a model whose experts have changed, without moments.

    For a run that resumes after a growth; a live one takes the optimizer along (`follow`).
    """
    groups = zip(optimizer.param_groups, parameter_groups(model, config), strict=True)
    for group, wanted in groups:
        group["params"] = wanted["params"]
    optimizer.state.clear()
    model.experts.attach_optimizer(optimizer)


def expert_parameters(model: DyLoRA_MoE) -> dict[str, nn.Parameter]:
    """The experts' parameters that are ever trained, by name: with freeze_A all but the A's."""
    fixed = ("lora_A", "shared_A") if model.config.freeze_A else ()
    return {name: p for name, p in model.expert_parameters() if not name.endswith(fixed)}


def named_parameters(model: DyLoRA_MoE) -> dict[str, nn.Parameter]:
    """All parameters of the optimizer by name."""
    return expert_parameters(model) | dict(model.router_parameters())


def state_by_name(optimizer: torch.optim.Optimizer, model: DyLoRA_MoE) -> dict[str, Any]:
    """Moments keyed by parameter name: by position, two experts of one shape could be swapped.

    A parameter that has not been trained yet has an empty entry.
    """
    return {
        name: dict(optimizer.state.get(parameter, {}))
        for name, parameter in named_parameters(model).items()
    }


def load_state_by_name(
    optimizer: torch.optim.Optimizer, model: DyLoRA_MoE, saved: dict[str, Any]
) -> None:
    """Put copies of saved moments back.

    Raises ValueError naming a parameter that has none, is unknown, or whose moments are not finite
    float32 of its shape.
    """
    parameters = named_parameters(model)
    if not isinstance(saved, dict):
        raise ValueError(f"the optimizer state does not fit: it is a {type(saved).__name__}")
    for name in [*(parameters.keys() - saved.keys()), *(saved.keys() - parameters.keys())]:
        raise ValueError(f"the optimizer state does not fit: {shown(name)} is on one side only")
    for name, parameter in parameters.items():
        moved, state = {}, saved[name]
        if not isinstance(state, dict) or (state and set(state) != MOMENTS):
            found = ", ".join(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
            raise ValueError(
                f"the optimizer state does not fit: {name} has {found}, not {', '.join(MOMENTS)}"
            )
        for key, value in state.items():
            shape = torch.Size() if key == "step" else parameter.shape
            if torch.is_tensor(value) and value.shape != shape:
                raise ValueError(
                    f"the optimizer state does not fit: {key} of {name} has the shape "
                    f"{list(value.shape)}, not {list(shape)}"
                )
            least = -math.inf if key == "exp_avg" else 0
            if not is_plain(value, torch.float32) or not bool(
                (value.isfinite() & (value >= least)).all()
            ):
                raise ValueError(
                    f"the optimizer state does not fit: {key} of {name} must be finite float32"
                    + (" of at least 0" if least == 0 else "")
                )
            moved[key] = value.to(parameter.device, copy=True)
        if moved:
            optimizer.state[parameter] = moved
