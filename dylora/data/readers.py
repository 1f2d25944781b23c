"""Records of a source as they stand there, each with its place: JSON, parquet, the hub.

Raises ValueError only where a source cannot be used at all; a bad record comes out as a problem.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dylora.fields import nearest
from dylora.storage.safe_io import distinct, open_regular, read_bytes

MAX_LINE = 16 << 20  # bytes of a line, longer ones are malformed
MAX_ARRAY = 256 << 20  # bytes of a .json file that is one array: it is read whole
MAX_TABLE = 64 << 30  # bytes of a parquet file once decompressed
MAX_UNPACKED = 4 << 30  # bytes of a .jsonl.gz once decompressed
FILE_TYPES = (".json", ".jsonl", ".jsonl.gz", ".parquet")


class Record(NamedTuple):
    """A row as it stands in its source."""

    place: str  # file:line
    fields: dict[str, Any]  # empty when there is a problem
    problem: str = ""  # why it could not even be parsed


class BadRecord(Exception):
    """The record is no row; the text says why."""


def read_records(
    path: str,
    revision: str | None,
    *,
    columns: list[str],
    hub_config: str | None = None,
    hub_splits: tuple[str, ...] | None = None,
) -> Iterator[Record]:
    """Raises ValueError where the path cannot be read or a column is nowhere in it."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{path} is a folder; name one of its files ({', '.join(FILE_TYPES)})")
    known = file.name.lower().endswith(FILE_TYPES)
    if not file.exists() and not known:
        return _hub_records(path, revision, columns, hub_config, hub_splits)
    if not file.exists():
        raise ValueError(f"{path} does not exist; a relative path starts at {Path.cwd()}")
    if not known:
        raise ValueError(f"{path} is of an unknown type; known are {', '.join(FILE_TYPES)}")
    if revision is not None:
        raise ValueError(f"{path} is a file, so the revision {revision!r} means nothing; remove it")
    open_regular(file).close()
    if file.suffix.lower() == ".parquet":
        return _parquet_records(file, columns)
    return _json_records(file, columns)


def _json_records(file: Path, columns: list[str]) -> Iterator[Record]:
    """Our own parser: `datasets` gives up on a whole file for one bad line, and names no line."""
    is_array = False
    if file.suffix.lower() == ".json":
        with open_regular(file) as stream:
            is_array = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    found: set[str] = set()
    for line, value in _array_values(file) if is_array else _line_values(file):
        if isinstance(value, BadRecord):
            yield Record(f"{file}:{line}", {}, str(value))
        elif not isinstance(value, dict):
            yield Record(f"{file}:{line}", {}, f"of type {type(value).__name__}, not an object")
        else:
            found.update(value)
            yield Record(f"{file}:{line}", value)
    if found:
        _require_columns(str(file), columns, found)


@contextmanager
def _open_lines(file: Path) -> Iterator[Callable[[int], bytes]]:
    """A function that reads the next line, at most so many bytes of it; b"" at the end."""
    with open_regular(file) as stream:
        if file.suffix.lower() != ".gz":
            yield stream.readline
            return
        unpacked = gzip.GzipFile(fileobj=stream)

        def read_line(size: int) -> bytes:
            try:
                line = unpacked.readline(size)
            except (OSError, EOFError, zlib.error) as error:
                raise ValueError(f"{file} cannot be decompressed: {error}") from error
            if unpacked.tell() > MAX_UNPACKED:
                raise ValueError(f"{file} has more than {MAX_UNPACKED:,} bytes once decompressed")
            return line

        yield read_line


def _line_values(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of JSON lines; blank lines are skipped."""
    with _open_lines(file) as read_line:
        for number in itertools.count(1):
            line = read_line(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = read_line(MAX_LINE)
                yield number, BadRecord(f"longer than {MAX_LINE:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"), object_pairs_hook=distinct)
            except UnicodeDecodeError as error:
                yield number, BadRecord(f"not UTF-8 at byte {error.start + 1}")
            except json.JSONDecodeError as error:
                yield number, BadRecord(f"not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield number, BadRecord(f"not JSON: {error}")


def _array_values(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of one JSON array. Raises ValueError where its syntax breaks: what
    follows could not be told apart."""
    data = read_bytes(file, MAX_ARRAY)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: not UTF-8; the file cannot be read") from error
    decoder = json.JSONDecoder(object_pairs_hook=distinct)
    space = re.compile(r"\s*")

    def after_space(start: int) -> int:
        match = space.match(text, start)
        assert match is not None
        return match.end()

    line, counted = 1, 0
    position = after_space(text.index("[") + 1)
    try:
        while text[position : position + 1] != "]":
            line, counted = line + text.count("\n", counted, position), position
            value, end = decoder.raw_decode(text, position)
            yield line, value
            position = after_space(end)
            if text[position : position + 1] == ",":
                position = after_space(position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected a comma or the end of the array", text, end)
        if after_space(position + 1) != len(text):
            raise json.JSONDecodeError("text after the end of the array", text, position + 1)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}:{error.lineno}: not JSON: {error.msg}; mend the file, or write an object a "
            "line (.jsonl), where a broken line costs only itself"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}:{line}: not JSON: {error}") from error


def _parquet_records(file: Path, columns: list[str]) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow.parquet import read_metadata

    try:
        groups = read_metadata(file)
        size = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        if size > MAX_TABLE:
            raise ValueError(f"it has {size:,} bytes once decompressed")
        table = load_dataset("parquet", data_files=str(file), split="train")
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error
    yield from _table_records(str(file), table, columns)


def _hub_records(
    name: str,
    revision: str | None,
    columns: list[str],
    config: str | None,
    splits: tuple[str, ...] | None,
) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        tables: Any = load_dataset(name, config, revision=revision)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name!r} is no local file, and the hub's set of that name (revision "
            f"{revision or 'main'}) cannot be loaded: {error}. Check the name and the network, or "
            f"give the path of a local file ({', '.join(FILE_TYPES)})"
        ) from error
    if splits is None:
        # A set's own validation and test rows are nobody's training data.
        splits = ("train",) if "train" in tables else tuple(tables)
        if len(splits) > 1:
            raise ValueError(f"{name!r} has no split train, but {', '.join(splits)}")
    for split in splits:
        if split in tables:
            yield from _table_records(f"{name}/{split}", tables[split], columns)


def _table_records(place: str, table: Any, columns: list[str]) -> Iterator[Record]:
    _require_columns(place, columns, set(table.column_names))
    row = 0
    for batch in table.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            row += 1
            yield Record(f"{place}:{row}", dict(zip(columns, values, strict=True)))


def _require_columns(place: str, columns: list[str], found: set[str]) -> None:
    for column in columns:
        if column not in found:
            raise ValueError(f"{place} has no column {column!r}{nearest(column, sorted(found))}")
