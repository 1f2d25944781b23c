"""The statistics of a comparison: the choice of a cell, paired differences, and the verdict.

The rule, fixed here and no setting: with at least MIN_SEEDS seeds one method is better than another
when the mean over seeds of their paired difference exceeds DEVIATIONS standard deviations of that
difference, and the grid of the worse one brackets its optimum. Pure functions.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dylora.evaluation.forgetting import over_seeds
from dylora.evaluation.passk.estimate import Interval, wilson

DEVIATIONS = 2.0
MIN_SEEDS = 3
RULE = (
    f"better or worse: over at least {MIN_SEEDS} seeds the mean paired difference exceeds "
    f"{DEVIATIONS:g} standard deviations of that difference, and the grid of the worse method "
    "brackets its optimum"
)


class Choice(NamedTuple):
    """The best cell of a method's grid, by the loss on the rows to choose by."""

    rate: float
    scale: float
    loss: float
    bracketed: bool  # it lies inside of the grid, with tried values on both sides of each axis


def choose(losses: Mapping[tuple[float, float], float]) -> Choice:
    """The cell with the lowest loss; losses: by rate and scale, infinite where a run failed.

    Raises ValueError where every run failed.
    """
    (rate, scale), loss = min(losses.items(), key=lambda item: item[1])
    if not math.isfinite(loss):
        raise ValueError("no cell of its grid has a finite loss: try lower rates or scales")
    rates, scales = zip(*losses, strict=True)
    inside = min(rates) < rate < max(rates) and min(scales) < scale < max(scales)
    return Choice(rate, scale, loss, inside)


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """ours - theirs, seed by seed."""
    return [one - other for one, other in zip(ours, theirs, strict=True)]


def interval(values: Sequence[float]) -> Interval | None:
    """The mean over seeds with its 95 % interval by Student's t; None for a single seed."""
    return over_seeds(values) if len(values) > 1 else None


def pass_interval(passed: Sequence[int], total: int) -> Interval:
    """The share of passed answers, of `total` a seed: over seeds, or of one seed's answers."""
    return interval([count / total for count in passed]) or wilson(passed[0], total)


def verdict(
    found: Sequence[float], *, lower_is_better: bool, bracketed: bool, reference_bracketed: bool
) -> str:
    """The rule, applied to the paired differences of a method and the reference, one a seed."""
    if not all(map(math.isfinite, found)):
        return "a run failed"
    if len(found) < MIN_SEEDS:
        return f"under {MIN_SEEDS} seeds"
    mean = statistics.fmean(found)
    if abs(mean) <= DEVIATIONS * statistics.stdev(found):
        return "no difference shown"
    better = (mean < 0) == lower_is_better
    if not (reference_bracketed if better else bracketed):
        return "open: the worse one is not bracketed"
    return "better" if better else "worse"
