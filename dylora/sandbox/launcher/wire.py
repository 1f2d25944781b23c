"""Frames between processes, and the encoding of values in them.

A frame is four bytes of length, then JSON. Values of types that JSON lacks are [tag, content].
"""

import builtins
import contextlib
import hashlib
import marshal
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import chain
from typing import Any, cast

MESSAGE_BYTES = 8 * 2**20
"""The longest frame from a program that the runner and the host read."""
VALUE_BYTES = 64 * 2**20
"""The longest frame from a program that the test runner reads; its memory is limited, too."""
LARGE_ITEMS = 8 * 10**6
"""Lists and tuples with more items, counted through all levels, or beyond `VALUE_BYTES`, are not
copied: the tests get their digest, which equals that of an equal value alone."""
DETAIL_LENGTH = 300
"""Characters of an exception's message that are kept."""
EQUAL_HASHES = 100
"""More keys of one hash are refused: building such a set or dictionary can take minutes."""
_KINDS = {"l": list, "t": tuple, "s": set, "z": frozenset}
HANDLES = ("h", "m", "f")
"""Tags of what is not copied: an object of the program's, a match object of the program's, which is
true, and a function of the tests'; each with its number."""


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


def encode(value: Any, handle: Callable[[Any], list[Any]]) -> Any:
    """A value for JSON: of built-in types, Decimal or Fraction; handle: any other as [tag, number].

    An instance of a built-in type's subclass is encoded as that type, and none of its methods is
    called.
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
    if type(value) is Decimal:
        return ["D", str(value)]
    if type(value) is Fraction:
        return ["F", [encode(part, handle) for part in (value.numerator, value.denominator)]]
    return handle(value)


def decode(content: Any, handle: Callable[[str, int], Any]) -> Any:
    """The value that was encoded; raises ValueError or TypeError for what `encode` never writes."""
    if content is None or type(content) in (bool, int, float, str):
        return content
    if type(content) is not list or len(content) != 2:
        raise ValueError("not a value")
    tag, inner = content
    if tag == "i":
        return int(inner, 16)
    if tag in HANDLES and type(inner) is int:
        return handle(tag, inner)
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
    if tag in ("D", "F"):
        return _number(tag, inner)
    raise ValueError("not a value")


def _number(tag: str, inner: Any) -> Decimal | Fraction:
    try:
        if tag == "D":
            number = Decimal(str.__str__(inner))
            if not number.is_snan():  # each comparison with a signalling NaN is an exception
                return number
        else:
            over, under = (decode(part, lambda *_: None) for part in inner)
            return Fraction(over, under)
    except ArithmeticError:
        pass
    raise ValueError("not a value")


def is_large(value: Any) -> bool:
    """Whether a list or tuple has more than `LARGE_ITEMS` items, those of inner ones included."""
    level, count = [value], 0
    for _ in range(100):  # a list may contain itself
        level = [item for item in level if type(item) in (list, tuple)]
        count += sum(map(len, level))
        if count > LARGE_ITEMS or not level:
            break
        level = list(chain.from_iterable(level))
    return count > LARGE_ITEMS


def digest(value: Any) -> str:
    """SHA-256 of a list or tuple; equal digests mean values that are equal in values and types.

    Raises ValueError for items of types other than Python's own.
    """
    found = hashlib.sha256(type(value).__name__.encode())
    for item in value:
        # Version 2 has no references: equal items give equal bytes. Lengths keep them apart.
        part = marshal.dumps(item, 2)
        found.update(struct.pack("<Q", len(part)))
        found.update(part)
    return found.hexdigest()


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
