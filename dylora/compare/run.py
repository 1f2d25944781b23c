"""A comparison from its grid to its report; what is done already is not done again."""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from dylora.compare.cells import Result, drop_checkpoints, score_cell, train_cell
from dylora.compare.config import Board, Method
from dylora.compare.report import Outcome, write_report
from dylora.compare.statistics import Choice, choose
from dylora.compare.survey import format_estimate, survey_methods
from dylora.compare.workers import RunAll, workers
from dylora.run_config import RunConfig
from dylora.storage.lock import lock_folder


def compare(board: Board, *, estimate: bool = False) -> list[Outcome]:
    """Run what is left of a comparison, print and write its report.

    Every method's grid with the first seeds, the best cell of each by the rows to choose by, all
    seeds of it, and those for as long as the first method takes; only then the rows to report on.
    A process that is stopped goes on where it was when it is started again.

    Args:
        board: the comparison.
        estimate: print what it will take and stop.

    Raises ValueError where the methods are not of equal size, for settings that do not fit
    together, and where the folder holds results of other settings; FileExistsError when another
    process works there.
    """
    surveys = survey_methods(board)
    print(format_estimate(board, surveys))
    if estimate:
        return []
    with lock_folder(board.folder), workers(board.config.processes) as run_all:
        progress = _Progress(sum(one.runs for one in surveys), run_all)
        grids = [_run_grid(board, method, progress) for method in board.methods]
        timed = _equal_time_steps(board, grids)
        chosen = [
            (method.name, board.cell(method, *grid.choice[:2], seed, number))
            for method, grid, steps in zip(board.methods, grids, timed, strict=True)
            for seed in board.config.seeds
            for number in ((None,) if steps is None else (None, steps))
        ]
        progress.train(chosen)
        outcomes = [
            _outcome(board, method, grid, one.trainable, steps, run_all)
            for method, grid, one, steps in zip(board.methods, grids, surveys, timed, strict=True)
        ]
        write_report(board, outcomes)
    return outcomes


class _Grid(NamedTuple):
    """The grid of a method, trained."""

    choice: Choice
    step_s: float  # the median over its cells
    losses: dict[tuple[float, float], float]


class _Progress:
    """Trains runs and prints a line for each, a run that was trained already among them."""

    def __init__(self, runs: int, run_all: RunAll) -> None:
        self.runs, self.run_all = runs, run_all
        self.seen: set[str] = set()

    def train(self, cells: Sequence[tuple[str, RunConfig]]) -> list[Result]:
        """cells: each with the name of its method."""
        results, begun = [], time.perf_counter()
        trained = self.run_all(train_cell, [run for _, run in cells])
        for (method, run), result in zip(cells, trained, strict=True):
            results.append(result)
            name = f"{method} {run.name}"
            if name not in self.seen:  # a seed of the grid comes again among all seeds
                self.seen.add(name)
                loss = result.get("failure") or f"loss {result['loss']:.4f}"
                seconds = time.perf_counter() - begun
                print(f"[{len(self.seen)} of {self.runs}] {name}: {loss} ({seconds:.0f} s)")
                sys.stdout.flush()
            begun = time.perf_counter()
        return results


def _run_grid(board: Board, method: Method, progress: _Progress) -> _Grid:
    """Train every cell with the first seeds; checkpoints are kept of the best cell alone."""
    seeds = board.config.seeds[: board.config.grid_seeds]
    cells = [(cell, seed) for cell in method.grid for seed in seeds]
    trained = progress.train([(method.name, board.cell(method, *at, seed)) for at, seed in cells])
    found: dict[tuple[float, float], list[float]] = {}
    for (cell, _), result in zip(cells, trained, strict=True):
        found.setdefault(cell, []).append(math.inf if result["loss"] is None else result["loss"])
    losses = {cell: statistics.fmean(each) for cell, each in found.items()}
    times = [result["step_s"] for result in trained if "step_s" in result]
    try:
        choice = choose(losses)
    except ValueError as error:
        raise ValueError(f"{method.name}: {error}") from error
    for cell in method.grid:
        for seed in seeds if cell != choice[:2] else ():
            drop_checkpoints(board.cell(method, *cell, seed))
    return _Grid(choice, statistics.median(times), losses)


def _equal_time_steps(board: Board, grids: list[_Grid]) -> list[int | None]:
    """Steps of each method that take as long as all those of the first; None: not asked, or it is
    the first, or as many."""
    steps = board.config.run.train.max_steps
    if not board.config.equal_time or steps is None:
        return [None] * len(grids)
    counts = [max(1, round(steps * grids[0].step_s / grid.step_s)) for grid in grids]
    return [None if count == steps else count for count in counts]


def _outcome(
    board: Board,
    method: Method,
    grid: _Grid,
    trainable: int,
    timed: int | None,
    run_all: RunAll,
) -> Outcome:
    """Score the chosen cells on the rows to report on."""
    config, choice = board.config, grid.choice

    def score(steps: int | None) -> list[Result]:
        cells = [board.cell(method, *choice[:2], seed, steps) for seed in config.seeds]
        return list(run_all(score_cell, cells, config))

    scores = score(None)
    return Outcome(
        name=method.name,
        trainable=trainable,
        choice=choice,
        grid=grid.losses,
        step_s=grid.step_s,
        scores=scores,
        timed_steps=timed or config.run.train.max_steps,
        timed=None if not config.equal_time else scores if timed is None else score(timed),
    )
