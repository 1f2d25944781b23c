"""`run.py benchmark` on the embedded base: its files, its continuation, what it refuses."""

import json
from pathlib import Path

import pytest

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.cli import main
from dylora.evaluation import benchmark
from dylora.evaluation.benchmark import read_samples

TASKS = [
    {
        "task_id": number,
        "text": f"Write a function that adds {number}.",
        "code": f"def add_{number}(x):\r\n    return x + {number}",
        "test_list": [f"assert add_{number}(1) == {number + 1}", f"assert add_{number}(0) == 0"],
        "test_setup_code": "",
    }
    for number in range(11, 16)
]
for _task in TASKS:
    _task["test_list"][1] = f"assert add_{_task['task_id']}(0) == {_task['task_id']}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config, a checkpoint that was trained on Mbpp/12, and a small MBPP."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = DyLoRA_MoE.from_base("tiny-code-llama", MoELoraConfig(num_experts=2, r=2))
    model.training_record = {"data": {"sources": [{"name": "mbpp", "task_ids": [12]}]}}
    model.save_pretrained(folder / "checkpoint")
    lines = "\n".join(json.dumps(task) for task in TASKS)
    (folder / "mbpp.jsonl").write_text(lines)
    (folder / "config.yaml").write_text(
        "name: b\nmodel: {base: tiny-code-llama, dtype: float32, device: cpu}\n"
        "eval: {batch_size: 2}\ndata: {sources: [{name: skill/sql}]}\n"
    )
    return folder


def command(folder: Path, out: Path, *more: str) -> int:
    options = {"config": "config.yaml", "checkpoint": "checkpoint"}
    given = [word for key, name in options.items() for word in (f"--{key}", str(folder / name))]
    return main(
        [
            *("benchmark", *given, "--tasks", "mbpp", "--out", str(out), "--max_new_tokens", "8"),
            *("--task_files", f"mbpp={folder / 'mbpp.jsonl'}", "--workers", "1", *more),
        ]
    )


@pytest.fixture
def by_heart(monkeypatch):
    """A model whose adapters know the answers to all tasks but one; its base knows none."""

    def generate(model, tokenizer, problems, options):
        off = not model.injection.state.enabled
        for problem in problems:
            knows = not off and problem.task_id != "Mbpp/15"
            yield problem, problem.reference if knows else "def nothing(): pass"

    monkeypatch.setattr(benchmark, "_generate", generate)


def test_a_trained_task_is_left_out_and_the_rest_scored(folder: Path, tmp_path: Path, by_heart):
    assert command(folder, tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    suite = results["suites"]["mbpp"]
    assert (suite["tasks"], suite["trained_tasks"], suite["trained_tasks_are"]) == (
        4,
        1,
        "left out",
    )
    assert suite["checkpoint"]["outcomes"] == {"error": 1, "passed": 3}
    assert suite["checkpoint"]["pass@k"]["1"]["mean"] == 0.75
    assert suite["base"]["outcomes"] == {"error": 4}
    assert (suite["comparison"]["better"], suite["comparison"]["p_value"]) == (3, 0.25)
    assert "landlock" in results["sandbox"]


def test_trained_tasks_can_be_included_and_that_is_said(folder: Path, tmp_path: Path, by_heart):
    assert command(folder, tmp_path, "--include-trained") == 0
    suite = json.loads((tmp_path / "results.json").read_text())["suites"]["mbpp"]
    assert (suite["tasks"], suite["trained_tasks_are"]) == (5, "scored")


def test_a_killed_benchmark_goes_on_without_repeating_or_losing_a_sample(
    folder: Path, tmp_path: Path
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--samples", "3", "--k", "1,3", "--temperature", "0.8"]
    assert command(folder, whole, *more) == 0
    samples = (whole / "mbpp.checkpoint.jsonl").read_bytes()
    assert command(folder, killed, *more) == 0
    cut = killed / "mbpp.checkpoint.jsonl"
    cut.write_bytes(samples[: samples.index(b"\n", len(samples) // 2) + 20])
    (killed / "results.json").unlink()
    assert command(folder, killed, *more) == 0
    first, second = read_samples(whole / cut.name), read_samples(cut)
    assert {task: len(found) for task, found in second.items()} == dict.fromkeys(first, 3)
    assert first == second


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "2"], "--samples above 1 needs a --temperature"),
        (["--k", "2"], "pass@2 needs at least 2 samples"),
        (["--k", "x"], "--k is 'x'"),
        (["--split", "tset"], "no split 'tset'; did you mean 'test'?"),
        (["--task_files", "mbpp"], "must be SUITE=FILE"),
        (["--task_files", "humaneval=x"], "'humaneval', which --tasks does not"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(folder, tmp_path, capsys, more, message):
    assert command(folder, tmp_path, *more) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_other_settings_is_refused(folder, tmp_path, capsys, by_heart):
    assert command(folder, tmp_path) == 0
    assert command(folder, tmp_path, "--seed", "1") == 2
    assert "made with seed = 0, not 1" in capsys.readouterr().err
