"""Hostile state of a run, and hostile data, are refused in one line: see hostile.py."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import harm
import hostile
from dylora.cli.main import main
from dylora.data.sources import read_source
from dylora.run_config import SourceConfig, dump_run_config
from dylora.training.loop import train
from dylora.training.resume import resume
from dylora.training.run import Run, prepare
from dylora.training.trainer_state import check_scaler

FOUND: dict[str, Path | Run] = {}  # made by the first test that asks


@pytest.fixture
def trained(make_config, tmp_path_factory) -> Path:
    """A checkpoint after one step; not to be changed."""
    if "checkpoint" not in FOUND:
        config = dataclasses.replace(
            make_config(max_steps=1), output_dir=str(tmp_path_factory.mktemp("trained"))
        )
        FOUND["checkpoint"] = train(config).folder / "checkpoint-1"
    found = FOUND["checkpoint"]
    assert isinstance(found, Path)
    return found


@pytest.fixture
def run(trained, make_config, tmp_path_factory) -> Run:
    """A run that can go on from there. A refusal leaves half of a state in it, and the next try
    replaces that."""
    if "run" not in FOUND:
        folder = str(tmp_path_factory.mktemp("going_on"))
        config = dataclasses.replace(make_config(max_steps=2), output_dir=folder)
        FOUND["run"] = prepare(config, fresh=False)
        resume(FOUND["run"], str(trained))  # the good one is taken
    found = FOUND["run"]
    assert isinstance(found, Run)
    return found


@pytest.fixture
def tree(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "tree" / "checkpoint")
    (tmp_path / "tree" / "secret").write_text(harm.SECRET)
    return tmp_path / "tree"


def base_hash(run: Run) -> str:
    digest = hashlib.sha256()
    for name, value in run.model.base.state_dict().items():
        if "dylora" not in name:
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("case", hostile.RUN, ids=lambda case: f"{case.file}: {case.name}")
def test_a_hostile_state_is_refused_and_changes_no_folder(case, run, tree):
    checkpoint = tree / "checkpoint"
    case.damage(checkpoint / case.file)
    harm.seal(checkpoint)
    before = base_hash(run), harm.snapshot(run.folder)
    message = harm.refusal(lambda: resume(run, str(checkpoint)), tree)
    assert (base_hash(run), harm.snapshot(run.folder)) == before
    assert str(checkpoint) in message
    assert case.file in message
    assert case.words in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a call of the system", "a step of 10^30"])
def test_the_command_says_in_one_line_why_it_does_not_resume(
    name, run, tree, make_config, tmp_path, capsys
):
    case = next(case for case in hostile.RUN if case.name == name)
    case.damage(tree / "checkpoint" / case.file)
    harm.seal(tree / "checkpoint")
    config = tmp_path / "config.yaml"
    config.write_text(dump_run_config(make_config(max_steps=2)))
    arguments = ["train", "--config", str(config), "--resume_from_checkpoint"]
    assert main([*arguments, str(tree / "checkpoint")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {tree / 'checkpoint' / case.file}")
    assert not Path("owned").exists()


def test_a_run_goes_on_from_what_was_tried_before(run, trained):
    """None of the refusals before has left anything behind that a resume does not replace."""
    resume(run, str(trained))
    saved = torch.load(trained / "optimizer.pt", weights_only=True)
    assert run.progress.step == 1
    for name, parameter in run.model.router_parameters():
        assert torch.equal(run.optimizer.state[parameter]["exp_avg"], saved[name]["exp_avg"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("scale", value) for value in (0.0, -1.0, math.inf, 1e30 * 1e30, 1e-50, True, "1")),
        *(("_growth_tracker", value) for value in (-1, 0.5, 2001, math.inf)),
        *(("growth_factor", value) for value in (0.0, 1e30, 4.0)),
        *[("backoff_factor", 2.0), ("growth_interval", 0), ("growth_interval", 10**30)],
    ],
)
def test_a_state_of_the_scaler_that_no_run_comes_to_is_refused(name, value):
    ours = torch.amp.GradScaler("cpu").state_dict()
    check_scaler(Path("scheduler.pt"), {**ours, "scale": 2.0**20, "_growth_tracker": 7}, ours)
    with pytest.raises(ValueError, match=f"scheduler.pt: scaler.{name} is .*, which is invalid"):
        check_scaler(Path("scheduler.pt"), {**ours, name: value}, ours)


def test_the_state_of_every_schedule_is_taken_back(make_config):
    """What may be unset at the start and set later is no reason to refuse."""
    for schedule in ("reduce_lr_on_plateau", "greedy"):
        changes = {"lr_scheduler_type": schedule, "warmup_steps": 0, "eval_steps": 1}
        first = train(make_config(schedule, max_steps=2, save_steps=1, **changes))
        train(make_config(schedule, max_steps=2, **changes), str(first.folder / "checkpoint-1"))


# Data


@pytest.fixture
def rows(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "good.jsonl").write_bytes(hostile.ROW)
    read_source(source(tmp_path / "data" / "good.jsonl"))  # imports what takes a second
    return tmp_path / "data"


def source(file: Path) -> SourceConfig:
    return SourceConfig(
        name="mine", path=str(file), instruction_column="question", output_column="answer"
    )


@pytest.mark.parametrize("case", hostile.DATA, ids=lambda case: f"{case.file}: {case.name}")
def test_hostile_data_is_refused(case, rows):
    file = rows / case.file
    file.touch()
    case.damage(file)
    message = harm.refusal(lambda: read_source(source(file)), rows)
    assert str(file) in message
    assert case.words in message


def test_a_hostile_line_costs_itself_alone(rows):
    file = rows / "rows.jsonl"
    lines = [hostile.ROW.rstrip(), hostile.DEEP, b"\xff", b'{"question": ' + b"9" * 5000 + b"}"]
    file.write_bytes(
        b"\n".join([*lines, b" " * (17 << 20), json.dumps({"question": "c"}).encode()])
    )
    found = read_source(source(file))
    assert found.rows["instruction"] == ["a"]
    assert (found.counts.read, found.counts.malformed) == (6, 5)
    assert [problem.partition(": ")[0] for problem in found.counts.problems] == [
        f"{file}:{line}" for line in (2, 3, 4, 5, 6)
    ]
