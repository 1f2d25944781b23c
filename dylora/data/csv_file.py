"""Tables of text, `.csv` and `.tsv`: the first line names the columns, quotes as in RFC 4180.

By Python's csv module: `datasets` gives up on a whole file for one bad row, and names no line.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dylora.data.record import Columns, Record
from dylora.data.unpacked import MAX_LINE, open_unpacked, plain_name


def read_csv_file(file: Path, columns: Columns) -> Iterator[Record]:
    """Raises ValueError where the file has no line of names, one twice, or lacks a column."""
    csv.field_size_limit(MAX_LINE)  # of the process; the default is 128 KiB
    with open_unpacked(file) as stream:
        delimiter = "\t" if plain_name(file).endswith(".tsv") else ","
        rows = csv.reader(_lines(file, stream), delimiter=delimiter, strict=True)
        try:
            names = next(rows, [])
        except csv.Error as error:
            raise ValueError(f"{file}:1: no line of column names: {error}") from error
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{file}:1: the first line has to name the columns, each once")
        columns.choose(str(file), set(names))
        while True:
            location = f"{file}:{rows.line_num + 1}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                yield Record(location, {}, f"not CSV: {error}")
                continue
            if row is None:
                return
            if row and len(row) != len(names):
                yield Record(
                    location, {}, f"has {len(row)} fields, and there are {len(names)} names"
                )
            elif row:
                yield Record(location, dict(zip(names, row, strict=True)))


def _lines(file: Path, stream: BinaryIO) -> Iterator[str]:
    """What is not UTF-8 becomes halves of surrogate pairs, which no row may have."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"{file}:{number}: a line of more than {MAX_LINE:,} bytes")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape")
