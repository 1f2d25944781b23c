"""Rows as token ids and labels, kept flat, and what became of every row.

A prompt is never trained on; an answer is, and the EOS that ends it.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import encode_answers, encode_prompts, eos_token_id, format_prompt
from dylora.data.record import RowCounts
from dylora.data.splits import content_hash, text_hash

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
ENCODED_AT_ONCE = 1000


class SplitReport(NamedTuple):
    """What became of one split of a set."""

    rows: int  # usable rows of the split
    kept: int  # examples, truncated ones included
    truncated: int  # over-long; the answer was cut and does not end in EOS
    dropped: int  # over-long, or with a prompt that leaves no room for an answer
    tokens: int  # of the examples, BOS and EOS included
    target_tokens: int  # those that are trained on: answers and EOS


class SetReport(NamedTuple):
    """What became of one source."""

    name: str
    counts: RowCounts
    splits: dict[str, SplitReport]  # of train and validation

    def describe(self) -> str:
        """One line of counts, then a line for each problem."""
        read, empty, malformed, duplicates, problems = self.counts
        parts = [
            f"{self.name}: {read} rows read, {empty} empty, {malformed} malformed, "
            f"{duplicates} duplicate"
        ]
        parts += [
            f"{split} {report.kept} of {report.rows} ({report.truncated} truncated, "
            f"{report.dropped} dropped as over-long, {report.target_tokens} target tokens)"
            for split, report in self.splits.items()
        ]
        lines = ["; ".join(parts), *(f"  {problem}" for problem in problems)]
        hidden = empty + malformed - len(problems)
        return "\n".join([*lines, f"  and {hidden} more"] if hidden else lines)


class TokenizedSet:
    """Examples of one split of one set: flat int32 arrays, 4 bytes a token however many rows."""

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.split = split
        self._ids = array("i")
        self._ends = array("q", [0])
        self._prompt_lengths = array("i")

    def append(self, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Adds an example: the prompt with its BOS, then what is trained on."""
        self._ids.extend(prompt_ids)
        self._ids.extend(target_ids)
        self._ends.append(len(self._ids))
        self._prompt_lengths.append(len(prompt_ids))

    def __len__(self) -> int:
        return len(self._prompt_lengths)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels`, equally long; labels are -100 on BOS and prompt."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.name}/{self.split}")
        ids = self._ids[self._ends[index] : self._ends[index + 1]].tolist()
        prompt = self._prompt_lengths[index]
        return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}

    def length(self, index: int) -> int:
        """Tokens of an example, BOS and EOS included."""
        return self._ends[index + 1] - self._ends[index]

    @property
    def all_lengths(self) -> Tensor:
        """Tokens of every example, [examples]."""
        return torch.tensor(self._ends).diff()

    @property
    def tokens(self) -> int:
        """Of all examples, BOS and EOS included."""
        return len(self._ids)

    @property
    def largest_id(self) -> int:
        return max(self._ids)

    @property
    def mean_targets(self) -> float:
        """Tokens that are trained on, per example."""
        return (len(self._ids) - sum(self._prompt_lengths)) / len(self)


class TokenizedSplit(NamedTuple):
    """What `tokenize_rows` made."""

    examples: TokenizedSet
    report: SplitReport
    row_ids: list[str]  # of the examples' rows
    content_hashes: list[str]  # likewise
    text_hashes: set[str]  # of their questions and of their answers


def tokenize_rows(
    examples: TokenizedSet,
    rows: "Dataset",
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    truncation: Literal["truncate", "drop"],
    wanted: int | None = None,
) -> TokenizedSplit:
    """Fills `examples` from the rows (columns as in sources.Row), until there are `wanted` ones."""
    eos = eos_token_id(tokenizer)
    limit = len(rows) if wanted is None else wanted
    step = min(max(limit, 1), ENCODED_AT_ONCE)
    row_ids, hashes = [], []
    text_hashes: set[str] = set()
    truncated = dropped = target_tokens = 0
    for start in range(0, len(rows), step):
        batch: dict[str, list[str]] = rows[start : start + step]
        texts = list(zip(batch["instruction"], batch["input"], batch["output"], strict=True))
        prompts = encode_prompts(tokenizer, [format_prompt(i, more) for i, more, _ in texts])
        answers = encode_answers(tokenizer, batch["output"])
        for prompt, answer, text, row_id in zip(prompts, answers, texts, batch["id"], strict=True):
            if len(examples) == limit:
                break
            target = fit(len(prompt), [*answer, eos], max_length, truncation)
            if not target:
                dropped += 1
                continue
            truncated += len(target) <= len(answer)
            target_tokens += len(target)
            examples.append(prompt, target)
            row_ids.append(row_id)
            hashes.append(content_hash(*text))
            question = " ".join(text[:2])
            text_hashes |= {text_hash(question), text_hash(text[0]), text_hash(text[2])}
        if len(examples) == limit:
            break
    kept, tokens = len(examples), examples.tokens
    report = SplitReport(len(rows), kept, truncated, dropped, tokens, target_tokens)
    return TokenizedSplit(examples, report, row_ids, hashes, text_hashes)


def fit(
    prompt_length: int,
    target_ids: list[int],
    max_length: int,
    truncation: Literal["truncate", "drop"],
) -> list[int]:
    """The answer and EOS, cut to what the prompt leaves; empty: the example is dropped.

    A cut answer loses its EOS, since it does not end there. Prompts are never cut.
    """
    room = max_length - prompt_length
    if len(target_ids) <= room:
        return target_ids
    return target_ids[: max(room, 0)] if truncation == "truncate" else []
