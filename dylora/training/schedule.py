"""The learning-rate schedules of transformers over the optimizer steps of a run."""

from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from dylora.fields import is_number, is_whole_number, shown
from dylora.run_config import TrainConfig

FOLLOWS_VALIDATION = ("reduce_lr_on_plateau", "greedy")  # stepped with each validation loss
LARGEST_RATE = 1e6  # a rate above it in a file is refused
COUNTERS = {
    *("last_epoch", "_step_count", "num_bad_epochs", "num_good_epochs"),
    *("cooldown_counter", "warmup_counter", "reset_start"),
}


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int
) -> LRScheduler:
    """A schedule of transformers over `steps` optimizer steps.

    Raises ValueError when lr_scheduler_kwargs do not fit the schedule.
    """
    for key, value in config.lr_scheduler_kwargs.items():
        # transformers takes them, and makes a rate that rises where it should fall.
        if is_number(value, most=0) and key != "last_epoch" and (value or key == "num_cycles"):
            raise ValueError(
                f"train.lr_scheduler_kwargs: {key} is {value}, but must be a number "
                + ("above 0" if key == "num_cycles" else "of at least 0")
            )
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


def restore_schedule(
    scheduler: Any, saved: dict[str, Any], began_with: list[float], rates: list[float]
) -> list[float]:
    """Continue a checked schedule at its place with `rates`, and return those of the next step.

    saved: the state of the checkpoint's scheduler; began_with, rates: the learning rates without a
    schedule, of the checkpoint's run and of this one, for each group of the optimizer.
    """
    scheduler.load_state_dict(saved)
    if hasattr(scheduler, "lr_lambdas"):  # a function of the step alone
        scheduler.base_lrs = list(rates)
        pairs = zip(rates, scheduler.lr_lambdas, strict=True)
        current = [rate * factor(scheduler.last_epoch) for rate, factor in pairs]
    else:  # what has followed the validation loss keeps its ratio to the rate it began with
        triples = zip(scheduler.get_last_lr(), rates, began_with, strict=True)
        current = [last * (rate / first) for last, rate, first in triples]
        if hasattr(scheduler, "_init_lrs"):
            scheduler._init_lrs = list(rates)
    scheduler._last_lr = current
    return current


def check_schedule(
    file: Path, found: dict[str, Any], ours: dict[str, Any], step: int, began_with: list[float]
) -> None:
    """Raises ValueError for a schedule that a run of these settings cannot have at this step.

    found: a scheduler's state, of the same form as `ours`, that of this run; began_with: the
    learning rates without a schedule.
    """
    largest = max(step + 1, *(value for value in ours.values() if type(value) is int))
    ceiling = LARGEST_RATE
    if "base_lrs" not in ours:  # it follows the validation loss
        ceiling = max([*began_with, *ours.get("max_lrs", [])])
    for key, value in found.items():
        if key in COUNTERS:
            fits = is_whole_number(value, 0, largest)
        elif key in ("base_lrs", "_init_lrs"):
            fits = all(is_number(rate, 0, LARGEST_RATE) for rate in value)
        elif key == "_last_lr":
            fits = all(is_number(rate, 0, ceiling) for rate in value)
        else:
            fits = key in ("best", "_streaming_avg") or value == ours[key]
        if not fits:
            raise ValueError(f"{file}: scheduler.{key} is {shown(value)}, which is invalid here")
