"""AdamW over experts and routers, the learning-rate schedule, and their state by name."""

from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from dylora.config import TrainConfig
from dylora.model import DyLoRA_MoE

FOLLOWS_VALIDATION = ("reduce_lr_on_plateau", "greedy")  # stepped with each validation loss


def build_optimizer(model: DyLoRA_MoE, config: TrainConfig) -> torch.optim.AdamW:
    """Two groups: the stacks A and B, which decay, and the routers, which do not.

    Marks these parameters trainable; everything else stays frozen.
    """
    experts = [parameter for _, parameter in model.expert_parameters()]
    routers = [parameter for _, parameter in model.router_parameters()]
    groups: list[dict[str, Any]] = [
        {"params": experts, "lr": config.learning_rate, "weight_decay": config.weight_decay}
    ]
    if routers:
        rate = config.router_learning_rate or config.learning_rate
        groups.append({"params": routers, "lr": rate, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=experts[0].is_cuda or None,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> LRScheduler:
    """A schedule of transformers over `steps` optimizer steps.

    Raises ValueError when lr_scheduler_kwargs do not fit the schedule.
    """
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"train.lr_scheduler_kwargs {config.lr_scheduler_kwargs} do not fit "
            f"lr_scheduler_type {config.lr_scheduler_type!r}: {error}"
        ) from error


def named_parameters(model: DyLoRA_MoE) -> dict[str, nn.Parameter]:
    """All trainable parameters by name, in the optimizer's order."""
    return dict([*model.expert_parameters(), *model.router_parameters()])


def state_by_name(optimizer: torch.optim.Optimizer, model: DyLoRA_MoE) -> dict[str, Any]:
    """Moments keyed by parameter name: by position, two experts of one shape could be swapped."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in named_parameters(model).items()
        if parameter in optimizer.state
    }


def load_state_by_name(
    optimizer: torch.optim.Optimizer, model: DyLoRA_MoE, saved: dict[str, Any]
) -> None:
    """Put saved moments back. Raises ValueError naming a parameter that has none or is unknown."""
    parameters = named_parameters(model)
    for name in [*(parameters.keys() - saved.keys()), *(saved.keys() - parameters.keys())]:
        raise ValueError(f"the optimizer state does not fit: {name} is on one side only")
    for name, parameter in parameters.items():
        moved = {}
        for key, value in saved[name].items():
            # AdamW keeps `step` on the CPU unless it is fused.
            keep = key == "step" and not parameter.is_cuda
            moved[key] = value.clone() if keep else value.to(parameter.device, copy=True)
        optimizer.state[parameter] = moved
