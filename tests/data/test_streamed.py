"""Sets that are read while they are trained on."""

import dataclasses
import json
import logging
import shutil
from collections import Counter

import pytest
import torch
from datasets import IterableDataset

from dylora.data import sources
from dylora.data.prepare import load_data
from dylora.data.record import RowCounts
from dylora.data.sampler import InterleavedSampler
from dylora.data.streamed import StreamedSet
from dylora.data.tokenize import SplitReport, TokenizedSet, TokenizedSplit
from dylora.run_config import DataConfig, RunConfig, SourceConfig, StageConfig
from dylora.training.loop import train
from run_fixtures import build_tokenizer
from runs import all_tensors, rows_of


@pytest.fixture
def held_out(tmp_path):
    """Three rows, of which the first is in `rows_file`, too."""
    rows = [{"question": "Add 0 and 1.", "answer": "11"}]
    rows += [{"question": f"Add {n} and {n}.", "answer": str(2 * n)} for n in (50, 51)]
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def source(rows_file, held_out):
    columns = {"instruction_column": "question", "output_column": "answer"}
    paths = {"path": str(rows_file), "validation_path": str(held_out)}
    return SourceConfig(name="rows", **columns, **paths)


def streamed(source: SourceConfig, rows: int) -> SourceConfig:
    return dataclasses.replace(source, stream_rows=rows)


def load(source: SourceConfig):
    return load_data(DataConfig(sources=[source], max_length=64), build_tokenizer())


def drawn(examples, count: int) -> list[str]:
    return [str(examples[index]) for index in range(count)]


def test_a_pass_gives_each_row_once_mixed_by_block_and_none_that_is_held_out(source, monkeypatch):
    monkeypatch.setattr(sources, "STREAMED_RECORDS", 8)
    whole, parts = load(source), load(streamed(source, 10))
    rows = drawn(whole.train[0], len(whole.train[0]))
    found = drawn(parts.train[0], 29)
    assert len(rows) == 29
    assert sorted(found) == sorted(rows)
    assert found != rows
    assert [sorted(found[a:b]) for a, b in ((0, 7), (7, 15))] == [
        sorted(rows[a:b]) for a, b in ((0, 7), (7, 15))
    ]
    assert len(parts.train[0]) == 10
    assert drawn(parts.validation[0], 3) == drawn(whole.validation[0], 3)


def test_a_source_that_ends_begins_again_and_says_so(source, caplog):
    examples = load(streamed(source, 100)).train[0]
    with caplog.at_level(logging.WARNING, "dylora"):
        found = Counter(drawn(examples, 58))
    assert set(found.values()) == {2}
    assert caplog.messages == ["source rows begins again after 29 examples"]
    assert drawn(examples, 29) == drawn(load(streamed(source, 5)).train[0], 29)


def endless(taken: list[int]):
    while True:
        taken.append(len(taken))
        yield "rows", RowCounts(2, 0, 0, 0, ())


def two_rows(rows):
    examples = TokenizedSet("own", "train")
    examples.append([1], [2])
    examples.append([1], [2, 3])
    return TokenizedSplit(examples, SplitReport(2, 2, 0, 0, 5, 3), [], [], set())


def test_no_more_is_read_than_the_block_that_an_example_is_in():
    taken = []
    examples = StreamedSet("own", 10**9, 0, lambda: endless(taken), two_rows)
    assert len(taken) == 1
    drawn(examples, 9)
    assert len(taken) == 5


def test_ids_that_the_base_does_not_have_are_refused_where_they_come():
    examples = StreamedSet("own", 9, 0, lambda: endless([]), two_rows)
    examples.embeddings = 3
    with pytest.raises(ValueError, match="source 'own' has the token id 3, but the base has 3"):
        examples[2]


def test_rows_that_cannot_be_used_are_told_where_they_are_read(source, tmp_path, caplog):
    lines = [json.dumps({"question": f"Add {n}.", "answer": str(n)}) for n in range(5000)]
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join([*lines[:4500], "{", *lines[4500:]]) + "\n")
    examples = load(dataclasses.replace(streamed(source, 5000), path=str(file))).train[0]
    with caplog.at_level(logging.WARNING, "dylora"):
        examples[4200]
    [message] = caplog.messages
    assert "cannot use" in message
    assert f"{file}:4501" in message


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_sampler_takes_a_streamed_set_in_its_order_from_epoch_to_epoch(interleaved):
    sampler = InterleavedSampler([6, 4], interleaved=interleaved, streamed=[1], seed=3)
    taken = [next(sampler) for _ in range(3 * len(sampler))]
    own = [row for index, row in taken if index == 1]
    assert own == list(range(len(own)))
    assert {row for index, row in taken if index == 0} == set(range(6))


def config_of(make_config, source: SourceConfig, name: str) -> RunConfig:
    config = make_config(name, max_steps=4, save_steps=2)
    data = dataclasses.replace(config.data, sources=[source])
    return dataclasses.replace(config, data=data)


def test_a_run_on_a_streamed_set_is_resumed_bit_for_bit(make_config, source, monkeypatch):
    monkeypatch.setattr(sources, "STREAMED_RECORDS", 4)
    source = streamed(source, 12)
    whole = train(config_of(make_config, source, "whole"))
    parts = whole.folder.with_name("parts")
    shutil.copytree(whole.folder, parts)
    shutil.rmtree(parts / "checkpoint-4")
    train(config_of(make_config, source, "parts"), "latest")
    expected = all_tensors(whole.folder / "checkpoint-4")
    found = all_tensors(parts / "checkpoint-4")
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert rows_of(parts) == rows_of(whole.folder)


def test_a_set_of_the_hub_is_fetched_as_it_is_read(held_out, monkeypatch):
    given, asked = [], []

    def rows():
        for n in range(10_000):
            given.append(n)
            yield {"question": f"Add {n} and {n + 1}.", "answer": str(n)}

    def load_dataset(name, config, **options):
        asked.append((name, options["streaming"]))
        return {"train": IterableDataset.from_generator(rows)}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    columns = {"instruction_column": "question", "output_column": "answer"}
    paths = {"path": "somebody/rows", "validation_path": str(held_out)}
    source = SourceConfig(name="own", **paths, **columns)
    examples = load(streamed(source, 9000)).train[0]
    assert set(asked) == {("somebody/rows", True)}
    assert len(given) < 8000
    assert "labels" in examples[4999]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: dataclasses.replace(s, validation_path=None), "a path and a validation_path"),
        (lambda s: DataConfig(sources=[s], bucket_steps=2), "bucket_steps is 2, but must be 1"),
        (lambda s: StageConfig(name="a", sources=[s]), "without stream_rows in a stage"),
        (
            lambda s: load_data(DataConfig(sources=[s]), build_tokenizer(), training_subset=3),
            r"leave out train\.training_subset",
        ),
    ],
)
def test_what_a_streamed_set_cannot_do_is_refused(make, message, source):
    with pytest.raises(ValueError, match=message):
        make(streamed(source, 9))
