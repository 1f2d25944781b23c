"""What passes between processes: frames, and in them values.

A frame is four bytes of length, then JSON. Values are JSON with the types that it lacks as
[tag, content].
"""

import builtins
import contextlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

MESSAGE_BYTES = 8 * 2**20
"""The longest frame that is read from a program."""
DETAIL_LENGTH = 300
"""So much is told of an exception's message."""
EQUAL_HASHES = 100
"""With more keys of one hash a set or dictionary is not honest: to build it can take minutes."""


class Closed(Exception):
    """The other side has gone."""


class TooLong(Exception):
    """The other side announces more than it may say."""


def read_exactly(descriptor: int, count: int) -> bytes:
    """`count` bytes; raises Closed when the other side ends before."""
    parts = []
    while count:
        try:
            part = os.read(descriptor, min(count, 2**20))
        except ConnectionResetError:  # it died with our words unread
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
    """A value of Python's own types as JSON can say it; of others, the number of a handle.

    Instances of subclasses go as what they are underneath, so no method of theirs is ever asked.
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
    if isinstance(value, (list, tuple, set, frozenset)):
        for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
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
    """The value that `encode` was given; ValueError or TypeError for what it never writes."""
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
    if tag == "d":
        pairs = [(decode(key, handle), decode(item, handle)) for key, item in inner]
        _require_spread(key for key, _ in pairs)
        return dict(pairs)
    for name, kind in (("b", bytes), ("B", bytearray)):
        if tag == name:
            return kind.fromhex(inner)
    for name, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if tag == name and type(inner) is list:
            items = [decode(item, handle) for item in inner]
            if tag in "sz":
                _require_spread(items)
            return kind(items)
    raise ValueError("not a value")


def _require_spread(keys: Iterable[Any]) -> None:
    counts = Counter(map(hash, keys))
    if counts and max(counts.values()) > EQUAL_HASHES:
        raise ValueError("its keys have one hash")


def describe_exception(error: BaseException) -> list[str]:
    """An exception as [type, message].

    The type is the nearest of Python's own: tests may expect a ValueError, and know no others.
    """
    message = ""
    with contextlib.suppress(BaseException):
        message = str(error)[:DETAIL_LENGTH].encode("utf-8", "replace").decode()
    own = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return [own[0], message]
