"""What a stream of skills keeps, passes on and loses, from scores taken after every stage.

Pure functions on R [S, K]: R[i][j] is the score on skill j after stage i, a pass rate or a loss;
NaN where it was not taken. `before` [K] are the scores before the first stage. Of a loss the signs
are turned: backward transfer below 0 always says that something was lost, forward transfer above 0
that something was gained.

Shape letters: S stages, K skills.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dylora.evaluation.passk.estimate import Interval

Scores = Sequence[Sequence[float]]


class Transfer(NamedTuple):
    """Of one stream, in the scores' unit; NaN where no skill or no score tells it."""

    average: float  # over skills, after the last stage
    backward: float  # mean of last - just learned, over skills learned before the last stage
    forward: float  # mean of (just before its stage - before the first), over later skills
    forgetting: (
        float  # mean of best in an earlier stage - last, over skills learned before the last
    )


def measure(
    scores: Scores,
    before: Sequence[float] | None = None,
    *,
    learned: Sequence[int] | None = None,
    smaller_is_better: bool = False,
) -> Transfer:
    """Average score, backward and forward transfer (Lopez-Paz and Ranzato 2017, arXiv:1706.08840)
    and forgetting (Chaudhry et al. 2018, arXiv:1801.10112).

    Args:
        scores: R [S, K]. What a measure needs and lacks makes that measure NaN; of forgetting's
            maximum, scores that were not taken are left out.
        before: [K]; without it there is no forward transfer.
        learned: [K], the stage (from 0) that first taught each skill; by default stage j teaches
            skill j.

    Raises ValueError for a matrix that is empty or ragged, and for stages that it does not have.
    """
    stages, skills = len(scores), len(scores[0]) if scores else 0
    if skills == 0 or any(len(row) != skills for row in scores):
        raise ValueError("scores must be a matrix: a row a stage, with a number for every skill")
    learned = list(range(skills)) if learned is None else learned
    if len(learned) != skills or not all(0 <= stage < stages for stage in learned):
        raise ValueError(
            f"learned is {list(learned)}, but must name for each of {skills} skills the stage, "
            f"from 0 to {stages - 1}, that taught it first"
        )
    if before is not None and len(before) != skills:
        raise ValueError(f"before has {len(before)} scores, but there are {skills} skills")
    sign, last = (-1 if smaller_is_better else 1), scores[-1]
    early = [j for j in range(skills) if learned[j] < stages - 1]
    later = [j for j in range(skills) if learned[j] > 0] if before is not None else []
    return Transfer(
        average=_mean(last),
        backward=_mean([sign * (last[j] - scores[learned[j]][j]) for j in early]),
        forward=_mean([sign * (scores[learned[j] - 1][j] - before[j]) for j in later if before]),
        forgetting=_mean([_best(scores[:-1], j, sign) - sign * last[j] for j in early]),
    )


def _best(rows: Scores, skill: int, sign: int) -> float:
    taken = [sign * row[skill] for row in rows if not math.isnan(row[skill])]
    return max(taken, default=math.nan)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def over_seeds(values: Sequence[float]) -> Interval:
    """The mean over seeds with its 95 % interval by Student's t, which takes the values as normal.

    With two seeds or three it is wide, and that is what they tell. Raises ValueError for fewer than
    two: one seed has no spread.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"an interval over seeds needs at least two, not {count}")
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_quantile(0.975, count - 1) * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)


def t_quantile(share: float, freedom: int) -> float:
    """Of Student's distribution with so many degrees of freedom; share within (0.5, 1)."""
    if freedom < 1 or not 0.5 < share < 1:
        raise ValueError(f"freedom {freedom} or share {share} is out of range")
    low, high = 0.0, 1.0
    while _t_share(high, freedom) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        below = _t_share(middle, freedom) < share
        low, high = (middle, high) if below else (low, middle)
    return (low + high) / 2


def _t_share(t: float, freedom: int) -> float:
    """P(T ≤ t), t ≥ 0, by the finite series of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2


def format_matrix(
    scores: Scores, skills: Sequence[str], stages: Sequence[str], *, percent: bool = True
) -> str:
    """R as text: a line a stage, a column a skill, their mean last; "-" where nothing was taken."""
    if len(stages) != len(scores) or any(len(row) != len(skills) for row in scores):
        raise ValueError("stages and skills must name the rows and the columns of scores")
    first = max(len(name) for name in ("after stage", *stages))
    widths = [max(len(name), 7) for name in (*skills, "mean")]
    header = [f"{'after stage':{first}}", *map("{:>{}}".format, (*skills, "mean"), widths)]
    lines = [header]
    for stage, row in zip(stages, scores, strict=True):
        cells = [_cell(value, percent) for value in (*row, _mean(row))]
        lines.append([f"{stage:{first}}", *map("{:>{}}".format, cells, widths)])
    return "\n".join("  ".join(line) for line in lines)


def format_methods(seeds: Mapping[str, Sequence[Transfer]], *, percent: bool = True) -> str:
    """A line a method: each measure's mean over its seeds ± half of the 95 % interval."""
    first = max(len(name) for name in ("method", *seeds))
    columns = ["seeds", *Transfer._fields]
    lines = [f"{'method':{first}}  {columns[0]}" + "".join(f"{c:>18}" for c in columns[1:])]
    for name, found in seeds.items():
        line = f"{name:{first}}  {len(found):5}"
        for values in zip(*found, strict=True):
            text = _cell(_mean(values), percent)
            if len(values) > 1 and not math.isnan(sum(values)):
                interval = over_seeds(values)
                text += f" ± {_cell(interval.high - interval.mean, percent)}"
            line += f"{text:>18}"
        lines.append(line)
    return "\n".join(lines)


def _cell(value: float, percent: bool) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if percent else f"{value:.3f}"
