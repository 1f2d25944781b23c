"""`docs/options.md` says of every field what the code does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import options
from dylora import MoELoraConfig
from dylora.cli.main import main
from dylora.cli.options import config_help

DOCUMENT = Path(__file__).parents[2] / "docs" / "options.md"


def test_the_document_is_what_the_code_writes():
    assert DOCUMENT.read_text(encoding="utf-8") == options.document()


def test_every_field_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [item.name for item in fields(MoELoraConfig)]


def test_the_meanings_are_those_of_the_help():
    shown = " ".join(config_help().split())
    assert [name for name, text in options.meanings().items() if text not in shown] == []


@pytest.mark.parametrize("name", options.REFUSED)
def test_a_value_outside_its_range_is_refused(name):
    assert options.refusal(name)


def test_every_number_has_a_range():
    """But for maturity_rho: a threshold of an improvement may lie on either side of 0."""
    numbers = (int, float, int | None, float | None)
    names = {item.name for item in fields(MoELoraConfig) if item.type in numbers}
    assert names - options.REFUSED.keys() == {"maturity_rho"}


def test_every_source_that_is_named_is_listed_and_the_other_way_round():
    named = {source for sources in options.SOURCES.values() for source in sources}
    assert named == options.PAPERS.keys()
    assert options.SOURCES.keys() <= {item.name for item in fields(MoELoraConfig)}


@pytest.mark.parametrize("command", ["evaluate", "benchmark"])
def test_the_help_of_a_command_lists_no_field_that_a_checkpoint_decides(command, capsys):
    assert main([command, "--help"]) == 0
    shown = set(re.findall(r"^  --([\w.]+)", capsys.readouterr().out, re.MULTILINE))
    assert {"checkpoint", "routing.top_k_experts", "model.dtype", "eval.batch_size"} <= shown
    assert [key for key in shown if key.startswith(("moe.", "log."))] == []
    assert [key for key in shown if key.startswith("train.")] in ([], ["train.training_subset"])
