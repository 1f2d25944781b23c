"""The state of a run besides its model: taken, checked as untrusted, and put back.

A checkpoint's files may be anybody's. Each value must be of the kind that the run itself has there:
generators read beyond their state, and schedules fail hours later, where one is not.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dylora.fields import MAX_INT, is_number, is_whole_number, shown
from dylora.routing.losses import ASSIGNMENTS
from dylora.storage.safe_io import read_json, require_keys
from dylora.storage.tensors import is_plain

MOST_STEPS = 2**31  # steps and epochs of a run


@dataclass
class Progress:
    """Where a run stands; saved as trainer_state.json."""

    step: int = 0
    targets: int = 0  # target tokens trained on so far
    best_loss: float = math.inf
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite: they updated nothing
    skipped_in_a_row: int = 0  # of those, the latest without a good step between
    evaluation_due: bool = False  # stopped after this step, before it was evaluated
    benchmark_due: bool = False  # likewise: the benchmark comes after the save
    # The model's fractions [N, E] of the balance losses, as lists.
    fractions: dict[str, list[list[float]]] | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    # A row for each step since the last line of metrics: metrics.window_row.
    window: list[dict[str, float]] = field(default_factory=list)
    # Steps in a row that a block's routing has been collapsed: metrics.find_collapses.
    collapsed_steps: dict[str, int] = field(default_factory=dict)


def read_progress(file: Path, blocks: int, experts: int) -> dict[str, Any]:
    """trainer_state.json: the fields of Progress, and `steps`.

    Raises ValueError naming a field that is missing or invalid.
    """
    state = read_json(file, infinite=True)  # before the first evaluation, the best loss is infinite
    state = {"window": [], "collapsed_steps": {}} | state  # checkpoints of before lack them
    checks: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys((item.name for item in dataclasses.fields(Progress)), is_whole_number),
        "step": lambda value: is_whole_number(value, 0, MOST_STEPS),
        "steps": lambda value: is_whole_number(value, 1, MOST_STEPS),
        "best_loss": lambda value: is_number(value, -math.inf, math.inf),
        "best_step": lambda value: value is None or is_whole_number(value),
        "evaluation_due": lambda value: type(value) is bool,
        "benchmark_due": lambda value: type(value) is bool,
        "fractions": lambda value: (
            value is None
            or (
                isinstance(value, dict)
                and value.keys() == set(ASSIGNMENTS)
                and all(_are_shares(rows, blocks, experts) for rows in value.values())
            )
        ),
        "sampler": lambda value: isinstance(value, dict),
        "window": lambda value: isinstance(value, list) and all(map(_is_window_row, value)),
        "collapsed_steps": lambda value: (
            isinstance(value, dict)
            and all(is_whole_number(count, -1, MOST_STEPS) for count in value.values())
        ),
    }
    require_keys(file, "", state, checks)
    for name, value in state["sampler"].items():
        most = {"seed": MAX_INT, "epoch": MOST_STEPS, "position": MAX_INT}.get(name)
        if most is not None and not is_whole_number(value, 0, most):
            raise ValueError(f"{file}: sampler.{name} is {shown(value)}, which is invalid")
    return state


def check_scaler(file: Path, found: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError for a state that no float16 scaler of a run comes to."""
    checks: dict[str, Callable[[Any], bool]] = {
        **{name: lambda given, own=own: given == own for name, own in ours.items()},  # set once
        "scale": lambda value: is_number(value, 2.0**-126, 2.0**127),
        "_growth_tracker": lambda value: is_whole_number(value, 0, ours["growth_interval"]),
    }
    require_keys(file, "scaler.", found, checks)


def require_same_form(file: Path, where: str, found: Any, ours: Any) -> None:
    """Raises ValueError unless `found` has the keys, lengths, types and shapes of our own state.

    Of numbers the kind does not matter, and infinity is one; what is unset with us may be set.
    """
    name = where.removesuffix(".")
    if isinstance(ours, dict):
        require_keys(file, where, found, dict.fromkeys(ours, lambda value: True))
        for key, value in ours.items():
            require_same_form(file, f"{where}{key}.", found[key], value)
    elif isinstance(ours, list):
        if not isinstance(found, list) or len(found) != len(ours):
            raise ValueError(f"{file}: {name} is {shown(found)}, no list of {len(ours)}")
        for index, value in enumerate(ours):
            require_same_form(file, f"{where}{index}.", found[index], value)
    elif isinstance(ours, Tensor):
        if not is_plain(found, ours.dtype) or found.shape != ours.shape:
            raise ValueError(f"{file}: {name} is no {ours.dtype} of shape {list(ours.shape)}")
    elif ours is None or type(ours) in (int, float):
        if not (ours is found is None or is_number(found, -math.inf, math.inf)):
            raise ValueError(f"{file}: {name} is {shown(found)}, no number")
    elif type(found) is not type(ours):
        raise ValueError(f"{file}: {name} is {shown(found)}, not of type {type(ours).__name__}")


def _is_window_row(row: Any) -> bool:
    needed = {"tokens", "seconds"}
    return isinstance(row, dict) and needed <= row.keys() and all(map(is_number, row.values()))


def _are_shares(rows: Any, height: int, width: int) -> bool:
    """Whether these are `height` rows of at most `width` shares: an expert may have come since."""
    try:
        shares = torch.tensor(rows, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False
    fits = shares.ndim == 2 and len(shares) == height and shares.shape[1] <= width
    return fits and bool(((shares >= 0) & (shares <= 1 + 1e-4)).all())
