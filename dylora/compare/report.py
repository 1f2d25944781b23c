"""The report of a comparison: tables with intervals, paired differences and verdicts; curves."""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from dylora.compare.cells import Result
from dylora.compare.config import Board, is_skill
from dylora.compare.statistics import (
    RULE,
    Choice,
    differences,
    interval,
    pass_interval,
    verdict,
)
from dylora.evaluation.figures.style import (
    draw_curves,
    finish_curves,
    new_figure,
    save_figure,
    styled,
)
from dylora.evaluation.passk.estimate import Interval
from dylora.evaluation.run_files import read_rows
from dylora.storage.folders import write_file
from dylora.training.run import run_folder


class Outcome(NamedTuple):
    """What a method came to."""

    name: str
    trainable: int  # parameters, routers among them
    choice: Choice
    grid: dict[tuple[float, float], float]  # loss to choose by, of each rate and scale
    step_s: float
    scores: list[Result]  # on the rows to report on, one a seed, at equal steps
    timed_steps: int | None
    timed: list[Result] | None  # likewise, at the time of the first method; None: not asked for


class Comparison(NamedTuple):
    """One measure of a method, and how it differs from the reference's, seed by seed."""

    value: Interval | None  # None for one seed, or where a run failed
    mean: float
    difference: Interval | None
    mean_difference: float  # NaN where a run failed, and of the reference itself
    verdict: str


def write_report(board: Board, outcomes: list[Outcome]) -> None:
    """Print the report; write it as report.md, report.json and, with matplotlib, curves.png."""
    text = format_report(board, outcomes)
    print(text)
    write_file(board.folder / "report.md", text + "\n")
    write_file(board.folder / "report.json", json.dumps(_as_json(outcomes), indent=2) + "\n")
    names = ["report.md", "report.json"]
    try:
        plot_curves(board, outcomes, board.folder / "curves.png")
        names.append("curves.png")
    except ImportError as error:
        print(f"warning: curves are left out ({error})")
    print(f"wrote {board.folder}/: {', '.join(names)}")


def format_report(board: Board, outcomes: list[Outcome]) -> str:
    """The tables as Markdown, the rule, and which rows were chosen by and reported on."""
    config, first = board.config, outcomes[0]
    seeds, steps = len(config.seeds), config.run.train.max_steps
    parts = [
        f"# {config.name}: {len(outcomes)} methods, {seeds} seeds",
        _table(
            ["method", "trainable", "active a token", "cells", "rate", "scale", "chosen at"],
            [_settings_row(one) for one in outcomes],
        ),
        f"## Equal steps{f' ({steps})' if steps else ''}",
        _measures_table(first, [(one, one.scores) for one in outcomes], first.scores),
    ]
    if first.timed is not None:
        timed = [(one, one.timed or []) for one in outcomes]
        parts += [
            f"## Equal time ({first.timed_steps} steps of {first.name})",
            _measures_table(first, timed, first.scores, with_steps=True),
        ]
    return "\n\n".join([*parts, f"Rule: {RULE}.", *_notes(board)])


def compare_measure(
    one: Outcome, first: Outcome, ours: list[Result], theirs: list[Result], measure: str
) -> Comparison:
    """`loss` or `passed` (as a share) of a method against the reference's."""
    mine, other = (_values(results, measure) for results in (ours, theirs))
    found = differences(mine, other)
    finite, compared = all(map(math.isfinite, mine)), all(map(math.isfinite, found))
    if not finite:
        value = None
    elif measure == "loss":
        value = interval(mine)
    else:
        value = pass_interval([result["passed"] for result in ours], ours[0]["answers"])
    if ours is theirs:
        return Comparison(value, statistics.fmean(mine), None, math.nan, "reference")
    told = verdict(
        found,
        lower_is_better=measure == "loss",
        bracketed=one.choice.bracketed,
        reference_bracketed=first.choice.bracketed,
    )
    return Comparison(
        value,
        statistics.fmean(mine),
        interval(found) if compared else None,
        statistics.fmean(found),
        told,
    )


