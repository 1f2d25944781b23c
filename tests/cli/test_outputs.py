"""Places that cannot be written, and long values: one line, exit code 2."""

from pathlib import Path

import pytest

from dylora.cli import main as module
from dylora.cli.main import main

ROWS = "sources: [{name: skill/sql, rows: 12}]"
CONFIG = f"model: {{base: tiny-code-llama, dtype: float32, device: cpu}}\ndata: {{{ROWS}}}\n"


def test_a_name_longer_than_a_file_system_takes_is_refused(config_file, refusal):
    said = refusal("train", "--config", config_file(CONFIG), "--name", "n" * 300)
    assert said.startswith("command line: name is 'nnn")
    assert said.endswith("but must be of at most 255 bytes, as file systems want it")


def test_an_output_below_a_file_is_one_line(config_file, refusal):
    path = config_file(CONFIG)
    Path("file").write_text("")
    said = refusal("train", "--config", path, "--output_dir", "file")
    assert said.startswith("file/run cannot be written (file/run: Not a directory): give another")


def test_a_run_in_the_place_of_a_file_is_one_line(config_file, refusal):
    path = config_file(CONFIG)
    Path("runs").mkdir()
    Path("runs/run").write_text("")
    said = refusal("train", "--config", path)
    assert said.startswith("runs/run cannot be written (runs/run: File exists): give another")


def test_a_read_only_output_is_one_line(config_file, refusal, monkeypatch):
    path = config_file(CONFIG)

    def refuse(self, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = refusal("train", "--config", path)
    assert said.startswith("runs/run cannot be written (runs/run: Permission denied): give another")


def test_a_lock_that_is_a_folder_is_one_line(config_file, refusal):
    path = config_file(CONFIG)
    Path("runs/run/trainer.lock").mkdir(parents=True)
    said = refusal("train", "--config", path)
    assert "runs/run cannot be written (runs/run/trainer.lock: Is a directory)" in said


def test_metrics_that_are_a_folder_are_one_line(config_file, refusal):
    path = config_file(CONFIG)
    Path("runs/run/metrics.jsonl").mkdir(parents=True)
    said = refusal("train", "--config", path)
    assert said == "runs/run/metrics.jsonl is a folder: remove it, or give another --name"


@pytest.mark.parametrize("error", [PermissionError, NotADirectoryError, IsADirectoryError])
def test_an_error_of_the_file_system_is_one_line_with_the_file(refusal, monkeypatch, error):
    def fail(tokens):
        raise error(1, "Cannot be", "out/file")

    monkeypatch.setattr(module, "_dispatch", fail)
    assert refusal("info") == "out/file: Cannot be"


def test_a_long_error_keeps_its_beginning_and_its_remedy(refusal, monkeypatch):
    def fail(tokens):
        raise ValueError("what " + "x" * 5000 + " do this")

    monkeypatch.setattr(module, "_dispatch", fail)
    said = refusal("info")
    assert len(said) <= 1000
    assert said.startswith("what xxx")
    assert said.endswith("xxx do this")


@pytest.mark.parametrize("where", ["key", "value", "command"])
def test_a_long_word_of_the_command_line_gives_a_short_error(capsys, where):
    long = "x" * 100_000
    words = {"key": ["info", "--config", "c", f"--{long}", "1"], "command": [long]}
    words["value"] = ["info", "--config", "c", "--train.seed", long]
    assert main(words[where]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) <= 1010


def test_a_report_without_a_folder_to_write_into_is_refused_before_prompts_are_answered(refusal):
    said = refusal("report", "run", "--prompt", "x", "--out", "nowhere/page.html")
    assert said == "--out is 'nowhere/page.html', but must be a file in a folder that exists"
