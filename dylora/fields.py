"""Typed, validated dataclass fields: one type system for YAML, the command line and checkpoints.

`convert` makes a raw value one of its field's type, and `build` makes a mapping a dataclass. What
else must hold of a field stands beside it, in `option(…)`, for `check_fields` in `__post_init__`.
"""

import ast
import difflib
import functools
import inspect
import itertools
import math
import operator
import reprlib
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
Parse = Callable[[str], Any]  # a text to the YAML value that it writes; raises ValueError
MAX_SHOWN = 120  # characters of a value in an error
REPR = reprlib.Repr()  # looks at a few items of each list, and at six levels
REPR.maxstring = REPR.maxlong = REPR.maxother = MAX_SHOWN
MAX_INT = 2**63 - 1
PLAIN = {float: "a float", int: "an int", bool: "true or false", str: "a string", NoneType: "null"}


class FieldError(ValueError):
    """What is wrong with one field, as `key` (its path) and the rest of the sentence."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(key, problem)
        self.key, self.problem = key, problem

    def __str__(self) -> str:
        return self.key + self.problem

    def under(self, path: str) -> "FieldError":
        """The same of a field inside of `path`."""
        return FieldError(join(path, self.key), self.problem)


class UnknownKey(FieldError):
    """A key that no field has; `siblings` are the names that its last part could have been."""

    def __init__(self, key: str, siblings: list[str]) -> None:
        hint = nearest(key.rpartition(".")[2], siblings)
        super().__init__(key, f"unknown field {shown(key)}{hint}")
        self.siblings = siblings

    def __str__(self) -> str:
        return self.problem


def shown(value: Any) -> str:
    """repr of a value from a file, short enough for a line."""
    try:
        text = REPR.repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a number of type {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def is_whole_number(value: Any, least: int = 0, most: int = MAX_INT) -> bool:
    """Whether a value from a file is an int (no bool) within bounds."""
    return type(value) is int and least <= value <= most


def is_number(value: Any, least: float = -1e300, most: float = 1e300) -> bool:
    """Whether a value from a file is an int or float (no bool, no NaN) within bounds."""
    return type(value) in (int, float) and least <= value <= most


def is_name(value: Any, longest: int = 512) -> bool:
    """Whether a value from a file is a text that may stand in a line: printable, not too long."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def closest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known word that is most like `word`, if any is."""
    return next(iter(difflib.get_close_matches(word[:MAX_SHOWN], known, 1, cutoff)), None)


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean …?' with the closest of the known words, or what there is."""
    close = closest(word, known)
    return f"; did you mean {close!r}?" if close else f"; valid are {', '.join(sorted(known))}"


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raises FieldError with the field's name, the value it got and the rule."""
    if not condition:
        raise FieldError(name, f" is {shown(value)}, but must be {rule}")


# Declarations


class Bounds(NamedTuple):
    """The range of a number, or of every number in a list or mapping."""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None

    def hold(self, value: float) -> bool:
        rules = zip((operator.gt, operator.ge, operator.lt, operator.le), self, strict=True)
        return all(bound is None or rule(value, bound) for rule, bound in rules)

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        words = zip(("above", "at least", "below", "at most"), self, strict=True)
        return " and ".join(f"{word} {bound}" for word, bound in words if bound is not None)


