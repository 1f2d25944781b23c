"""Training sets that are read while they are trained on, a block of rows at a time."""

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dylora.data.record import RowCounts
from dylora.data.splits import seeded_generator
from dylora.data.tokenize import TokenizedSet, TokenizedSplit

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger("dylora")
Block = tuple["Dataset | None", RowCounts]  # usable rows, if any, and what became of the records


class StreamedSet:
    """What a run asks of a `TokenizedSet`, of a source that is never held whole.

    Example n is the nth of the source, but that the examples of each block come in a random order.
    The source begins again where it ends. Asked for in their order, as the sampler does, examples
    are read once; an earlier one is looked for from the source's begin.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        seed: int,
        read: Callable[[], Iterator[Block]],
        tokenize: Callable[["Dataset"], TokenizedSplit],
    ) -> None:
        """rows: examples of an epoch. Raises ValueError where the source has no example."""
        self.name, self.split = name, "train"
        self.embeddings: int | None = None  # of the base: ids must be below
        self._rows, self._seed, self._read, self._tokenize = rows, seed, read, tokenize
        self._restart()
        self.counts, self.first = self._counts, self._block

    def _restart(self) -> None:
        self._blocks, self._number = self._read(), 0
        self._begin = self._pass_begin = 0  # examples before this block, and this pass
        self._load()

    def _load(self) -> None:
        """The next block that has an example."""
        while True:
            found = next(self._blocks, None)
            self._number += 1
            if found is None:
                if self._begin == self._pass_begin:
                    raise ValueError(f"source {self.name!r} has no example")
                log.warning("source %s begins again after %d examples", self.name, self._begin)
                self._blocks, self._pass_begin = self._read(), self._begin
                continue
            rows, self._counts = found
            problems = list(self._counts.problems)
            if rows is not None:
                self._block = self._tokenize(rows)
                problems += self._block.report.problems
            if problems and self._number > 1:  # those of the first are reported before training
                log.warning("source %s cannot use %s", self.name, "; ".join(problems[:3]))
            if rows is not None and len(self._block.examples):
                break
        generator = seeded_generator("block", self._seed, self.name, self._number)
        self._order = torch.randperm(len(self._block.examples), generator=generator)
        largest = self._block.examples.largest_id
        if self.embeddings is not None and largest >= self.embeddings:
            raise ValueError(
                f"source {self.name!r} has the token id {largest}, but the base has "
                f"{self.embeddings} rows of embeddings"
            )

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """As of a `TokenizedSet`; the index goes on from epoch to epoch."""
        if index < self._begin:
            self._restart()
        while index >= self._begin + len(self._order):
            self._begin += len(self._order)
            self._load()
        return self._block.examples[int(self._order[index - self._begin])]

    # Of the first block

    @property
    def all_lengths(self) -> Tensor:
        lengths = self.first.examples.all_lengths
        return lengths[self._order] if self._begin == 0 else lengths

    @property
    def mean_targets(self) -> float:
        return self.first.examples.mean_targets

    @property
    def largest_id(self) -> int:
        return self.first.examples.largest_id


TrainingSet = TokenizedSet | StreamedSet
