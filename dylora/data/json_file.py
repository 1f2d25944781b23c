"""JSON lines and JSON arrays.

Our own parser: `datasets` gives up on a whole file for one bad line, and names no line.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dylora.data.record import BadRecord, Columns, Record
from dylora.data.unpacked import MAX_LINE, open_unpacked, plain_name
from dylora.storage.safe_io import distinct

MAX_ARRAY = 256 << 20  # bytes of a .json file that is one array: it is read whole


class Number(float):
    """A number with a point or an exponent; its text is how the file writes it (1.50, 1e3)."""

    written: str

    def __new__(cls, written: str) -> "Number":
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


_AS_WRITTEN: Any = {"object_pairs_hook": distinct, "parse_float": Number}


def read_json_file(file: Path, columns: Columns) -> Iterator[Record]:
    """A .json file may be an array, or hold an object a line as a .jsonl file does."""
    is_array = False
    if plain_name(file).endswith(".json"):
        with open_unpacked(file) as stream:
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
        columns.choose(str(file), found)


def _line_values(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of JSON lines; blank lines are skipped."""
    with open_unpacked(file) as stream:
        for number in itertools.count(1):
            line = stream.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield number, BadRecord(f"longer than {MAX_LINE:,} bytes")
                continue
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"), **_AS_WRITTEN)
            except UnicodeDecodeError as error:
                yield number, BadRecord(f"not UTF-8 at byte {error.start + 1}")
            except json.JSONDecodeError as error:
                yield number, BadRecord(f"not JSON: {error.msg} at column {error.colno}")
            except (ValueError, RecursionError) as error:
                yield number, BadRecord(f"not JSON: {error}")


def _array_values(file: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers and values of one JSON array. Raises ValueError where its syntax breaks: what
    follows could not be told apart."""
    with open_unpacked(file) as stream:
        data = stream.read(MAX_ARRAY + 1)
    if len(data) > MAX_ARRAY:
        raise ValueError(
            f"{file} is an array of more than the {MAX_ARRAY:,} bytes that one may have"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: not UTF-8; the file cannot be read") from error
    decoder = json.JSONDecoder(**_AS_WRITTEN)
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