def option(
    default: Any = MISSING,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    accept: Callable[[Any], bool] | None = None,
    rule: str = "",
    **metadata: Any,
) -> Any:
    """A dataclass field and what must hold of it beside its type; null is not asked.

    Without a default it is required; a list or dict is copied for each instance. The bounds are of
    its number, or of every number in it; `rule` says, after "must be", what `accept` asks.
    """
    bounds = Bounds(above, least, below, most)
    if any(bound is not None for bound in bounds):
        metadata["bounds"] = bounds
    if accept is not None:
        metadata["accept"], metadata["rule"] = accept, rule
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """To be called by `__post_init__`: every field is of its type, finite and in its range.

    A list given for a tuple becomes one. Raises FieldError.
    """
    hints = field_types(type(config))
    for item in fields(config):
        value = convert(getattr(config, item.name), hints[item.name], item.name)
        object.__setattr__(config, item.name, value)  # also of a frozen one
        leaves = value.values() if isinstance(value, dict) else value
        leaves = leaves if isinstance(value, dict | list | tuple) else [value]
        numbers = [leaf for leaf in leaves if type(leaf) in (int, float)]
        require(all(map(math.isfinite, numbers)), item.name, value, "finite")
        bounds, accept = item.metadata.get("bounds"), item.metadata.get("accept")
        each = "" if numbers == [value] else "numbers "
        held = bounds is None or all(map(bounds.hold, numbers))
        require(held, item.name, value, f"{each}{bounds}")
        held = accept is None or value is None or accept(value)
        require(held, item.name, value, item.metadata.get("rule", ""))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The type of each field, resolved where it was written as a text."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring under each field, on one line; a field without one is left out."""
    found = {}
    for part in (part for part in reversed(cls.__mro__) if is_dataclass(part)):
        body = ast.parse(textwrap.dedent(inspect.getsource(part))).body[0].body  # type: ignore
        for item, text in itertools.pairwise(body):
            if isinstance(item, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(item.target)] = " ".join(ast.literal_eval(text.value).split())
    return found


