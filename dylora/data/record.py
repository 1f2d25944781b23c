"""A row as it stands in its source, before it is checked."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from dylora.fields import nearest


class Record(NamedTuple):
    """A row as it stands in its source."""

    location: str  # file:line
    fields: dict[str, Any]  # empty when there is a problem
    problem: str = ""  # why it could not even be parsed


class RowCounts(NamedTuple):
    """What became of the records of a source."""

    read: int
    empty: int  # without an instruction or without an answer
    malformed: int  # unreadable, or with missing or non-text fields
    duplicates: int  # equal to an earlier row in instruction, input and output
    problems: tuple[str, ...]  # `file:line: why` of the first empty and malformed ones


class BadRecord(Exception):
    """The record is no row; the text says why."""


def table_records(location: str, table: Any, columns: list[str]) -> Iterator[Record]:
    """The rows of a `datasets` table, numbered from 1."""
    require_columns(location, columns, set(table.column_names))
    row = 0
    for batch in table.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            row += 1
            yield Record(f"{location}:{row}", dict(zip(columns, values, strict=True)))


def require_columns(location: str, columns: list[str], found: set[str]) -> None:
    """Raises ValueError naming a column that a source does not have."""
    for column in columns:
        if column not in found:
            raise ValueError(f"{location} has no column {column!r}{nearest(column, sorted(found))}")