def plot_curves(board: Board, outcomes: list[Outcome], out: Path) -> None:
    """Validation loss of the chosen cells, the mean over seeds, over steps and over seconds."""
    over_steps, over_seconds = {}, {}
    for method, one in zip(board.methods, outcomes, strict=True):
        at: dict[int, list[float]] = {}
        for seed in board.config.seeds:
            cell = board.cell(method, one.choice.rate, one.choice.scale, seed)
            for row in read_rows(run_folder(cell) / "metrics.jsonl"):
                if "val/loss" in row:
                    at.setdefault(row["step"], []).append(row["val/loss"])
        means = [(step, statistics.fmean(at[step])) for step in sorted(at)]
        over_steps[one.name] = means
        over_seconds[one.name] = [(one.step_s * step, mean) for step, mean in means]
    with styled():
        figure, grid = new_figure(8, 3.2, columns=2, sharey=True)
        draw_curves(figure, grid[0, 1], over_seconds, counted="method")
        grid[0, 1].set(xlabel="seconds of training steps")
        draw_curves(figure, grid[0, 0], over_steps, counted="method")
        finish_curves(figure, grid[0, 0], "step", "validation loss (nats)")
        save_figure(figure, out)


# Parts of the report


def _values(results: list[Result], measure: str) -> list[float]:
    """One a seed; NaN where the run failed."""
    if any(result["loss"] is None for result in results):
        return [math.nan] * len(results)
    if measure == "loss":
        return [result["loss"] for result in results]
    return [result["passed"] / result["answers"] for result in results]


def _settings_row(one: Outcome) -> list[str]:
    active = [result["active"] for result in one.scores if result["loss"] is not None]
    choice = one.choice
    return [
        one.name,
        f"{one.trainable:,}",
        f"{statistics.fmean(active):,.0f}" if active else "-",
        str(len(one.grid)),
        f"{choice.rate:g}",
        f"{choice.scale:g}",
        f"{choice.loss:.4f}" + ("" if choice.bracketed else ", not bracketed"),
    ]


def _measures_table(
    first: Outcome,
    rows: list[tuple[Outcome, list[Result]]],
    theirs: list[Result],
    *,
    with_steps: bool = False,
) -> str:
    answered = any(result.get("answers") for _, results in rows for result in results)
    measures = [("loss", "test loss", 4)] + [("passed", "answers", 3)] * answered
    header = ["method", "steps" if with_steps else "s a step"]
    for _, title, _ in measures:
        header += [title, f"- {first.name}", "verdict"]
    lines = []
    for one, results in rows:
        line = [one.name, str(one.timed_steps) if with_steps else f"{one.step_s:.3f}"]
        for measure, _, digits in measures:
            found = compare_measure(one, first, results, theirs, measure)
            line += [
                _shown(found.mean, found.value, digits),
                _shown(found.mean_difference, found.difference, digits, sign="+"),
                found.verdict,
            ]
        lines.append(line)
    return _table(header, lines)


def _shown(mean: float, found: Interval | None, digits: int, sign: str = "") -> str:
    """A mean and its 95 % interval."""
    if math.isnan(mean):
        return "-"
    text = f"{mean:{sign}.{digits}f}"
    return text if found is None else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _notes(board: Board) -> list[str]:
    config = board.config
    skills = [source.name for source in config.run.data.sources if is_skill(source.name)]
    others = [source.name for source in config.run.data.sources if not is_skill(source.name)]
    chosen = f"Chosen by the validation loss of {config.grid_seeds} of the seeds"
    rows = []
    if skills:
        rows.append(
            f"{', '.join(skills)}: chosen by validation rows, reported on {config.test_rows} test "
            f"rows and {config.test_answers} test answers each"
        )
    if others:
        rows.append(
            f"{', '.join(others)}: chosen by every second validation row, reported on the others"
        )
    what = (
        "Losses in nats per target token, answers as the share that passes, each the mean over "
        "seeds; in brackets 95 % intervals by Student's t, with one seed Wilson's of its answers. "
        "Several methods are compared with one: of twenty such verdicts one may be chance."
    )
    return [f"{chosen}. {'; '.join(rows)}.", what]


def _as_json(outcomes: list[Outcome]) -> dict[str, Any]:
    """Everything that the tables are made of, in JSON types."""
    methods = []
    for one in outcomes:
        grid = [
            {"rate": rate, "scale": scale, "loss": loss if math.isfinite(loss) else None}
            for (rate, scale), loss in one.grid.items()
        ]
        scores = {
            name: [{k: v for k, v in result.items() if k != "settings"} for result in results]
            for name, results in (("scores", one.scores), ("timed", one.timed or []))
        }
        methods.append(one._asdict() | {"choice": one.choice._asdict(), "grid": grid} | scores)
    return {"rule": RULE, "methods": methods}
