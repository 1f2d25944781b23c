"""pass@k from counts, how sure it is, and whether two models differ. Pure functions."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


class Interval(NamedTuple):
    """A mean, over tasks or seeds, with its 95 % interval."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """Two models on the same tasks."""

    better: int  # tasks that the second passes more often
    worse: int
    equal: int
    p_value: float  # two-sided, of the exact test


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k programs passes, drawn from `samples` of which `passed` did.

    1 − C(n−c, k) / C(n, k), without bias (Chen et al. 2021, arXiv:2107.03374). Raises ValueError
    for k below 1 or above `samples`, and for `passed` outside 0 … `samples`.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {max(k, 1)} samples a task, and k from 1 up; "
                         f"there are {samples}")  # fmt: skip
    if not 0 <= passed <= samples:
        raise ValueError(f"{passed} of {samples} samples cannot have passed")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def bootstrap(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of the tasks' scores; the interval is the percentile bootstrap over tasks.

    It says how the mean would vary with other tasks of the same kind; for scores that are all alike
    it has no width. Raises ValueError for no scores.
    """
    if len(scores) == 0:
        raise ValueError("no tasks were scored")
    values = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for begin in range(0, RESAMPLES, 500):  # 500 at once: 2 MB for MBPP
        drawn = rng.integers(len(values), size=(500, len(values)))
        means[begin : begin + 500] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(passed: int, total: int) -> Interval:
    """The share that passed, of independent answers, with Wilson's score interval (1927).

    Raises ValueError for no answers, and for more passed ones than there are.
    """
    if not 0 <= passed <= total or total == 0:
        raise ValueError(f"{passed} of {total} answers cannot have passed")
    z, share = NormalDist().inv_cdf(0.975), passed / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    spread = math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    half = z * spread / (1 + z * z / total)
    return Interval(share, middle - half, middle + half)


def compare(first: Sequence[int], second: Sequence[int]) -> Comparison:
    """Whether the second model passes more, from the passed samples of each task (equal n).

    The exact sign-flip test of Σ (second − first): were the models alike, each task's difference
    might as well have the other sign. With one sample a task it is McNemar's exact test. Raises
    ValueError for unequal numbers of tasks, or none.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"{len(first)} and {len(second)} tasks cannot be compared in pairs")
    differences = np.subtract(second, first).astype(int)
    reach = int(np.abs(differences).sum())
    # share[s + reach] of the 2^T sign patterns sum to s, counted by adding task after task
    share = np.zeros(2 * reach + 1)
    share[reach] = 1.0
    for step in np.abs(differences[differences != 0]):
        share = (np.roll(share, step) + np.roll(share, -step)) / 2  # never reaches the ends
    sums = np.arange(-reach, reach + 1)
    p_value = float(share[np.abs(sums) >= abs(differences.sum())].sum())
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    return Comparison(better, worse, len(differences) - better - worse, min(p_value, 1.0))
