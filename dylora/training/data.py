"""From sources to batches: token ids and labels, the order of training, padding.

Shape letters: B batch, S sequence.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.losses import target_positions
from dylora.run_config import DataConfig, SourceConfig
from dylora.training.prompts import PROMPT_WITH_INPUT
from dylora.training.sources import SourceRows, content_hash, derived_seed, read_source
from dylora.training.tokenized import (
    IGNORED,
    SetReport,
    SplitReport,
    TokenizedSet,
    TokenizedSplit,
    tokenize_rows,
)


class PreparedData(NamedTuple):
    """Everything `load_data` found out. No set is empty."""

    train: list[TokenizedSet]  # in the order of the sources
    validation: list[TokenizedSet]
    reports: list[SetReport]
    stamp: dict[str, Any]  # JSON types, for the checkpoint: what was trained on, how it was split


def load_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    training_subset: int | None = None,
    eval_subset: int | None = None,
) -> PreparedData:
    """Reads, splits and tokenises every source; the same config gives the same data.

    `training_subset` and `eval_subset` take that many examples of each set, drawn with the seed; a
    smaller subset is part of a larger one.
    Raises ValueError where a source cannot be used or a split of it ends up without an example.
    """
    if not config.sources:
        raise ValueError("data.sources is empty; name a set, for example code_alpaca")
    data = PreparedData([], [], [], {})
    stamps = []
    for source in config.sources:
        read = read_source(source, seed=config.seed, skill_validation_rows=eval_subset)
        train = _tokenize(read, "train", training_subset, source.name, tokenizer, config)
        validation = _tokenize(read, "validation", eval_subset, source.name, tokenizer, config)
        data.train.append(train.examples)
        data.validation.append(validation.examples)
        splits = {"train": train.report, "validation": validation.report}
        data.reports.append(_report(source.name, read, splits))
        stamps.append(_stamp(source, read, config.seed, train))
    data.stamp.update(
        prompt=PROMPT_WITH_INPUT,
        max_length=config.max_length,
        over_long=config.over_long,
        sources=stamps,
    )
    return data


def _tokenize(
    read: SourceRows,
    split: str,
    subset: int | None,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
) -> TokenizedSplit:
    indices = read.splits[split]
    if subset is not None:
        generator = _generator("subset", config.seed, name, split)
        indices = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
    tokenized = tokenize_rows(
        TokenizedSet(name, split),
        read.rows.select(indices),
        tokenizer,
        max_length=config.max_length,
        over_long=config.over_long,
        wanted=subset,
    )
    if len(tokenized.examples) == 0:
        raise ValueError(
            f"source {name!r} has no {split} example: {len(indices)} rows in that split, "
            f"{tokenized.report.dropped} of them over-long at max_length {config.max_length}"
        )
    return tokenized


def _report(name: str, read: SourceRows, splits: dict[str, SplitReport]) -> SetReport:
    return SetReport(
        name=name,
        read=read.read,
        empty=read.empty,
        malformed=read.malformed,
        duplicates=read.duplicates,
        problems=read.problems,
        splits=splits,
    )


def _stamp(
    source: SourceConfig, read: SourceRows, seed: int, train: TokenizedSplit
) -> dict[str, Any]:
    """What one source gave to training; the hashes do not depend on the order of its rows.

    `text_hashes` has each question's and each answer's, so that a benchmark can leave out what
    was trained on under whatever name: 26 bytes a row.
    """
    stamp = {
        "name": source.name,
        "path": read.path,
        "revision": source.revision,
        "split_scheme": read.split_scheme,
        "seed": seed,
        "training_rows": len(train.examples),
        "training_sha256": content_hash(*sorted(train.content_hashes)),
    }
    if source.name == "mbpp":
        stamp["task_ids"] = sorted(int(row_id) for row_id in train.row_ids)
    if read.path is not None:  # what is generated shares no task with a benchmark
        stamp["text_hashes"] = " ".join(sorted(train.text_hashes))
    return stamp


class InterleavedSampler:
    """The order of training over several sets: endless, and resumable at any example.

    Interleaved, every set gives as many examples to an epoch as the largest has: smaller ones are
    repeated, in a new order each time round, and each run of len(lengths) examples holds one of
    each set. Otherwise an epoch is one permutation of all examples together.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int = 0, interleaved: bool = True) -> None:
        """`lengths`: examples of each set. Raises ValueError where a set is empty."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every set needs an example, but the lengths are {list(lengths)}")
        self.lengths = list(lengths)
        self.seed = seed
        self.interleaved = interleaved
        self.epoch = 0
        self.position = 0  # examples given out in this epoch; below len(self)
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Examples of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self

    def __next__(self) -> tuple[int, int]:
        """(set index, row index) of the next example. It never stops: epoch follows epoch."""
        set_index, row_index = self._order[self.position].tolist()
        self.position += 1
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._epoch_order()
        return set_index, row_index

    def mean(self, values: Sequence[float]) -> float:
        """Mean over an epoch's examples of something known per set, such as their length."""
        weights = [1] * len(self.lengths) if self.interleaved else self.lengths
        weighted = (value * weight for value, weight in zip(values, weights, strict=True))
        return sum(weighted) / sum(weights)

    def state_dict(self) -> dict[str, Any]:
        """JSON types; `load_state_dict` goes on with exactly the sequence from here."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "lengths": list(self.lengths),
            "interleaved": self.interleaved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the state is of other sets: the sequence would be another."""
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"a sampler's state has {sorted(own)}, but got {sorted(state)}")
        for name in ("lengths", "interleaved"):
            if state[name] != own[name]:
                raise ValueError(
                    f"the saved order is for {name} {state[name]}, but the data now has "
                    f"{own[name]}; resume with the data the run began with"
                )
        if not 0 <= state["position"] < len(self):
            raise ValueError(f"position is {state['position']}, but an epoch has {len(self)}")
        self.seed, self.epoch = state["seed"], state["epoch"]
        self.position = state["position"]
        self._order = self._epoch_order()

    def _epoch_order(self) -> Tensor:
        """[examples, 2] of set index and row index."""
        if not self.interleaved:
            ends = torch.tensor(self.lengths).cumsum(0)
            flat = torch.randperm(
                int(ends[-1]), generator=_generator("order", self.seed, self.epoch)
            )
            sets = torch.bucketize(flat, ends, right=True)
            return torch.stack([sets, flat - (ends - torch.tensor(self.lengths))[sets]], dim=1)
        groups, count = max(self.lengths), len(self.lengths)
        rows = torch.stack([self._repeated(i, groups) for i in range(count)], dim=1)
        # The order within a group is drawn too: ranks that share a group see every set.
        within = torch.rand(groups, count, generator=_generator("groups", self.seed, self.epoch))
        sets = within.argsort(dim=1)
        return torch.stack([sets, rows.gather(1, sets)], dim=2).flatten(0, 1)

    def _repeated(self, set_index: int, count: int) -> Tensor:
        """[count] rows of a set, a fresh permutation each time round."""
        generator = _generator("rows", self.seed, self.epoch, set_index)
        length = self.lengths[set_index]
        rounds = range(-(-count // length))
        return torch.cat([torch.randperm(length, generator=generator) for _ in rounds])[:count]


def collate(examples: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, int64 [B, S], S the longest; and
    `target_positions` [N], where labels have a target after them.

    The mask goes by position, so a padding id that equals EOS hides no real EOS.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    longest = max(lengths)

    def padded(name: str, filler: int) -> Tensor:
        rows = [example[name] + [filler] * (longest - len(example[name])) for example in examples]
        return torch.tensor(rows)

    positions, labels = torch.arange(longest), padded("labels", IGNORED)
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": (positions < torch.tensor(lengths)[:, None]).long(),
        "labels": labels,
        "target_positions": target_positions(labels),
    }


def _generator(*parts: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*parts))
