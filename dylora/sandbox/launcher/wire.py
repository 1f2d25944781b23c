"""Frames between processes, and the encoding of values in them.

A frame is four bytes of length, then JSON. Values of types that JSON lacks are [tag, content].
"""

import builtins
import contextlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

MESSAGE_BYTES = 8 * 2**20
"""The longest frame from a program that the runner and the host read."""
VALUE_BYTES = 64 * 2**20
"""The longest frame from a program that the test runner reads; its memory is limited, too."""
DETAIL_LENGTH = 300
"""Characters of an exception's message that are kept."""
EQUAL_HASHES = 100
"""More keys of one hash are refused: building such a set or dictionary can take minutes."""
_KINDS = {"l": list, "t": tuple, "s": set, "z": frozenset}


class Closed(Exception):
    """The other side has closed the channel."""


class TooLong(Exception):
    """The other side announces a longer frame than is allowed."""


def read_exactly(descriptor: int, count: int) -> bytes:
    """`count` bytes; raises Closed when the other side ends before."""
    parts = []
    while count:
        try:
            part = os.read(descriptor, min(count, 2**20))
        except ConnectionResetError:  # it ended with a message unread
            part = b""
        if not part:
            raise Closed
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int, limit: int = MESSAGE_BYTES) -> bytes:
    """The next frame's content; raises Closed at the end, TooLong beyond `limit` bytes."""
    (size,) = struct.unpack("<I", read_exactly(descriptor, 4))
    if size > limit:
        raise TooLong
    return read_exactly(descriptor, size)


def write_frame(descriptor: int, content: bytes) -> None:
    """Writes a frame whole; raises Closed when nobody reads it."""
    rest = memoryview(struct.pack("<I", len(content)) + content)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except (BrokenPipeError, ConnectionResetError):
        raise Closed from None


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """A value of built-in types for JSON; for other values, the number of a handle.

    A subclass's instance is encoded as its built-in type, and none of its methods is called.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < 2**63 else ["i", hex(number)]
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    for tag, kind in _KINDS.items():
        if isinstance(value, kind):
            items: Iterator[Any] = cast(Any, kind).__iter__(value)
            return [tag, [encode(item, handle) for item in items]]
    if isinstance(value, dict):
        pairs = dict.items(value)
        return ["d", [[encode(key, handle), encode(item, handle)] for key, item in pairs]]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "B", value.hex()]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if (
        isinstance(value, type)
        and vars(builtins).get(type.__getattribute__(value, "__name__")) is value
    ):
        return ["y", type.__getattribute__(value, "__name__")]
    return ["h", handle(value)]


def decode(content: Any, handle: Callable[[int], Any]) -> Any:
    """The value that was encoded; raises ValueError or TypeError for what `encode` never writes."""
    if content is None or type(content) in (bool, int, float, str):
        return content
    if type(content) is not list or len(content) != 2:
        raise ValueError("not a value")
    tag, inner = content
    if tag == "i":
        return int(inner, 16)
    if tag == "h" and type(inner) is int:
        return handle(inner)
    if tag == "y":
        kind = getattr(builtins, inner)
        if isinstance(kind, type) and kind.__name__ == inner:
            return kind
    if tag == "c":
        real, imaginary = map(float, inner)
        return complex(real, imaginary)
    if tag in ("b", "B"):
        return bytes.fromhex(inner) if tag == "b" else bytearray.fromhex(inner)
    if tag == "d":
        pairs = [(decode(key, handle), decode(item, handle)) for key, item in inner]
        _require_spread(key for key, _ in pairs)
        return dict(pairs)
    if tag in ("l", "t", "s", "z") and type(inner) is list:
        items = [decode(item, handle) for item in inner]
        if tag in ("s", "z"):
            _require_spread(items)
        return _KINDS[tag](items)
    raise ValueError("not a value")


def _require_spread(keys: Iterable[Any]) -> None:
    counts = Counter(map(hash, keys))
    if counts and max(counts.values()) > EQUAL_HASHES:
        raise ValueError("its keys have one hash")


def describe_exception(error: BaseException) -> list[str]:
    """An exception as [type, message].

    The type is the nearest built-in one: tests may expect a ValueError, and know no others.
    """
    message = ""
    with contextlib.suppress(BaseException):
        message = str(error)[:DETAIL_LENGTH].encode("utf-8", "replace").decode()
    own = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return [own[0], message]
