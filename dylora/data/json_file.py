"""JSON lines, gzipped or not, and JSON arrays.

Our own parser: `datasets` gives up on a whole file for one bad line, and names no line.
"""

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dylora.data.record import BadRecord, Record, require_columns
from dylora.storage.safe_io import distinct, expansion_bound, open_regular, read_bytes

MAX_LINE = 16 << 20  # bytes of a line, longer ones are malformed
MAX_ARRAY = 256 << 20  # bytes of a .json file that is one array: it is read whole
MAX_UNPACKED = 4 << 30  # bytes of a .jsonl.gz once decompressed


def read_json_file(file: Path, columns: list[str]) -> Iterator[Record]:
    """A .json file may be an array, or hold an object a line as a .jsonl file does."""
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
        require_columns(str(file), columns, found)


@contextmanager
def _open_lines(file: Path) -> Iterator[Callable[[int], bytes]]:
    """A function that reads the next line, at most so many bytes of it; b"" at the end."""
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > expansion_bound(file):
            raise ValueError(
                f"{file} has holes: more than {expansion_bound(file):,} bytes of content"
            )
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
