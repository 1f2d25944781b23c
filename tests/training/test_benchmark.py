"""A benchmark between the steps of a run: when it runs, and that the run is none the wiser."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dylora.evaluation.passk import callback
from dylora.evaluation.passk.callback import Benchmark
from dylora.evaluation.passk.sampling import read_samples
from dylora.training import loop
from dylora.training.run import Run
from parallel_runs import benchmark_here
from processes import results_of
from runs import STEPS, all_tensors, rows_of

PASS = 7  # the step that ends the first pass: 27 rows, 4 a step


def train(config, resume_from_checkpoint: str | None = None) -> Run:
    """As run.py train does it."""
    return loop.train(config, resume_from_checkpoint, callbacks=[Benchmark()])


@pytest.fixture
def tasks_file(tmp_path) -> Path:
    rows = [
        {
            "task_id": number,
            "text": f"Add {number}.",
            "code": f"def a(x):\n    return x + {number}",
            "test_list": [f"assert a(0) == {number}"],
            "test_setup_code": "",
        }
        for number in range(11, 15)
    ]
    file = tmp_path / "mbpp.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def benchmarked(make_config, tasks_file):
    """A config with a benchmark of two tasks."""

    def make(name: str, strategy: str = "epoch", **changes):
        settings = {
            "benchmark_strategy": strategy,
            "benchmark_tasks": ["mbpp"],
            "benchmark_limit": 2,
            "benchmark_files": {"mbpp": str(tasks_file)},
        }
        return make_config(name, **settings | changes)

    return make


def scores(folder: Path) -> list[int]:
    """The steps that have a score."""
    return [row["step"] for row in rows_of(folder) if "eval/mbpp/pass@1" in row]


def same_run(one: Path, other: Path) -> bool:
    a, b = (all_tensors(folder / f"checkpoint-{STEPS}") for folder in (one, other))
    plain = [
        [row for row in rows_of(folder) if "eval/mbpp/pass@1" not in row] for folder in (one, other)
    ]
    return plain[0] == plain[1] and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_with_a_benchmark_is_the_run_without_one(make_config, benchmarked):
    without = train(make_config("without", eval_steps=4)).folder
    run = train(benchmarked("with", eval_steps=4))
    assert run.folder.name == "with"
    assert scores(run.folder) == [PASS, STEPS]
    assert same_run(without, run.folder)


def test_final_is_after_the_last_step_alone_and_none_is_never(benchmarked):
    run = train(benchmarked("final", "final"))
    assert scores(run.folder) == [STEPS]
    assert sorted(p.name for p in (run.folder / "benchmark").iterdir()) == [f"step-{STEPS}"]
    assert scores(train(benchmarked("none", "none")).folder) == []


def test_a_run_that_stops_early_has_its_benchmark_then(benchmarked):
    changes = {"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 1e-12}
    run = train(benchmarked("early", "final", **changes))
    assert run.progress.step < STEPS
    assert scores(run.folder) == [run.progress.step]


@pytest.mark.parametrize("where", ["sample_to_file", "score"])
def test_a_signal_in_a_benchmark_leaves_it_due_and_loses_nothing(benchmarked, monkeypatch, where):
    whole = train(benchmarked("whole")).folder
    original, calls = getattr(callback, where), 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(callback, where, signalled)
    with pytest.raises(SystemExit):
        train(benchmarked("parts"))
    parts = whole.parent / "parts"
    assert scores(parts) == []
    state = json.loads((parts / f"checkpoint-{PASS}" / "trainer_state.json").read_text())
    assert state["benchmark_due"] is True
    train(benchmarked("parts"), "latest")
    assert scores(parts) == [PASS, STEPS]
    assert same_run(whole, parts)
    for step in (PASS, STEPS):
        one, other = (
            read_samples(folder / "benchmark" / f"step-{step}" / "mbpp.jsonl")
            for folder in (whole, parts)
        )
        assert one == other
        assert len(one) == 2


def test_a_resumed_run_does_not_repeat_a_benchmark_and_sets_later_ones_aside(benchmarked):
    folder = train(benchmarked("a")).folder
    train(benchmarked("a"), str(folder / f"checkpoint-{PASS}"))
    assert scores(folder) == [PASS, STEPS]
    assert sorted(path.name for path in (folder / "benchmark").iterdir()) == [
        f"step-{STEPS}",
        f"step-{STEPS}.superseded",
        f"step-{PASS}",
    ]


def test_a_suite_that_cannot_be_used_is_told_before_the_first_step(benchmarked, tmp_path):
    with pytest.raises(ValueError, match="unknown suite 'mbp'; did you mean 'mbpp'"):
        train(benchmarked("a", benchmark_tasks=["mbp"], benchmark_files={}))
    assert not list((tmp_path / "runs" / "a").glob("checkpoint-*"))
    with pytest.raises(ValueError, match=r"eval\.benchmark_files names 'mbpp', which eval"):
        train(benchmarked("a", benchmark_tasks=["skills/sql"]))
    with pytest.raises(ValueError, match=r"benchmark_tasks is \[\]"):
        benchmarked("b", benchmark_tasks=[])


def test_tasks_that_the_run_trains_on_are_left_out(benchmarked, tasks_file, monkeypatch):
    said = []
    monkeypatch.setattr("dylora.training.log.RunLog.info", lambda self, text: said.append(text))
    row = json.loads(tasks_file.read_text().splitlines()[0])
    row |= {"text": "Add 3 and 4."}  # what the run's rows ask, too
    tasks_file.write_text("\n".join([json.dumps(row), *tasks_file.read_text().splitlines()[1:]]))
    train(benchmarked("a", "final", max_steps=1))
    assert any("1 tasks of mbpp (1 trained ones left out)" in line for line in said)


def test_a_benchmark_without_its_callback_is_refused_before_anything_is_loaded(benchmarked):
    config = benchmarked("a")
    with pytest.raises(ValueError, match=r"eval\.benchmark_strategy needs the callback"):
        loop.train(config)
    assert not (Path(config.output_dir) / "a").exists()


def test_processes_share_the_tasks_of_a_benchmark_and_have_the_answers_of_one(benchmarked):
    changes = {"max_steps": 1, "benchmark_limit": 3, "batch_size": 1}
    one = benchmarked("one", "final", **changes)
    train(one)
    both = results_of(2, benchmark_here, benchmarked("two", "final", parallel="ddp", **changes))
    assert sorted(map(len, both)) == [1, 2]
    assert len({*both[0], *both[1]}) == 3
    root = Path(one.output_dir)
    files = [root / name / "benchmark" / "step-1" / "mbpp.jsonl" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert scores(root / "two") == [1]
