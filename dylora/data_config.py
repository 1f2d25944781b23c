"""What a run learns from: its sets of rows, and how they become token ids and batches."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dylora.fields import check_fields, is_name, option, require

RowFormat = Literal["instruction", "chat", "completion", "text"]
NAMED_SPLITS = ("published", "70/10/20")  # of mbpp


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of rows."""

    RENAMED: ClassVar[dict[str, str | None]] = {"split_scheme": "split"}

    name: str = option(accept=is_name, rule="1 to 512 printable characters")
    """code_alpaca, mbpp, skill/<skill>, or a name of your own for files or a hub set."""
    path: str | list[str] | None = None
    """A file, a folder, a pattern such as rows/*.jsonl, a list of these, or a hub name; none: where
    the built-in source lives."""
    revision: str | None = None
    """Commit, tag or branch on the hub."""
    hub_config: str | None = None
    """Configuration of a hub set that has several."""
    hub_split: str | None = None
    """Split of a hub set, or of a folder of save_to_disk; none: train."""
    validation_path: str | list[str] | None = None
    """Files with the held-out rows; none: a share of path's, see split."""
    format: RowFormat | None = None
    """instruction, chat, completion (prompt and completion as they stand) or text; none: told from
    the columns."""
    instruction_column: str | None = None
    """Column of the instruction or prompt; none: found by its name."""
    input_column: str | None = None
    """Column of an optional further input, likewise."""
    output_column: str | None = None
    """Column of the answer or completion, likewise."""
    messages_column: str | None = None
    """Column of the messages of a conversation, likewise."""
    text_column: str | None = None
    """Column of plain text, likewise."""
    split: str | None = option(
        None,
        accept=lambda value: value in NAMED_SPLITS or shares(value) is not None,
        rule=f"two shares such as 95/5, or {' or '.join(NAMED_SPLITS)} for mbpp",
    )
    """Shares of training and validation, such as 95/5; none: 90/10. mbpp: published (default) or
    70/10/20."""
    weight: float = option(1.0, above=0)
    """How often its rows are drawn, as a multiple of what they would be otherwise."""
    rows: int | None = option(None, least=1)
    """Skills only: training examples to generate."""
    stream_rows: int | None = option(None, least=1)
    """Read the set while it is trained on, and never whole, with so many examples in an epoch. Its
    held-out rows are those of validation_path."""

    def __post_init__(self) -> None:
        check_fields(self)
        held_out = self.validation_path is None or self.split is None
        require(held_out, "split", self.split, "unset with validation_path")
        streams = self.stream_rows is None or None not in (self.path, self.validation_path)
        require(streams, "stream_rows", self.stream_rows, "beside a path and a validation_path")


def shares(split: str) -> tuple[int, int] | None:
    """The two numbers of a split such as 95/5; None where it is no such thing."""
    found = re.fullmatch(r"([1-9]\d{0,3})/([1-9]\d{0,3})", split)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained and validated on."""

    RENAMED: ClassVar[dict[str, str | None]] = {"length_window": "bucket_steps"}

    sources: list[SourceConfig] = field(default_factory=list)
    """The sets, in the order of their reports."""
    max_length: int | None = option(None, least=8)
    """Most tokens of an example, BOS and EOS included; none: 512, or what the base takes if that is
    less."""
    over_long: Literal["truncate", "drop"] = "drop"
    """What happens to a longer one; both are counted."""
    template: str = "alpaca"
    """How rows of instructions and chats become text: alpaca, chatml, plain, base (the template of
    the base's tokenizer), or a Jinja file. A checkpoint records it."""
    train_on_inputs: bool = False
    """Train on everything; false: on answers and what ends them."""
    interleaved_sampling: bool = True
    """True: equal shares of each set, smaller ones repeated; false: in proportion to their size."""
    packing: bool = False
    """Pack rows into rows as long as the longest of their step, with an attention that keeps them
    apart; a step has as few passes as batch_size rows in each allow. Refused for a base that cannot
    keep them apart. False: rows of similar length share a pass, padded."""
    bucket_steps: int = option(1, least=1)
    """Steps whose rows are sorted by length together, so that a step holds rows of similar length
    and computes less padding; 1: as they are drawn. What a row shares a step with then depends on
    its length."""
    cache: str | None = None
    """Folder that keeps tokenised sets, by their data, the tokenizer and the settings; none: rows
    are read and tokenised anew by each run."""
    seed: int = option(0, least=0)
    """Seed of the splits and of the order."""

    def __post_init__(self) -> None:
        check_fields(self)
        names = [source.name for source in self.sources]
        require(len(names) == len(set(names)), "sources", names, "of different names")
        sorted_ = self.bucket_steps > 1 and any(source.stream_rows for source in self.sources)
        require(not sorted_, "bucket_steps", self.bucket_steps, "1 with a source of stream_rows")
