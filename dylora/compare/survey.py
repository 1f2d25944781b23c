"""Before anything is trained: whether the methods are of equal size, and what it will take."""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from dylora.compare.cells import load_cell
from dylora.compare.config import Board, Method, is_skill
from dylora.run_config import DataConfig, RunConfig
from dylora.training.run import prepare
from dylora.training.step import run_step
from dylora.training.validation import validate

STEPS = 3  # that are measured of each method
TOLERANCE = 0.01  # of the first method's trainable parameters


class Survey(NamedTuple):
    """What one method comes to."""

    name: str
    trainable: int  # parameters, routers among them
    cells: int  # of its grid
    runs: int  # of the grid, of the other seeds, and those of equal time
    step_s: float
    run_s: float  # steps and validations of one run


def survey_methods(board: Board) -> list[Survey]:
    """Build the first cell of each method, and measure some steps and a validation of it.

    Raises ValueError, naming them, for methods whose trainable parameters differ from the first
    one's by more than TOLERANCE.
    """
    surveys = [_survey(board, method) for method in board.methods]
    first = surveys[0]
    unequal = [
        f"{one.name} has {one.trainable:,} ({one.trainable / first.trainable - 1:+.1%})"
        for one in surveys
        if abs(one.trainable - first.trainable) > TOLERANCE * first.trainable
    ]
    if unequal:
        raise ValueError(
            f"trainable parameters differ from the {first.trainable:,} of {first.name} by more "
            f"than {TOLERANCE:.0%}: {', '.join(unequal)}; change the ranks of those methods"
        )
    return surveys


def format_estimate(board: Board, surveys: Sequence[Survey]) -> str:
    """A line a method, and what all of it takes; runs of equal time take as long as the first."""
    width = max(len(one.name) for one in surveys)
    lines = [f"{'method':{width}}  trainable  cells  runs  s a step  s a run"]
    total = 0.0
    for one in surveys:
        timed = len(board.config.seeds) if one is not surveys[0] and board.config.equal_time else 0
        total += (one.runs - timed) * one.run_s + timed * surveys[0].run_s
        lines.append(
            f"{one.name:{width}}  {one.trainable:9,}  {one.cells:5}  {one.runs:4}  "
            f"{one.step_s:8.3f}  {one.run_s:7.0f}"
        )
    runs = sum(one.runs for one in surveys)
    lines.append(
        f"{runs} runs, about {total / 60:,.0f} minutes of training and validation on this machine, "
        f"by {STEPS} steps and one validation of each method; loading and test answers come on top"
    )
    return "\n".join(lines)


def _survey(board: Board, method: Method) -> Survey:
    config, (rate, scale) = board.config, method.grid[0]
    first = board.methods[0].name == method.name
    runs = len(method.grid) * config.grid_seeds + len(config.seeds) - config.grid_seeds
    runs += len(config.seeds) if config.equal_time and not first else 0
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cell = board.cell(method, rate, scale, config.seeds[0])
        cell = dataclasses.replace(cell, output_dir=folder, data=_with_few_rows(cell))
        run = prepare(cell, fresh=True, parts=load_cell(cell))
        steps = min(STEPS, run.steps)
        step_s = statistics.median(run_step(run).seconds for _ in range(steps))
        begun = time.perf_counter()
        validate(
            run.model,
            run.data.validation,
            batch_size=cell.eval.batch_size,
            pad_token_id=run.pad_token_id,
        )
        validation_s = time.perf_counter() - begun
    trainable, _ = run.model.count_parameters()
    validations = 2 + (run.steps - 1) // (cell.eval.eval_steps or run.steps)  # one to choose by
    run_s = run.steps * step_s + validations * validation_s
    return Survey(method.name, trainable, len(method.grid), runs, step_s, run_s)


def _with_few_rows(cell: RunConfig) -> DataConfig:
    """No more training rows of a skill than the measured steps take: they are generated. All of
    them where clusters are found in them, or where they say how many steps there are."""
    if cell.train.prompt_clusters is not None or cell.train.max_steps is None:
        return cell.data
    most = STEPS * cell.train.batch_size * cell.train.gradient_accumulation_steps
    sources = [
        dataclasses.replace(source, rows=min(source.rows or most, most))
        if is_skill(source.name)
        else source
        for source in cell.data.sources
    ]
    return dataclasses.replace(cell.data, sources=sources)
