"""Plain text: a row for each part of a `.txt` file, cut where it is longer than PART."""

from collections.abc import Iterator
from pathlib import Path

from dylora.data.record import Columns, Record
from dylora.data.unpacked import MAX_LINE, open_unpacked

PART = 64 << 10
"""Bytes from which on a part ends at the next empty line, or, twice as long, at any line's end. So
a large file has rows to hold out, and needs no memory."""


def read_text_file(file: Path, columns: Columns) -> Iterator[Record]:
    """Rows with the one column `text`, located by their first line."""
    columns.choose(str(file), {"text"})
    lines: list[bytes] = []
    first, number, size = 1, 0, 0
    with open_unpacked(file) as stream:
        while line := stream.readline(MAX_LINE + 1):
            number, size = number + 1, size + len(line)
            lines.append(line)
            if size > 2 * PART or (size > PART and not line.strip()):
                yield _record(file, first, b"".join(lines))
                lines, first, size = [], number + 1, 0
    if lines:
        yield _record(file, first, b"".join(lines))


def _record(file: Path, line: int, part: bytes) -> Record:
    location = f"{file}:{line}"
    if len(part) > MAX_LINE:
        return Record(location, {}, f"longer than {MAX_LINE:,} bytes")
    try:
        return Record(location, {"text": part.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        line += part.count(b"\n", 0, error.start)
        return Record(f"{file}:{line}", {}, "not UTF-8")
