"""The cache of tokenised sets gives what reading gives, and only for the same data and settings."""

import dataclasses
import json

import pytest
from safetensors import SafetensorError

from dylora.data import prepare
from dylora.data.prepare import load_data
from dylora.data_config import DataConfig, SourceConfig
from dylora.training.settings import TAKEN
from run_fixtures import build_tokenizer

ROWS = [{"question": f"Q{n}", "answer": f"A{n}" * (n % 4 + 1)} for n in range(1, 30)]


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "r.jsonl", [*ROWS, {"question": "no answer"}])
    source = SourceConfig(name="own", path=str(tmp_path / "r.jsonl"))
    return DataConfig(sources=[source], cache=str(tmp_path / "cache"), max_length=64)


@pytest.fixture
def reads(monkeypatch):
    """Names of the sources that were read."""
    found = []
    read = prepare.read_source
    monkeypatch.setattr(
        prepare, "read_source", lambda s, **more: found.append(s.name) or read(s, **more)
    )
    return found


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def content(data):
    sets = [[one[index] for index in range(len(one))] for one in (*data.train, *data.validation)]
    described = [report.describe().replace(" (data.cache has them)", "") for report in data.reports]
    return sets, data.provenance, described


def test_a_cached_set_is_the_set_that_was_read(config, reads, tokenizer):
    first = load_data(config, tokenizer, training_subset=20)
    again = load_data(config, tokenizer, training_subset=20)
    assert reads == ["own"]
    assert content(first) == content(again)
    assert "(data.cache has them)" in again.reports[0].describe()
    assert "r.jsonl:30: no 'answer'" in again.reports[0].describe()
    alone = load_data(dataclasses.replace(config, cache=None), tokenizer, training_subset=20)
    assert content(alone) == content(first)
    again.train[0].append([1], [2])  # it can still grow
    assert again.train[0][len(again.train[0]) - 1] == {"input_ids": [1, 2], "labels": [-100, 2]}


def test_whatever_changes_ids_makes_the_cache_anew(config, reads, tokenizer, tmp_path):
    load_data(config, tokenizer)
    source = config.sources[0]

    def anew(data_config=config, tokens=tokenizer, **subsets):
        before = len(reads)
        load_data(data_config, tokens, **subsets)
        return len(reads) > before

    changes = (
        {"max_length": 32},
        {"over_long": "truncate"},
        {"seed": 1},
        {"template": "plain"},
        {"train_on_inputs": True},
        {"sources": [dataclasses.replace(source, split="50/50")]},
    )
    for change in changes:
        assert anew(dataclasses.replace(config, **change)), change
    assert anew(training_subset=3)
    assert anew(training_subset=0.5)
    assert anew(eval_subset=1)
    assert anew(tokens=build_tokenizer(begins=False))
    assert not anew(dataclasses.replace(config, interleaved_sampling=False, bucket_steps=3))
    assert not anew(dataclasses.replace(config, sources=[dataclasses.replace(source, weight=2.0)]))
    write(tmp_path / "r.jsonl", ROWS[::-1])
    assert anew()
    assert "cache" in TAKEN["data"]  # a run may go on without it


def test_a_damaged_file_is_made_anew(config, reads, tokenizer, tmp_path):
    first = content(load_data(config, tokenizer))
    [file] = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    for damaged in (whole[:-7], whole[:-8] + bytes(8), b"", b"x" * 100):
        file.write_bytes(damaged)
        before = len(reads)
        assert content(load_data(config, tokenizer)) == first
        assert len(reads) == before + 1
        assert file.read_bytes() == whole
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [file.name]


def test_only_what_cannot_change_is_kept(config, tokenizer, tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    tables = DatasetDict(train=Dataset.from_list(ROWS))
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: tables)
    for source, kept in (
        (SourceConfig(name="skill/sql", rows=4), 0),
        (SourceConfig(name="hub", path="a/b"), 0),
        (SourceConfig(name="hub", path="a/b", revision="main"), 0),
        (SourceConfig(name="code_alpaca"), 0),
        (SourceConfig(name="code_alpaca", revision="main"), 0),
        (SourceConfig(name="hub", path="a/b", revision="0" * 40), 1),
        (SourceConfig(name="code_alpaca", revision="0" * 40), 2),
    ):
        wider = dataclasses.replace(config, sources=[source], max_length=512)
        load_data(wider, tokenizer, eval_subset=2)
        assert len(list((tmp_path / "cache").glob("*"))) == kept


def test_a_folder_that_cannot_be_written_is_one_clear_error(config, tokenizer, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"data\.cache: .* cannot be written: "):
        load_data(config, tokenizer)


def test_a_full_disk_is_one_clear_error(config, tokenizer, monkeypatch):
    def full(tensors, file):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dylora.data.cache.save_file", full)
    with pytest.raises(ValueError, match=r"data\.cache: .* cannot be written: .*No space left"):
        load_data(config, tokenizer)
