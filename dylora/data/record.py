"""A row as it stands in its source, before it is checked."""

from collections.abc import Collection, Iterator, Sequence
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

    def plus(self, other: "RowCounts") -> "RowCounts":
        """Of both."""
        read, empty, malformed, duplicates = map(sum, zip(self[:4], other[:4], strict=True))
        return RowCounts(read, empty, malformed, duplicates, self.problems + other.problems)


class BadRecord(Exception):
    """The record is no row; the text says why."""


class Columns(NamedTuple):
    """What is read of a file."""

    required: Sequence[str] | None = None  # None: all that there are
    optional: Sequence[str] = ()  # where a file has them

    def choose(self, location: str, found: Collection[str]) -> list[str]:
        """Those of a file. Raises ValueError naming one that it does not have."""
        if self.required is None:
            return list(found)
        for column in self.required:
            if column not in found:
                raise ValueError(
                    f"{location} has no column {column!r}{nearest(column, sorted(found))}"
                )
        return [*self.required, *(column for column in self.optional if column in found)]


def table_records(location: str, table: Any, wanted: Columns) -> Iterator[Record]:
    """The rows of a `datasets` table, numbered from 1."""
    # A streamed one may not know its columns before its first row.
    columns = wanted.choose(location, table.column_names or list(next(iter(table), ())))
    row = 0
    for batch in table.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            row += 1
            yield Record(f"{location}:{row}", dict(zip(columns, values, strict=True)))
