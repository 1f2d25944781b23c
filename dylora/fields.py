"""Typed, validated dataclass fields: one type system for YAML, the command line and checkpoints."""

import difflib
import math
from collections.abc import Iterator
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

MAX_SHOWN = 120  # characters of a value in an error


def shown(value: Any) -> str:
    """repr of a value from a file, short enough for a line."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def is_whole_number(value: Any, least: int = 0, most: int = 2**63 - 1) -> bool:
    """Whether a value from a file is an int (no bool) within bounds."""
    return type(value) is int and least <= value <= most


def is_number(value: Any, least: float = -1e300, most: float = 1e300) -> bool:
    """Whether a value from a file is an int or float (no bool, no NaN) within bounds."""
    return type(value) in (int, float) and least <= value <= most


def is_name(value: Any, longest: int = 512) -> bool:
    """Whether a value from a file is a text that may stand in a line: printable, not too long."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean …?' with the closest of the known words, or what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid are {', '.join(sorted(known))}"


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raises ValueError with the field's name, the value it got and the rule."""
    if not condition:
        raise ValueError(f"{name} is {shown(value)}, but must be {rule}")


def check_fields(config: Any) -> None:
    """Fields hold what they are declared as, finite numbers, and one of the values they may have;
    JSON and YAML bring anything, and dataclasses look at none of it.

    Raises ValueError.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        require(_fits(value, item.type), item.name, value, describe_type(item.type))
        numbers = [number for number in _leaves(value) if isinstance(number, float)]
        require(all(map(math.isfinite, numbers)), item.name, value, "finite")
        choices = _literal_choices(item.type)
        if choices and value not in choices:
            listed = ", ".join(map(str, choices))
            hint = nearest(value, [str(c) for c in choices]) if isinstance(value, str) else ""
            raise ValueError(f"{item.name} is {shown(value)}, but must be one of {listed}{hint}")


def describe_type(annotation: Any) -> str:
    """A type in words, to stand after "must be"."""
    plain = {float: "a float", int: "an int", bool: "true or false", str: "a string"}
    kind, parts = get_origin(annotation), get_args(annotation)
    if annotation in plain:
        return plain[annotation]
    if annotation is NoneType:
        return "null"
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (Union, UnionType):
        return ", or ".join(map(describe_type, parts))
    if kind is list:
        return f"a list, each item {describe_type(parts[0])}"
    if kind is tuple:
        return f"a list of {len(parts)} items, each {describe_type(parts[0])}"
    if kind is dict:
        return "a mapping" + ("" if parts[1] is Any else f", each value {describe_type(parts[1])}")
    return str(annotation)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of a declared type; a Literal's values are listed elsewhere."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if annotation is float and isinstance(value, float):
        return True
    if annotation in (int, float):  # an int may stand for a float
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and abs(value) < 2**63
    if kind is Literal or annotation is Any:
        return True
    if kind in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if kind is tuple:
        right = isinstance(value, tuple) and len(value) == len(parts)
        return right and all(map(_fits, value, parts))
    if kind is dict:
        return isinstance(value, dict) and all(
            _fits(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items()
        )
    return isinstance(value, annotation)


def _leaves(value: Any) -> Iterator[Any]:
    """A field's value, or what is in its list or mapping."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    else:
        yield value


def _literal_choices(annotation: Any) -> tuple[Any, ...]:
    """The values a Literal, or an optional Literal, allows; empty for other types."""
    members = get_args(annotation)
    if getattr(annotation, "__origin__", None) is Literal:
        return members
    for member in members:
        if getattr(member, "__origin__", None) is Literal:
            return (*get_args(member), None)
    return ()
