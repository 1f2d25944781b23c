"""Rows as token ids and labels, kept flat, and what became of every row.

A prompt is not trained on, unless data.train_on_inputs says so; an answer is, and the token that
ends it; of a plain text everything.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import common_length, encode_prompts, eos_token_id
from dylora.data.record import BadRecord, RowCounts
from dylora.data.rows import Row, row_content
from dylora.data.splits import content_hash, text_hash
from dylora.data.templates import Chat, Parts, Template, question
from dylora.data_config import DataConfig, RowFormat

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
ENCODED_AT_ONCE = 1000
MAX_LOST = 3  # rows of a split that are named as dropped or refused


class SplitReport(NamedTuple):
    """What became of one split of a set."""

    rows: int  # usable rows of the split
    kept: int  # examples, truncated ones included
    truncated: int  # over-long and cut: what is left does not end in EOS
    dropped: int  # over-long, or with a prompt that leaves no room for an answer
    tokens: int  # of the examples, BOS and EOS included
    target_tokens: int  # those that are trained on
    refused: int = 0  # by the template, or without the prompt that is needed
    problems: tuple[str, ...] = ()  # `file:line: why` of the first that were dropped or refused


class SetReport(NamedTuple):
    """What became of one source."""

    name: str
    counts: RowCounts
    splits: dict[str, SplitReport]  # of train and validation
    cached: bool = False  # read from data.cache
    streamed: bool = False  # of the first block of rows alone, and of those held out

    def describe(self) -> str:
        """One line of counts, then a line for each problem."""
        read, empty, malformed, duplicates, problems = self.counts
        known = " (data.cache has them)" if self.cached else ""
        known = " before training, others while it is trained on" if self.streamed else known
        parts = [
            f"{self.name}: {read} rows read{known}, {empty} empty, {malformed} malformed, "
            f"{duplicates} duplicate"
        ]
        parts += [
            f"{split} {report.kept} of {report.rows} ({report.truncated} truncated, "
            f"{report.dropped} dropped as over-long, "
            + (f"{report.refused} refused, " if report.refused else "")
            + f"{report.target_tokens} target tokens)"
            for split, report in self.splits.items()
        ]
        lost = [problem for report in self.splits.values() for problem in report.problems]
        lines = ["; ".join(parts), *(f"  {problem}" for problem in (*lost, *problems))]
        hidden = empty + malformed - len(problems)
        return "\n".join([*lines, f"  and {hidden} more"] if hidden else lines)


class TokenizedSet:
    """Examples of one split of one set: flat int32 arrays, 4 bytes a token however many rows."""

    def __init__(self, name: str, split: str) -> None:
        self.name = name
        self.split = split
        self._ids = array("i")  # of a token that is not trained on its complement, ~id
        self._ends = array("q", [0])

    @classmethod
    def of_arrays(cls, name: str, split: str, ids: Tensor, ends: Tensor) -> "TokenizedSet":
        """The set whose `arrays` these are."""
        found = cls(name, split)
        found._ids.frombytes(ids.numpy().tobytes())
        found._ends = array("q", ends.numpy().tobytes())
        return found

    @property
    def arrays(self) -> tuple[Tensor, Tensor]:
        """What it holds, int32 and int64, while it does not grow: for files."""
        ids = torch.frombuffer(self._ids, dtype=torch.int32) if self._ids else torch.zeros(0).int()
        return ids, torch.frombuffer(self._ends, dtype=torch.int64)

    def append(self, *parts: Sequence[int]) -> None:
        """Adds an example: token ids, alternately not trained on (a prompt) and trained on."""
        for number, part in enumerate(parts):
            self._ids.extend(part if number % 2 else [~token for token in part])
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels`, equally long; labels are -100 where nothing is trained on."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)} in {self.name}/{self.split}")
        kept = self._ids[self._ends[index] : self._ends[index + 1]].tolist()
        ids = [token if token >= 0 else ~token for token in kept]
        return {"input_ids": ids, "labels": [token if token >= 0 else IGNORED for token in kept]}

    def parts(self, index: int) -> Parts:
        """An example as `append` takes it."""
        example, parts = self[index], [[]]
        for token, label in zip(example["input_ids"], example["labels"], strict=True):
            if (label != IGNORED) != (len(parts) % 2 == 0):
                parts.append([])
            parts[-1].append(token)
        return parts

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
    def target_tokens(self) -> int:
        """Those of all examples that are trained on."""
        return int((torch.frombuffer(self._ids, dtype=torch.int32) >= 0).sum())

    @property
    def largest_id(self) -> int:
        kept = torch.frombuffer(self._ids, dtype=torch.int32)
        return int(torch.maximum(kept, ~kept).max())

    @property
    def mean_targets(self) -> float:
        """Tokens that are trained on, per example."""
        return self.target_tokens / len(self)


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
    template: Template,
    format: RowFormat = "instruction",
    *,
    config: DataConfig,
    wanted: int | None = None,
    needs_prompt: bool = False,
) -> TokenizedSplit:
    """Fills `examples` from the rows (columns as in rows.Row), until there are `wanted` ones.

    config: its max_length, over_long and train_on_inputs are used.
    needs_prompt: refuse a row, but no text, with nothing besides BOS before its first answer.
    """
    limit = len(rows) if wanted is None and format != "text" else wanted
    step = ENCODED_AT_ONCE if limit is None else min(max(limit, 1), ENCODED_AT_ONCE)
    filler = _Filler(examples, config, limit)
    bos: Any = template.tokenizer.bos_token_id
    for start in range(0, len(rows), step):
        batch: dict[str, list[str]] = rows[start : start + step]
        chunk = [
            Row(*values) for values in zip(*(batch[name] for name in Row._fields), strict=True)
        ]
        if format == "text":
            filler.add_texts(chunk, template)
        else:
            encoded = encode_rows(chunk, format, template)
            filler.add_rows(chunk, _with_prompts(chunk, encoded, bos) if needs_prompt else encoded)
        if filler.is_full:
            break
    return filler.close(len(rows))


def encode_rows(
    rows: Sequence[Row], format: RowFormat, template: Template
) -> list[Parts | BadRecord]:
    """Token ids of each row, alternately not trained on and trained on."""
    if format == "completion":
        return list(_encode_completions(rows, template.tokenizer))
    chats = []
    for row in rows:
        if row.chat:
            chats.append(Chat(**json.loads(row.chat)))
        else:
            asked = question(template, row.instruction, row.input)
            answer = {"role": "assistant", "content": row.output}
            chats.append(Chat([*asked.messages, answer]))
    return template.examples(chats)


def _with_prompts(
    rows: Sequence[Row], encoded: list[Parts | BadRecord], bos: int | None
) -> list[Parts | BadRecord]:
    """The rows, those refused that have nothing, or a template's heading alone, before their first
    answer."""
    problem = BadRecord("nothing comes before its first answer, and routing is by the prompt")
    return [
        parts
        if isinstance(parts, BadRecord) or (parts[0] not in ([], [bos]) and (asked or not row.chat))
        else problem
        for row, parts in zip(rows, encoded, strict=True)
        for asked in (row.instruction.strip(),)
    ]


def _encode_completions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[Parts]:
    """A token that is of both prompt and completion is trained on."""
    prompts = encode_prompts(tokenizer, [row.instruction for row in rows])
    wholes = encode_prompts(tokenizer, [row.instruction + row.output for row in rows])
    for prompt, whole in zip(prompts, wholes, strict=True):
        begin = common_length(prompt, whole)
        yield [whole[:begin], [*whole[begin:], eos_token_id(tokenizer)]]


class _Filler:
    """Fills a set with examples, and counts what does not become one."""

    def __init__(self, examples: TokenizedSet, config: DataConfig, limit: int | None) -> None:
        assert config.max_length is not None
        self.examples, self.config, self.limit = examples, config, limit
        self.max_length = config.max_length
        self.row_ids: list[str] = []
        self.hashes: list[str] = []
        self.text_hashes: set[str] = set()
        self.truncated = self.dropped = self.refused = 0
        self.problems: list[str] = []
        self.pending: list[int] = []  # of texts, not yet a window

    @property
    def is_full(self) -> bool:
        return len(self.examples) == self.limit

    def add_rows(self, rows: Sequence[Row], encoded: Sequence[Parts | BadRecord]) -> None:
        """Rows as examples, each cut or left out where it is too long."""
        for row, parts in zip(rows, encoded, strict=True):
            if self.is_full:
                return
            if isinstance(parts, BadRecord):
                self.refused += 1
                self._tell(row, str(parts))
                continue
            if self.config.train_on_inputs:
                parts = [[], [token for part in parts for token in part]]
            length = sum(map(len, parts))
            parts = fit(parts, self.max_length, self.config.over_long)
            if not parts:
                self.dropped += 1
                self._tell(row, f"{length} tokens, and max_length is {self.max_length}")
                continue
            self.truncated += length > self.max_length
            self.examples.append(*parts)
            self._record(row)

    def add_texts(self, rows: Sequence[Row], template: Template) -> None:
        """Texts one after the other, each with BOS and EOS, as windows of max_length tokens."""
        eos = eos_token_id(template.tokenizer)
        texts = encode_prompts(template.tokenizer, [row.output for row in rows])
        for row, ids in zip(rows, texts, strict=True):
            self.pending += [*ids, eos]
            self._record(row)
            while len(self.pending) >= self.max_length and not self.is_full:
                self.examples.append([], self.pending[: self.max_length])
                del self.pending[: self.max_length]
            if self.is_full:
                return

    def close(self, rows: int) -> TokenizedSplit:
        """What came of so many rows."""
        if len(self.pending) > 1 and not self.is_full:
            self.examples.append([], self.pending)
        examples = self.examples
        report = SplitReport(
            rows=rows,
            kept=len(examples),
            truncated=self.truncated,
            dropped=self.dropped,
            tokens=examples.tokens,
            target_tokens=examples.target_tokens if len(examples) else 0,
            refused=self.refused,
            problems=tuple(self.problems),
        )
        return TokenizedSplit(examples, report, self.row_ids, self.hashes, self.text_hashes)

    def _tell(self, row: Row, why: str) -> None:
        if len(self.problems) < MAX_LOST:
            self.problems.append(f"{row.location}: {why}")

    def _record(self, row: Row) -> None:
        self.row_ids.append(row.id)
        self.hashes.append(content_hash(*row_content(row)))
        texts = [f"{row.instruction} {row.input}", row.instruction, row.output]
        if row.chat:
            texts += [turn["content"] for turn in json.loads(row.chat)["messages"]]
        self.text_hashes |= {text_hash(text) for text in texts if text.strip()}


def fit(parts: Parts, max_length: int, over_long: Literal["truncate", "drop"]) -> Parts:
    """An example of at most so many tokens; empty: it is dropped.

    A cut answer loses its EOS, since it does not end there. What has nothing left to train on is
    dropped.
    """
    if sum(map(len, parts)) <= max_length:
        return parts
    if over_long == "drop":
        return []
    kept, room = [], max_length
    for part in parts:
        kept.append(part[:room])
        room -= len(kept[-1])
    return kept if any(kept[1::2]) else []
