"""A comparison from its grid to its report; what is done already is not done again."""

import math
import statistics
import time
from typing import NamedTuple

from dylora.compare.cells import Result, drop_checkpoints, score_cell, train_cell
from dylora.compare.config import Board, Method
from dylora.compare.report import Outcome, write_report
from dylora.compare.statistics import Choice, choose
from dylora.compare.survey import format_estimate, survey_methods
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
    with lock_folder(board.folder):
        progress = _Progress(sum(one.runs for one in surveys))
        grids = [_run_grid(board, method, progress) for method in board.methods]
        steps = _equal_time_steps(board, grids)
        for method, grid, timed in zip(board.methods, grids, steps, strict=True):
            for seed in board.config.seeds:
                _train(board, method, grid.choice, seed, progress)
                if timed is not None:
                    _train(board, method, grid.choice, seed, progress, timed)
        outcomes = [
            _outcome(board, method, grid, one.trainable, timed)
            for method, grid, one, timed in zip(board.methods, grids, surveys, steps, strict=True)
        ]
        write_report(board, outcomes)
    return outcomes


class _Grid(NamedTuple):
    """The grid of a method, trained."""

    choice: Choice
    step_s: float  # the median over its cells
    losses: dict[tuple[float, float], float]


class _Progress:
    """Counts the runs and prints a line for each that this process has trained."""

    def __init__(self, runs: int) -> None:
        self.runs, self.done = runs, 0
        self.seen: set[tuple[str, str]] = set()

    def count(self, method: str, run: str, result: Result, seconds: float) -> None:
        if (method, run) in self.seen:  # a seed of the grid comes again among all seeds
            return
        self.seen.add((method, run))
        self.done += 1
        loss = result.get("failure") or f"loss {result['loss']:.4f}"
        print(f"[{self.done} of {self.runs}] {method} {run}: {loss} ({seconds:.0f} s)", flush=True)


def _train(
    board: Board,
    method: Method,
    at: Choice | tuple[float, float],
    seed: int,
    progress: _Progress,
    steps: int | None = None,
) -> Result:
    cell, begun = board.cell(method, at[0], at[1], seed, steps), time.perf_counter()
    result = train_cell(cell)
    progress.count(method.name, cell.name, result, time.perf_counter() - begun)
    return result


def _run_grid(board: Board, method: Method, progress: _Progress) -> _Grid:
    """Train every cell with the first seeds; checkpoints are kept of the best cell alone."""
    seeds = board.config.seeds[: board.config.grid_seeds]
    losses, times = {}, []
    for cell in method.grid:
        results = [_train(board, method, cell, seed, progress) for seed in seeds]
        found = [math.inf if one["loss"] is None else one["loss"] for one in results]
        losses[cell] = statistics.fmean(found)
        times += [one["step_s"] for one in results if "step_s" in one]
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
    board: Board, method: Method, grid: _Grid, trainable: int, timed: int | None
) -> Outcome:
    """Score the chosen cells on the rows to report on."""
    config, choice = board.config, grid.choice

    def score(steps: int | None) -> list[Result]:
        cells = [board.cell(method, *choice[:2], seed, steps) for seed in config.seeds]
        return [score_cell(cell, config) for cell in cells]

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
