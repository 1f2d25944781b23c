"""`run.py benchmark` on the embedded base: its files, its continuation, what it refuses."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.cli.main import main
from dylora.evaluation.passk import sampling
from dylora.evaluation.passk.benchmark import read_tasks
from dylora.evaluation.passk.options import BenchmarkOptions
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.published import published_lines, read_scores
from dylora.evaluation.passk.sampling import read_samples
from dylora.evaluation.passk.suites import SUITES, Suite
from dylora.sandbox.host import Result, Sandbox

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

    def recite(model, tokenizer, problems, **settings):
        known = [not one.task_id.endswith("5") for one in problems]
        known = [False] * len(known) if model.mixture.state.mine.disabled else known
        pairs = zip(problems, known, strict=True)
        return [one.reference if knows else "def nothing(): pass" for one, knows in pairs]

    monkeypatch.setattr(sampling, "generate", recite)


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
    assert results["libraries"].keys() >= {"python", "dylora", "torch", "transformers", "datasets"}
    assert results["settings"]["base"] == "tiny-code-llama"
    assert results["config"]["eval"]["batch_size"] == 2
    assert len(results["settings"]["checkpoint_sha256"]) == 64
    assert suite["source"]["path"] == str(folder / "mbpp.jsonl")
    assert len(suite["source"]["sha256"]) == 64
    assert suite["first_prompt"].startswith("### Instruction:\nWrite a function that adds 11.")
    assert suite["sampling"]["seed"] == 0
    lines = (tmp_path / "mbpp.checkpoint.jsonl").read_text().splitlines()
    assert {tuple(json.loads(line)) for line in lines} == {("task_id", "solution")}


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
        (["--task_files", "mbpp"], "must be a mapping, each value a string (SUITE=FILE,...)"),
        (["--task_files", "humaneval=x"], "'humaneval', which --tasks does not"),
        (["--limit", "0"], "--limit"),
        (["--shots", "2"], "--shots is '2', but must be one of 0, 3"),
        (["--shots", "3"], "lacks task 2, which 3 shots need"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(folder, tmp_path, capsys, more, message):
    assert command(folder, tmp_path, *more) == 2
    assert message in capsys.readouterr().err


def test_a_split_of_suites_that_have_none_is_refused():
    with pytest.raises(ValueError, match="--split is 'train', but must be test, or go with a task"):
        read_tasks(BenchmarkOptions(tasks=("skills/sql", "humaneval"), split="train"))


def test_a_folder_of_other_settings_is_refused(folder, tmp_path, capsys, by_heart):
    assert command(folder, tmp_path) == 0
    assert command(folder, tmp_path, "--seed", "1") == 2
    assert "made with seed = 0, not 1" in capsys.readouterr().err


def test_another_file_for_a_suite_that_has_samples_is_refused(folder, tmp_path, capsys, by_heart):
    assert command(folder, tmp_path) == 0
    other = tmp_path / "other.jsonl"
    other.write_text((folder / "mbpp.jsonl").read_text() + "\n")
    assert command(folder, tmp_path, "--task_files", f"mbpp={other}") == 2
    assert "holds samples of mbpp from" in capsys.readouterr().err


# Skills


def test_each_skill_is_a_suite_with_the_same_statistics(folder: Path, tmp_path: Path, by_heart):
    options = ["--config", str(folder / "config.yaml"), "--checkpoint", str(folder / "checkpoint")]
    more = ["--tasks", "skills", "--limit", "6", "--out", str(tmp_path), "--workers", "1"]
    assert main(["benchmark", *options, *more]) == 0
    suites = json.loads((tmp_path / "results.json").read_text())["suites"]
    assert list(suites) == [
        *("skills/lists", "skills/strings", "skills/sql"),
        *("skills/regex", "skills/json", "skills/arithmetic"),
    ]
    for suite in suites.values():
        assert suite["checkpoint"]["outcomes"]["passed"] == 5
        assert suite["checkpoint"]["pass@k"]["1"]["mean"] == pytest.approx(5 / 6)
        assert suite["comparison"]["better"] == 5
        assert suite["sampling"]["max_new_tokens"] == 64
    assert (tmp_path / "skills.sql.base.jsonl").exists()


def test_a_skill_has_no_file(folder, tmp_path, capsys):
    assert command(folder, tmp_path, "--tasks", "skills/sql", "--task_files", "skills/sql=x") == 2
    assert "skills/sql is generated" in capsys.readouterr().err


# Another kind of benchmark


class ExactMatch(NamedTuple):
    """All that a suite of questions with one right answer needs beside its row of the table."""

    expected: str
    runs_programs = False

    def check(self, answer: str, sandbox: Sandbox | None) -> Result:
        return Result("passed" if answer.strip() == self.expected else "failed")


def capital(row: dict) -> Problem:
    return Problem(
        task_id=row["id"],
        prompt=row["question"],
        prefix="",
        stops=("\n",),
        reference=row["answer"],
        texts=(row["question"],),
        checker=ExactMatch(row["answer"]),
    )


def test_a_benchmark_that_is_not_code_is_a_checker_and_a_row_of_the_table(
    folder: Path, tmp_path: Path, by_heart, monkeypatch
):
    row = Suite("nobody/capitals", ("id", "question", "answer"), capital, "0-shot, the question")
    monkeypatch.setitem(SUITES, "capitals", row)
    monkeypatch.setattr(Sandbox, "_start", None)  # nothing is run, so no sandbox is needed
    rows = [{"id": f"c/{n}", "question": f"Capital {n}?", "answer": f"City {n}"} for n in (4, 5)]
    file = tmp_path / "capitals.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    files = ["--config", str(folder / "config.yaml"), "--checkpoint", str(folder / "checkpoint")]
    asked = ["--tasks", "capitals", "--task_files", f"capitals={file}", "--max_new_tokens", "8"]
    assert main(["benchmark", *files, *asked, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["suites"]["capitals"]["checkpoint"]["outcomes"] == {"failed": 1, "passed": 1}
    assert results["sandbox"] == "nothing: no programs are run"


# Published scores


def test_a_known_base_gets_its_published_scores_and_an_unknown_one_the_advice_to_find_one():
    lines = published_lines("google/codegemma-2b", "humaneval")
    assert any("31.1" in line for line in lines)
    assert any("7.8" in line and "#261" in line for line in lines)
    (line,) = published_lines("tiny-code-llama", "humaneval")
    assert "no published score of tiny-code-llama on humaneval" in line


def test_every_published_score_is_of_a_suite_that_exists():
    scores = read_scores()
    assert {suite for suites in scores.values() for suite in suites} <= SUITES.keys()
    assert len(scores) == 6
    assert sum(len(found) for suites in scores.values() for found in suites.values()) == 38


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ""}, "settings and source"),
        ({"percent": 310}, "percentage"),
        ({"n": 1}, "fields"),
    ],
)
def test_a_published_score_without_provenance_or_out_of_range_is_refused(tmp_path, change, message):
    row = {"percent": 31.0, "how": "greedy", "source": "somebody"} | change
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"base": {"humaneval": [row]}}))
    with pytest.raises(ValueError, match=message):
        read_scores(file)
