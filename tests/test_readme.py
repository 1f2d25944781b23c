"""The README's examples run, and its words are true of the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", PYTHON_BLOCKS, ids=lambda block: block.strip().splitlines()[0])
def test_every_python_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert PYTHON_BLOCKS


def test_every_file_it_names_exists():
    named = set(re.findall(r"`((?:dylora|configs|tests|experiments|docs)/[\w./-]+)`", README))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


DOCUMENTS = [ROOT / "CONTRIBUTING.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document):
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:[\w-]+/)+[\w-]+\.(?:py|yaml|md|sh))", text))
    roots = [ROOT, ROOT / "dylora", ROOT / "dylora" / "evaluation", ROOT / "experiments"]
    missing = [name for name in sorted(named) if not any((r / name).exists() for r in roots)]
    missing = [name for name in missing if "NAME" not in name]
    assert missing == []


def test_every_command_it_shows_is_one():
    from dylora.cli.main import COMMANDS

    shown = set(re.findall(r"run\.py (\w+)", README))
    assert shown
    assert shown <= set(COMMANDS)


def test_every_make_target_it_shows_is_one():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {a or b for a, b in re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE)}
    assert shown
    assert shown <= targets
