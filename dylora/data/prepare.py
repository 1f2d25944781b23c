"""From sources to token ids and labels, and their provenance."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.cache import LoadedSource, cached_source
from dylora.data.sources import SourceRows, read_source, read_stream
from dylora.data.splits import content_hash, seeded_generator
from dylora.data.streamed import StreamedSet, TrainingSet
from dylora.data.templates import Template, load_template
from dylora.data.tokenize import SetReport, TokenizedSet, TokenizedSplit, tokenize_rows
from dylora.data_config import DataConfig, SourceConfig

if TYPE_CHECKING:
    from datasets import Dataset

MAX_LENGTH = 512  # tokens of an example, where data.max_length is not set


class PreparedData(NamedTuple):
    """Everything `load_data` found out. No set is empty."""

    train: list[TrainingSet]  # in the order of the sources
    validation: list[TokenizedSet]
    reports: list[SetReport]
    provenance: dict[str, Any]  # JSON types, for checkpoints: what was trained on, how it was split


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    training_subset: int | float | None = None,
    eval_subset: int | None = None,
    needs_prompt: bool = False,
) -> PreparedData:
    """Reads, splits and tokenises every source; the same config gives the same data.

    `training_subset` and `eval_subset` take that many examples of each set (a float: that share of
    its rows), drawn with the seed; a smaller subset is part of a larger one. needs_prompt: refuse
    rows, but no texts, with nothing before their first answer.
    Raises ValueError where a source cannot be used or a split of it ends up without an example.
    """
    if not config.sources:
        raise ValueError("data.sources is empty; name a set, for example code_alpaca")
    data = PreparedData([], [], [], {})
    sources = []
    config = config if config.max_length else replace(config, max_length=MAX_LENGTH)
    template = load_template(config.template, tokenizer)
    subsets = (training_subset, eval_subset)
    for source in config.sources:
        if source.stream_rows is not None:
            loaded = _load_stream(source, config, template, subsets)
        else:
            load = partial(_load, source, config, template, subsets, needs_prompt)
            decides = (*subsets, needs_prompt)
            loaded = cached_source(source, config, tokenizer, template.text, decides, load)
        data.train.append(loaded.train)
        data.validation.append(loaded.validation)
        data.reports.append(loaded.report)
        sources.append(loaded.provenance)
    data.provenance.update(
        prompt=template.text,
        max_length=config.max_length,
        over_long=config.over_long,
        sources=sources,
    )
    if config.train_on_inputs:
        data.provenance["train_on_inputs"] = True
    return data


def _load(
    source: SourceConfig,
    config: DataConfig,
    template: Template,
    subsets: tuple[int | float | None, int | None],
    needs_prompt: bool,
) -> LoadedSource:
    read = read_source(source, seed=config.seed, skill_validation_rows=subsets[1])
    train, validation = (
        _tokenize(read, split, subset, source.name, template, config, needs_prompt)
        for split, subset in zip(("train", "validation"), subsets, strict=True)
    )
    splits = {"train": train.report, "validation": validation.report}
    report = SetReport(source.name, read.counts, splits)
    provenance = _provenance(source, read, config.seed, train)
    return LoadedSource(train.examples, validation.examples, report, provenance)


def _load_stream(
    source: SourceConfig,
    config: DataConfig,
    template: Template,
    subsets: tuple[int | float | None, int | None],
) -> LoadedSource:
    """A set that is read while it is trained on; what is said of it is of its first block."""
    if subsets[0] is not None:
        raise ValueError(
            f"source {source.name!r} has stream_rows, which say how much is taken of it: leave out "
            "train.training_subset"
        )
    read, blocks = read_stream(source, seed=config.seed)
    validation = _tokenize(read, "validation", subsets[1], source.name, template, config)

    def tokenize(rows: "Dataset") -> TokenizedSplit:
        examples = TokenizedSet(source.name, "train")
        return tokenize_rows(examples, rows, template, read.format, config=config)

    assert source.stream_rows is not None
    train = StreamedSet(source.name, source.stream_rows, config.seed, blocks, tokenize)
    splits = {"train": train.first.report, "validation": validation.report}
    report = SetReport(source.name, read.counts.plus(train.counts), splits, streamed=True)
    provenance = _provenance(source, read, config.seed, train.first)
    provenance |= {"training_rows": source.stream_rows, "streamed": True}
    del provenance["text_hashes"]  # of later rows they are not known
    return LoadedSource(train, validation.examples, report, provenance)


def _tokenize(
    read: SourceRows,
    split: str,
    subset: int | float | None,
    name: str,
    template: Template,
    config: DataConfig,
    needs_prompt: bool = False,
) -> TokenizedSplit:
    indices = read.splits[split]
    rows = len(indices)
    wanted = max(1, round(subset * rows)) if isinstance(subset, float) else subset
    if subset is not None:
        generator = seeded_generator("subset", config.seed, name, split)
        indices = [indices[i] for i in torch.randperm(rows, generator=generator).tolist()]
    if isinstance(subset, float) and read.format == "text":  # an example is a window, not a row
        indices, wanted = indices[:wanted], None
    tokenized = tokenize_rows(
        TokenizedSet(name, split),
        read.rows.select(indices),
        template,
        read.format,
        config=config,
        wanted=wanted,
        needs_prompt=needs_prompt,
    )
    tokenized = tokenized._replace(report=tokenized.report._replace(rows=rows))
    if len(tokenized.examples) == 0:
        raise ValueError(
            f"source {name!r} has no {split} example: {rows} rows in that split, "
            f"{tokenized.report.dropped} of them over-long at max_length {config.max_length}"
            + "".join(f"\n  {problem}" for problem in tokenized.report.problems)
        )
    return tokenized


def _provenance(
    source: SourceConfig, read: SourceRows, seed: int, train: TokenizedSplit
) -> dict[str, Any]:
    """What one source gave to training: its rows, and (order_sha256) their order.

    `text_hashes` has each question's and each answer's, so that a benchmark can leave out what
    was trained on under whatever name; a checkpoint has them in a file of their own.
    """
    found = {
        "name": source.name,
        "path": read.path,
        "revision": source.revision,
        "split_scheme": read.split_scheme,
        "seed": seed,
        "training_rows": len(train.examples),
        "training_sha256": content_hash(*sorted(train.content_hashes)),
        "order_sha256": content_hash(*train.content_hashes),
    }
    if source.name == "mbpp":
        found["task_ids"] = sorted(int(row_id) for row_id in train.row_ids)
    if read.path is not None:  # what is generated shares no task with a benchmark
        found["text_hashes"] = " ".join(sorted(train.text_hashes))
    return found
