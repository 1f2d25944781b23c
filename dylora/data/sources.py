"""Rows of instruction-shaped sets: read, checked, stripped of duplicates, split.

A set is one of the built-in names, a local file, or a set of the hub. What cannot be trained on is
counted and reported with its location: `file:line`, or `file:row` (from 1) in parquet and on the
hub.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dylora.data.prompts import mbpp_instruction
from dylora.data.readers import read_records
from dylora.data.record import BadRecord, Record, RowCounts
from dylora.data.splits import (
    MBPP_PUBLISHED,
    MBPP_TASKS,
    content_hash,
    mbpp_split,
    split_by_id,
    split_by_question,
    split_by_task,
)
from dylora.fields import nearest
from dylora.run_config import SourceConfig, SplitScheme

if TYPE_CHECKING:
    from datasets import Dataset

CODE_ALPACA_SOURCE = {
    "path": "sahil2801/CodeAlpaca-20k",
    "instruction_column": "instruction",
    "input_column": "input",
    "output_column": "output",
}
MBPP = "google-research-datasets/mbpp"
SKILL_ROWS = {"train": 2000, "validation": 200}
COLUMNS = ("instruction_column", "input_column", "output_column")
MAX_PROBLEMS = 20
CHUNK_ROWS = 10_000


class Row(NamedTuple):
    """One question and its answer."""

    instruction: str  # stripped
    input: str  # stripped; "" when there is none
    output: str  # without trailing white space
    id: str  # MBPP's task id, <split>/<n> of a skill, else the content's hash


class SourceRows(NamedTuple):
    """What was read from one source."""

    rows: "Dataset"  # usable rows, columns as in Row
    splits: dict[str, list[int]]  # indices into rows of train and validation
    path: str | None  # file or hub name; None: generated
    split_scheme: SplitScheme | None  # the one that was used; None: generated splits
    counts: RowCounts


def read_source(
    source: SourceConfig, *, seed: int = 0, skill_validation_rows: int | None = None
) -> SourceRows:
    """Reads and splits one source; the same seed gives the same splits.

    MBPP is split by task id. Others go 90/10 by question (instruction and input), whatever the
    order of the file: two answers to one question lie on the same side. Duplicates count once.
    Raises ValueError for settings, files or hub sets that cannot be used, with what to do.
    """
    if source.name.startswith("skill/"):
        plan = _skill_plan(source, seed, skill_validation_rows)
    elif source.name == "mbpp":
        plan = _mbpp_plan(source, seed)
    else:
        plan = _columns_plan(source, seed)
    rows, counts = _collect(plan.records, plan.to_row, source.name)
    return SourceRows(rows, plan.split(rows), plan.path, plan.scheme, counts)


# The three kinds of source


class _Plan(NamedTuple):
    """How a kind of source is read."""

    records: Iterable[Record]
    to_row: Callable[[dict[str, Any]], Row]
    split: Callable[["Dataset"], dict[str, list[int]]]
    path: str | None
    scheme: SplitScheme | None


def _skill_plan(source: SourceConfig, seed: int, validation_rows: int | None) -> _Plan:
    _reject(source, "path", "revision", "split_scheme", *COLUMNS)
    counts = {
        "train": source.rows or SKILL_ROWS["train"],
        "validation": validation_rows or SKILL_ROWS["validation"],
    }
    return _Plan(
        _skill_records(source.name.removeprefix("skill/"), counts, seed),
        partial(_columns_to_row, instruction="instruction", input_=None, output="output", id_="id"),
        split_by_id,
        None,
        None,
    )


def _mbpp_plan(source: SourceConfig, seed: int) -> _Plan:
    _reject(source, "rows", *COLUMNS)
    scheme = _split_scheme(source, "published", "70/10/20")
    records = read_records(
        source.path or MBPP,
        source.revision,
        columns=["task_id", "text", "code", "test_list"],
        hub_config="full" if source.path is None else None,
        hub_splits=tuple(MBPP_PUBLISHED),
    )
    split = partial(split_by_task, task_ids=mbpp_split(scheme, seed))
    return _Plan(records, _mbpp_to_row, split, source.path or MBPP, scheme)


def _columns_plan(source: SourceConfig, seed: int) -> _Plan:
    _reject(source, "rows")
    scheme = _split_scheme(source, "90/10")
    defaults = CODE_ALPACA_SOURCE if source.name == "code_alpaca" else {}
    path, instruction, input_, output = (
        getattr(source, name) or defaults.get(name) for name in ("path", *COLUMNS)
    )
    if path is None:
        known = nearest(source.name, ["code_alpaca", "mbpp", "skill/<skill>"])
        raise ValueError(f"source {source.name!r} is not built in and has no path{known}")
    if instruction is None or output is None:
        raise ValueError(
            f"source {source.name!r}: name its columns with instruction_column and output_column"
        )
    columns = [column for column in (instruction, input_, output) if column is not None]
    records = read_records(path, source.revision, columns=columns)
    to_row = partial(_columns_to_row, instruction=instruction, input_=input_, output=output)
    return _Plan(records, to_row, partial(split_by_question, seed=seed), path, scheme)


def _split_scheme(source: SourceConfig, *choices: SplitScheme) -> SplitScheme:
    if source.split_scheme not in (None, *choices):
        raise ValueError(
            f"source {source.name!r}: split_scheme is {source.split_scheme!r}, but must be "
            + " or ".join(choices)
        )
    return source.split_scheme or choices[0]


def _reject(source: SourceConfig, *names: str) -> None:
    for name in names:
        if getattr(source, name) is not None:
            raise ValueError(f"source {source.name!r}: {name} does not apply to it; leave it out")


# Records to rows


def _collect(
    records: Iterable[Record], to_row: Callable[[dict[str, Any]], Row], name: str
) -> tuple["Dataset", RowCounts]:
    """Usable rows in their order, as Arrow columns, and what became of all."""
    from datasets import Dataset, concatenate_datasets

    read = empty = malformed = duplicates = 0
    problems: list[str] = []
    chunks: list[Dataset] = []
    pending: list[dict[str, str]] = []
    seen: set[str] = set()
    for record in records:
        read += 1
        try:
            if record.problem:
                raise BadRecord(record.problem)
            row = to_row(record.fields)
        except BadRecord as problem:
            malformed += 1
            problems += [f"{record.location}: {problem}"] * (len(problems) < MAX_PROBLEMS)
            continue
        instruction, input_, output, id_ = (text.replace("\r\n", "\n") for text in row)
        row = Row(instruction.strip(), input_.strip(), output.rstrip(), id_)
        if not row.instruction or not row.output:
            empty += 1
            what = "answer" if row.instruction else "instruction"
            problems += [f"{record.location}: the {what} is empty"] * (len(problems) < MAX_PROBLEMS)
            continue
        content = content_hash(row.instruction, row.input, row.output)
        if content in seen:
            duplicates += 1
            continue
        seen.add(content)
        pending.append((row if row.id else row._replace(id=content[:32]))._asdict())
        if len(pending) == CHUNK_ROWS:
            chunks.append(Dataset.from_list(pending))
            pending = []
    if pending:
        chunks.append(Dataset.from_list(pending))
    if not chunks:
        raise ValueError(
            f"source {name!r} has no usable row: {read} read, {malformed} malformed, {empty} empty"
            + "".join(f"\n  {problem}" for problem in problems[:3])
        )
    counts = RowCounts(read, empty, malformed, duplicates, tuple(problems))
    return concatenate_datasets(chunks), counts


def _columns_to_row(
    fields: dict[str, Any],
    *,
    instruction: str,
    input_: str | None,
    output: str,
    id_: str | None = None,
) -> Row:
    return Row(
        _text(fields, instruction),
        # A row without further input leaves the field out or has null there.
        "" if input_ is None or fields.get(input_) is None else _text(fields, input_),
        _text(fields, output),
        "" if id_ is None else _text(fields, id_),
    )


def _mbpp_to_row(fields: dict[str, Any]) -> Row:
    task_id, tests = fields.get("task_id"), fields.get("test_list")
    if type(task_id) is not int or not 1 <= task_id <= MBPP_TASKS:
        raise BadRecord(f"task_id is {task_id!r}, but must be from 1 to {MBPP_TASKS}")
    if not isinstance(tests, list) or not tests or not isinstance(tests[0], str):
        raise BadRecord("test_list has no test")
    text, code = _text(fields, "text"), _text(fields, "code")
    return Row(mbpp_instruction(text, tests[0]) if text.strip() else "", "", code, str(task_id))


def _text(fields: dict[str, Any], column: str) -> str:
    if column not in fields:
        raise BadRecord(f"no {column!r}")
    value = fields[column]
    if not isinstance(value, str):
        raise BadRecord(f"{column!r} is of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{column!r} holds half a surrogate pair, which is no text") from None
    return value


def _skill_records(skill: str, wanted: dict[str, int], seed: int) -> Iterator[Record]:
    from dylora.tasks import SKILLS, generate_tasks

    if skill not in SKILLS:
        raise ValueError(f"unknown skill {skill!r}{nearest(skill, list(SKILLS))}")
    for split in ("train", "validation"):
        for number, task in enumerate(generate_tasks(skill, split, wanted[split], seed=seed)):
            fields = {"instruction": task.instruction, "output": task.answer}
            yield Record(f"skill/{skill}:{split}:{number}", fields | {"id": f"{split}/{number}"})
