"""Rows of the sets that a run learns from: read, checked, stripped of duplicates, split.

A set is one of the built-in names, local files, or a set of the hub. What cannot be trained on is
counted and reported with its location: `file:line`, or `file:row` (from 1) in parquet, in Arrow and
on the hub.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from dylora.data.readers import find_files, read_records
from dylora.data.record import BadRecord, Columns, Record, RowCounts
from dylora.data.rows import Row, choose_reader, columns_to_row, mbpp_to_row, row_content
from dylora.data.saved_folder import has_splits
from dylora.data.splits import (
    MBPP_PUBLISHED,
    content_hash,
    mbpp_split,
    split_by_id,
    split_by_question,
    split_by_task,
)
from dylora.data_config import RowFormat, SourceConfig, shares
from dylora.fields import nearest

if TYPE_CHECKING:
    from datasets import Dataset

CODE_ALPACA = "sahil2801/CodeAlpaca-20k"
MBPP = "google-research-datasets/mbpp"
SKILL_ROWS = {"train": 2000, "validation": 200}
COLUMNS = tuple(f"{of}_column" for of in ("instruction", "input", "output", "messages", "text"))
FOREIGN = ("hub_config", "hub_split", "validation_path", "format", *COLUMNS)
LOOKED_AT = 100  # records whose columns tell how a set is written
MAX_PROBLEMS = 20
CHUNK_ROWS = 10_000
STREAMED_RECORDS = 4096  # of a source of stream_rows, in memory at once
BlockReader = Callable[[], Iterator[tuple["Dataset | None", RowCounts]]]


class SourceRows(NamedTuple):
    """What was read from one source."""

    rows: "Dataset"  # usable rows, columns as in Row
    splits: dict[str, list[int]]  # indices into rows of train and validation
    path: str | list[str] | None  # files or hub name; None: generated
    split_scheme: str | None  # the one that was used; None: generated splits
    format: RowFormat
    counts: RowCounts


def read_source(
    source: SourceConfig, *, seed: int = 0, skill_validation_rows: int | None = None
) -> SourceRows:
    """Reads and splits one source; the same seed gives the same splits.

    MBPP is split by task id. Others go 90/10, or as they say, by question (instruction and input),
    whatever the order of the file: two answers to one question lie on the same side. Duplicates
    count once. Raises ValueError for settings, files or hub sets that cannot be used, with what to
    do.
    """
    if source.name.startswith("skill/"):
        plan = _skill_plan(source, seed, skill_validation_rows)
    elif source.name == "mbpp":
        plan = _mbpp_plan(source, seed)
    else:
        plan = _columns_plan(source, seed)
    collected = _Collection(plan)
    held_out = 0
    if plan.held_out is not None:  # first, so that what is in both is not trained on
        held_out = collected.add(plan.held_out)
    collected.add(plan.records)
    rows, counts = collected.close(source.name)
    splits = plan.split(rows)
    if plan.held_out is not None:
        splits = {"train": list(range(held_out, len(rows))), "validation": list(range(held_out))}
    return SourceRows(rows, splits, plan.path, plan.scheme, plan.format, counts)


def read_stream(source: SourceConfig, *, seed: int = 0) -> tuple[SourceRows, BlockReader]:
    """The held-out rows of a source of stream_rows, and what reads the others from their begin:
    blocks of usable rows with what became of their records. A duplicate counts once in a block,
    and what is held out is not trained on. Raises ValueError as `read_source`.
    """
    if source.name == "mbpp" or source.name.startswith("skill/"):
        raise ValueError(f"source {source.name!r} is small: leave out stream_rows")
    plan = _columns_plan(source, seed)
    assert plan.held_out is not None
    assert plan.reread is not None
    reread, held_out = plan.reread, _Collection(plan)
    held_out.add(plan.held_out)
    rows, counts = held_out.close(source.name)
    splits = {"train": [], "validation": list(range(len(rows)))}

    def blocks() -> Iterator[tuple["Dataset | None", RowCounts]]:
        records = reread()
        while block := list(islice(records, STREAMED_RECORDS)):
            found = _Collection(plan)
            found.seen = set(held_out.seen)
            yield (found.close(source.name) if found.add(block) else (None, found.counts))

    return SourceRows(rows, splits, plan.path, plan.scheme, plan.format, counts), blocks


# The three kinds of source


class _Plan(NamedTuple):
    """How a kind of source is read."""

    records: Iterable[Record]
    to_row: Callable[[dict[str, Any]], Row]
    split: Callable[["Dataset"], dict[str, list[int]]]
    path: str | list[str] | None
    scheme: str | None
    format: RowFormat = "instruction"
    held_out: Iterable[Record] | None = None
    reread: Callable[[], Iterator[Record]] | None = None  # records, from their begin


def _skill_plan(source: SourceConfig, seed: int, validation_rows: int | None) -> _Plan:
    _reject(source, "path", "revision", "split", *FOREIGN)
    counts = {
        "train": source.rows or SKILL_ROWS["train"],
        "validation": validation_rows or SKILL_ROWS["validation"],
    }
    return _Plan(
        _skill_records(source.name.removeprefix("skill/"), counts, seed),
        partial(columns_to_row, instruction="instruction", input_=None, output="output", id_="id"),
        split_by_id,
        None,
        None,
    )


def _mbpp_plan(source: SourceConfig, seed: int) -> _Plan:
    _reject(source, "rows", *FOREIGN)
    scheme = source.split or "published"
    task_ids = mbpp_split(scheme, seed)
    records = read_records(
        source.path or MBPP,
        source.revision,
        columns=["task_id", "text", "code", "test_list"],
        hub_config="full" if source.path is None else None,
        hub_splits=tuple(MBPP_PUBLISHED),
    )
    split = partial(split_by_task, task_ids=task_ids)
    return _Plan(records, mbpp_to_row, split, source.path or MBPP, scheme)


def _columns_plan(source: SourceConfig, seed: int) -> _Plan:
    _reject(source, "rows")
    if source.path is None and source.name == "code_alpaca":
        source = replace(source, path=CODE_ALPACA)
    if source.path is None:
        known = nearest(source.name, ["code_alpaca", "mbpp", "skill/<skill>"])
        raise ValueError(f"source {source.name!r} is not built in and has no path{known}")
    scheme = source.split or "90/10"
    parts = shares(scheme)
    if parts is None:
        raise ValueError(
            f"source {source.name!r}: split is {scheme!r}, but must be two shares such as 90/10"
        )
    files = find_files(source.path)
    if files is not None:
        named = any(map(has_splits, files))
        _reject(source, "hub_config", *(() if named else ("hub_split",)))

    def records(columns: Columns) -> Iterator[Record]:
        splits = None if source.hub_split is None else (source.hub_split,)
        assert source.path is not None
        return read_records(
            source.path,
            source.revision,
            columns=columns,
            hub_config=source.hub_config,
            hub_splits=splits,
            streaming=source.stream_rows is not None,
        )

    first = list(islice(records(Columns()), LOOKED_AT))
    found = {key for record in first for key in record.fields}
    if not found and not any(getattr(source, name) for name in COLUMNS):
        problems = [f"{record.location}: {record.problem}" for record in first]
        _refuse_all(source.name, f"{len(first)} read, none as a row with columns", problems)
    reader = choose_reader(source, found)
    held_out = None
    if source.validation_path is not None:
        if find_files(source.validation_path) is None:
            raise ValueError(f"validation_path {source.validation_path} does not exist")
        held_out = read_records(source.validation_path, columns=reader.columns)
    split = partial(split_by_question, seed=seed, scheme=parts)
    return _Plan(
        records(reader.columns),
        reader.to_row,
        split,
        source.path,
        scheme if held_out is None else "validation_path",
        reader.format,
        held_out,
        partial(records, reader.columns),
    )


def _reject(source: SourceConfig, *names: str) -> None:
    for name in names:
        if getattr(source, name) is not None:
            raise ValueError(f"source {source.name!r}: {name} does not apply to it; leave it out")


# Records to rows


class _Collection:
    """Usable rows in their order, as Arrow columns, and what became of all records."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.read = self.empty = self.malformed = self.duplicates = 0
        self.problems: list[str] = []
        self.chunks: list[Dataset] = []
        self.pending: list[dict[str, str]] = []
        self.seen: set[str] = set()

    def add(self, records: Iterable[Record]) -> int:
        """How many of them are rows that were not there before."""
        before = len(self.seen)
        for record in records:
            self.read += 1
            try:
                if record.problem:
                    raise BadRecord(record.problem)
                row = self.plan.to_row(record.fields)
            except BadRecord as problem:
                self.malformed += 1
                self._tell(record, str(problem))
                continue
            row = Row(*(text.replace("\r\n", "\n") for text in row))
            if not row.output.strip():
                self.empty += 1
                what = "text" if self.plan.format == "text" else "answer"
                self._tell(record, f"the {what} is empty")
            elif self.plan.format in ("instruction", "completion") and not row.instruction.strip():
                self.empty += 1
                self._tell(record, "the instruction is empty")
            else:
                self._keep(row._replace(location=record.location))
        return len(self.seen) - before

    def _tell(self, record: Record, why: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(f"{record.location}: {why}")

    def _keep(self, row: Row) -> None:
        from datasets import Dataset

        content = content_hash(*row_content(row))
        if content in self.seen:
            self.duplicates += 1
            return
        self.seen.add(content)
        self.pending.append((row if row.id else row._replace(id=content[:32]))._asdict())
        if len(self.pending) == CHUNK_ROWS:
            self.chunks.append(Dataset.from_list(self.pending))
            self.pending = []

    def close(self, name: str) -> tuple["Dataset", RowCounts]:
        """Raises ValueError where there is no row."""
        from datasets import Dataset, concatenate_datasets

        if self.pending:
            self.chunks.append(Dataset.from_list(self.pending))
        if not self.chunks:
            counts = f"{self.read} read, {self.malformed} malformed, {self.empty} empty"
            _refuse_all(name, counts, self.problems)
        return concatenate_datasets(self.chunks), self.counts

    @property
    def counts(self) -> RowCounts:
        lost = (self.empty, self.malformed, self.duplicates)
        return RowCounts(self.read, *lost, tuple(self.problems))


def _refuse_all(name: str, counts: str, problems: list[str]) -> NoReturn:
    """Raises ValueError for a source without a row."""
    told = "".join(f"\n  {problem}" for problem in problems[:3])
    raise ValueError(f"source {name!r} has no usable row: {counts}{told}")


def _skill_records(skill: str, wanted: dict[str, int], seed: int) -> Iterator[Record]:
    from dylora.tasks import SKILLS, generate_tasks

    if skill not in SKILLS:
        raise ValueError(f"unknown skill {skill!r}{nearest(skill, list(SKILLS))}")
    for split in ("train", "validation"):
        for number, task in enumerate(generate_tasks(skill, split, wanted[split], seed=seed)):
            fields = {"instruction": task.instruction, "output": task.answer}
            yield Record(f"skill/{skill}:{split}:{number}", fields | {"id": f"{split}/{number}"})
