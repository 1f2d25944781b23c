"""A config in its place, and commands that must fail."""

from pathlib import Path

import pytest

from dylora.cli.main import main


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Writes configs/x.yaml, so that messages are the same everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DYLORA_TRACEBACK", raising=False)
    (tmp_path / "configs").mkdir()

    def write(text: str) -> str:
        Path("configs/x.yaml").write_text(text, encoding="utf-8")
        return "configs/x.yaml"

    return write


@pytest.fixture
def refusal(capsys):
    """Runs a command that must fail with exit code 2; its one line, without "error: "."""

    def run(*argv: str) -> str:
        assert main(list(argv)) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        assert err.startswith("error: "), err
        return err.removeprefix("error: ").rstrip("\n")

    return run