def default_of(item: "Field[Any]") -> Any:
    """A field's default, made if it has to be; MISSING where it is required."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def describe_type(annotation: Any) -> str:
    """A type in words, to stand after "must be"."""
    kind, parts = get_origin(annotation), get_args(annotation)
    if annotation in PLAIN:
        return PLAIN[annotation]
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (Union, UnionType):
        return ", or ".join(map(describe_type, parts))
    if kind is list or parts[1:] == (Ellipsis,):
        return f"a list, each item {describe_type(parts[0])}"
    if kind is tuple:
        return f"a list of {len(parts)} items, each {describe_type(parts[0])}"
    if kind is dict:
        return "a mapping" + ("" if parts[1] is Any else f", each value {describe_type(parts[1])}")
    return "a mapping" if is_dataclass(annotation) else str(annotation)


# Raw values


def build(cls: type[T], raw: Any, key: str = "", parse: Parse | None = None) -> T:
    """The dataclass that a mapping describes.

    Its `RENAMED`, if it has one, maps names in files of earlier versions to those of today, or to
    None where a setting is gone. Raises FieldError, or the UnknownKey among them.
    """
    hints = field_types(cls)
    raw = {} if raw is None else raw  # "train:" with nothing under it
    if not isinstance(raw, dict):
        raise FieldError(key, f" is {shown(raw)}, but must have the fields {', '.join(hints)}")
    values: dict[str, Any] = {}
    renamed = getattr(cls, "RENAMED", {})
    for written, value in raw.items():
        name = renamed.get(written, str(written))
        if name is None:
            continue
        if name not in hints:
            raise UnknownKey(join(key, name), list(hints))
        if name in values:
            raise FieldError(join(key, name), f" appears twice, then as {shown(written)}")
        values[name] = convert(value, hints[name], join(key, name), parse)
    for item in fields(cls):  # type: ignore[arg-type]
        if default_of(item) is MISSING and item.name not in values:
            raise FieldError(join(key, item.name), " is missing")
    try:
        return cls(**values)
    except FieldError as error:
        raise error.under(key) from None
    except ValueError as error:
        raise ValueError(f"{key}: {error}" if key else str(error)) from error


def convert(value: Any, annotation: Any, key: str = "", parse: Parse | None = None) -> Any:
    """The value as its declared type has it; an int may stand for a float. Raises FieldError.

    `key` is the field's path, for the error. `parse` reads texts that stand for something else, as
    on the command line and in YAML; without it a text is a text, as in JSON.
    """
    kind = get_origin(annotation)
    if kind in (Union, UnionType):
        return _convert_union(value, annotation, key, parse)
    if is_dataclass(annotation):
        same = type(value) is annotation
        return value if same else build(annotation, _parsed(value, parse), key, parse)  # type: ignore
    if kind is Literal:
        return _convert_choice(value, annotation, key, parse)
    if kind in (list, tuple):
        return _convert_list(value, annotation, key, parse)
    if kind is dict:
        return _convert_dict(value, annotation, key, parse)
    found = value if annotation is str else _parsed(value, parse)
    if annotation in (int, float):
        whole = type(found) is int and abs(found) <= MAX_INT
        fits = whole or (annotation is float and type(found) is float)
    else:
        fits = annotation is Any or isinstance(found, annotation)
    if not fits:
        raise _misfit(key, value, annotation)
    return found


def join(path: str, name: str) -> str:
    """`name` as a part of `path`."""
    return f"{path}.{name}" if path and name else path or name


def _parsed(value: Any, parse: Parse | None) -> Any:
    """What a text stands for, or the text where it stands for nothing."""
    if parse is None or not isinstance(value, str):
        return value
    try:
        return parse(value)
    except ValueError:
        return value


def _misfit(key: str, value: Any, annotation: Any) -> FieldError:
    """That a value is not of a type, with the nearest of the words that it could be."""
    choices = [part for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal]
    words = [str(word) for part in choices for word in get_args(part)]
    close = closest(value, words) if isinstance(value, str) else None
    hint = f"; did you mean {close!r}?" if close else ""
    given = "null" if value is None else shown(value)
    return FieldError(key, f" is {given}, but must be {describe_type(annotation)}{hint}")


def _convert_union(value: Any, annotation: Any, key: str, parse: Parse | None) -> Any:
    parts = get_args(annotation)
    if value is None and NoneType in parts:
        return None
    failure = _misfit(key, value, annotation)
    if parse is not None and isinstance(value, str) and value.lstrip()[:1] == "[":
        parts = sorted(parts, key=lambda part: get_origin(part) is not list)  # before a string
    for part in parts:
        try:
            return convert(value, part, key, parse)
        except FieldError as error:
            if error.key != key and len(parts) == 2:  # of a part of the value, and null is no help
                failure = error
    raise failure


def _convert_choice(value: Any, annotation: Any, key: str, parse: Parse | None) -> Any:
    for candidate in (value, _parsed(value, parse)):
        for choice in get_args(annotation):
            if type(choice) is type(candidate) and choice == candidate:
                return choice
    raise _misfit(key, value, annotation)


def _convert_list(value: Any, annotation: Any, key: str, parse: Parse | None) -> Any:
    """A list or tuple; as a text `[a, b]` or `a, b`."""
    kind, parts = get_origin(annotation), get_args(annotation)
    items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
    if parse is not None and isinstance(value, str):
        split = [item.strip() for item in value.split(",") if item.strip()]
        items = _parsed(value, parse) if value.lstrip()[:1] == "[" else split
    open_ended = kind is list or parts[1:] == (Ellipsis,)
    if not (isinstance(items, list | kind) and (open_ended or len(items) == len(parts))):
        raise _misfit(key, value, annotation)
    types = [parts[0]] * len(items) if open_ended else parts
    pairs = enumerate(zip(items, types, strict=True))
    return kind(convert(item, part, f"{key}[{index}]", parse) for index, (item, part) in pairs)


def _convert_dict(value: Any, annotation: Any, key: str, parse: Parse | None) -> dict[str, Any]:
    """A mapping with texts as keys; as a text `{a: b}` or `a=b, c=d`."""
    items = value
    if parse is not None and isinstance(value, str):
        pairs = [item.partition("=") for item in value.split(",")]
        if all(equals for _, equals, _ in pairs):
            items = {name.strip(): text.strip() for name, _, text in pairs}
        else:
            items = _parsed(value, parse)
    if not (isinstance(items, dict) and all(isinstance(name, str) for name in items)):
        raise _misfit(key, value, annotation)
    part = get_args(annotation)[1]
    return {name: convert(item, part, join(key, name), parse) for name, item in items.items()}
