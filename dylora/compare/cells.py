"""One cell of a comparison: trained to its end, scored on the rows to choose by; then, if it is
chosen, on the rows to report on.

settings.json in the folder of its run says what a cell was begun with, result.json that it is
trained, test.json that it is reported on; a cell that was begun goes on from its latest checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylora.base_models import load_tokenizer
from dylora.compare.config import CompareConfig, is_skill
from dylora.compare.rows import rows_to_choose_by, rows_to_report_on
from dylora.data.prompts import pad_token_id
from dylora.evaluation.loading import base_of, load_checkpoint
from dylora.evaluation.passk.skills import score_skills
from dylora.evaluation.run_files import read_rows
from dylora.fields import join, shown
from dylora.run_config import RunConfig
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.folders import checkpoints, write_file
from dylora.storage.safe_io import read_json
from dylora.training.loop import train
from dylora.training.run import Parts, fit_to_base, load_run_data, run_folder
from dylora.training.step import NotFinite
from dylora.training.validation import (
    SetScore,
    active_parameters,
    overall_loss,
    validate,
)

BEGUN, RESULT, TEST = "settings.json", "result.json", "test.json"
TRAIN_LOG = "train.log"
COMPARED = ("model", "moe", "data", "train", "eval")  # sections that decide a result
Result = dict[str, Any]  # JSON types


def train_cell(config: RunConfig) -> Result:
    """Train a cell unless it is trained already.

    Returns `loss` (nats per target on the rows to choose by; null where it is not finite or
    training failed, with `failure`), `losses` by set, `trainable` parameters and `step_s`, seconds
    of a step in the median. Raises ValueError where the folder holds what other settings began.
    """
    folder = run_folder(config)
    settings = settings_of(config)
    if (folder / RESULT).exists():
        return _read(folder / RESULT, settings)
    folder.mkdir(parents=True, exist_ok=True)
    result: Result = {"settings": settings}
    if (folder / BEGUN).exists():
        _read(folder / BEGUN, settings)
    write_file(folder / BEGUN, json.dumps(result, indent=2) + "\n")
    with _told_in(folder / TRAIN_LOG):
        try:
            run = train(config, "auto", parts=load_cell(config))
        except NotFinite as error:
            result |= {"loss": None, "failure": str(error)}
        else:
            scores = validate(
                run.model,
                run.data.validation,
                batch_size=config.eval.batch_size,
                pad_token_id=run.pad_token_id,
            )
            result |= _losses(scores) | {"trainable": run.model.count_parameters()[0]}
            result["step_s"] = _step_seconds(folder)
            if result["loss"] is None:
                result["failure"] = "the loss on the rows to choose by is not finite"
    write_file(folder / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def score_cell(config: RunConfig, board: CompareConfig) -> Result:
    """Score a trained cell on the rows to report on, unless that is done already.

    Returns `loss` and `losses`; `passed` of `answers` test answers of the embedded skills (both 0
    where there are none); `active`, the parameters that a token is multiplied with in the mean;
    `validation`, the loss on the rows to choose by; and `loss` null where the training failed.
    """
    folder = run_folder(config)
    settings = settings_of(config)
    settings |= {"test_rows": board.test_rows, "test_answers": board.test_answers}
    if (folder / TEST).exists():
        return _read(folder / TEST, settings)
    validation = train_cell(config)["loss"]
    if validation is None:
        result: Result = {"loss": None}
    else:
        if not checkpoints(folder):  # deleted when another cell was the best
            (folder / RESULT).unlink()
            train_cell(config)
        with _told_in(folder / TRAIN_LOG):
            result = _score(config, board) | {"validation": validation}
    result["settings"] = settings
    write_file(folder / TEST, json.dumps(result, indent=2) + "\n")
    return result


def load_cell(config: RunConfig) -> Parts:
    """The rows that a cell sees until it is trained and chosen: not those to report on, whose
    prompts a library could be fitted to."""
    tokenizer = load_tokenizer(config.model.base, config.model.revision)
    data = load_run_data(fit_to_base(config), tokenizer)
    return Parts(tokenizer, data._replace(validation=rows_to_choose_by(data.validation)))


def drop_checkpoints(config: RunConfig) -> None:
    """Free the disk of a cell that is not chosen; its result and metrics stay."""
    for folder in checkpoints(run_folder(config)):
        shutil.rmtree(folder)


def settings_of(config: RunConfig) -> Result:
    """What decides the result of a run, in JSON types."""
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in COMPARED}
    return json.loads(json.dumps(sections))


def _score(config: RunConfig, board: CompareConfig) -> Result:
    config = fit_to_base(config)
    checkpoint = Checkpoint.open(checkpoints(run_folder(config))[-1])
    tokenizer = checkpoint.tokenizer(base_of(config.model))
    validation = load_run_data(config, tokenizer).validation
    model = load_checkpoint(checkpoint, config.model)
    rows = rows_to_report_on(validation, tokenizer, config.data, board.test_rows)
    scores = validate(
        model, rows, batch_size=config.eval.batch_size, pad_token_id=pad_token_id(tokenizer)
    )
    skills = [s.name.removeprefix("skill/") for s in config.data.sources if is_skill(s.name)]
    result = _losses(scores) | {"passed": 0, "answers": 0}
    result["active"] = active_parameters(model, scores)
    if skills and board.test_answers:
        answered = score_skills(model, tokenizer, skills, board.test_answers)
        result["passed"] = sum(score.passed for score in answered.values())
        result["answers"] = sum(score.total for score in answered.values())
        result["passed_by_skill"] = {skill: score.passed for skill, score in answered.items()}
    return result


def _losses(scores: dict[str, SetScore]) -> Result:
    """By set and over all targets; null where one is not finite, as JSON has no word for it."""
    values = {"all": overall_loss(scores), **{name: score.loss for name, score in scores.items()}}
    losses = {name: loss if math.isfinite(loss) else None for name, loss in values.items()}
    return {"loss": losses.pop("all"), "losses": losses}


def _step_seconds(folder: Path) -> float:
    """The median over the run's rows of metrics."""
    rows = read_rows(folder / "metrics.jsonl")
    return statistics.median(row["train/step_time_s"] for row in rows if "train/step_time_s" in row)


def _read(file: Path, settings: Result) -> Result:
    """A result. Raises ValueError where it was made with other settings."""
    result = read_json(file)
    before = _with_defaults(result.get("settings"), settings_of(RunConfig()))
    difference = _difference(before, settings)
    if difference is not None:
        key, before, now = difference
        raise ValueError(
            f"{file} was made with {key} = {shown(before)}, the comparison has {shown(now)}: set "
            "it back, or give another --name"
        )
    return result


def _with_defaults(before: Any, defaults: Any) -> Any:
    """Settings that were written before some options existed, with the defaults of these."""
    if not (isinstance(before, dict) and isinstance(defaults, dict)):
        return before
    known = {name: _with_defaults(before[name], defaults.get(name)) for name in before}
    return defaults | known


def _difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key of nested settings whose values differ, and both values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return None if before == now else (key, before, now)
    keys = [*now, *(name for name in before if name not in now)]
    found = (_difference(before.get(name), now.get(name), join(key, name)) for name in keys)
    return next((one for one in found if one is not None), None)


@contextlib.contextmanager
def _told_in(file: Path) -> Iterator[None]:
    """What a run prints goes to a file beside it; a comparison prints one line a cell."""
    with file.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        yield
