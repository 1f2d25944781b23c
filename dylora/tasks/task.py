"""What a skill makes, and the literals it makes it from.

Every literal of an instruction or an answer (number, quoted string, name, item) is drawn from a
pool that is cut once into train, validation and test, so two splits never share one. Structural
constants (0 and 1, `[::-1]`), names of functions and variables and the SQL schema are shared.
"""

import bisect
import itertools
import json
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One example of a skill."""

    skill: str
    instruction: str
    answer: str
    """A reference that passes the check."""
    check: dict[str, Any]
    """How to run an answer (kind and inputs) and what must come out (expected); JSON-able."""


class Draft(NamedTuple):
    """A task in the making, with what decides whether a split may have it."""

    operations: tuple[str, ...]
    """The kinds of its parts, in order; see `is_held_out`."""
    program: str
    """The answer without the identifiers' names: two tasks with the same program are the same."""
    instruction: str
    answer: str
    simpler: list[str]
    """Answers with one part left out, which must fail: otherwise that part asks for nothing."""
    make_check: Callable[[], dict[str, Any]]
    """Makes the check but for what is expected; dear, so called only for a draft that is kept."""


def is_held_out(operations: Sequence[str]) -> bool:
    """Whether two of the operations form a pair that only the test split may combine.

    A fixed sixth of all ordered pairs is held out; each operation alone stays in every split.
    """
    pairs = itertools.combinations(operations, 2)
    return any(zlib.crc32(f"{first}>{second}".encode()) % 6 == 0 for first, second in pairs)


def _cut(values: Sequence[Any]) -> dict[str, list[Any]]:
    """Three of each five neighbours for train, one for validation, one for test."""
    rng = random.Random("dylora literals")
    pools: dict[str, list[Any]] = {"train": [], "validation": [], "test": []}
    for start in range(0, len(values), 5):
        block = list(values[start : start + 5])
        rng.shuffle(block)
        pools["validation"] += block[:1]
        pools["test"] += block[1:2]
        pools["train"] += block[2:]
    return {split: sorted(pool) for split, pool in pools.items()}


_ASSETS = Path(__file__).parents[1] / "assets" / "tasks"
_WORDS: dict[str, list[str]] = json.loads((_ASSETS / "words.json").read_text(encoding="utf-8"))
FORMS: dict[str, dict[str, Any]] = json.loads((_ASSETS / "forms.json").read_text(encoding="utf-8"))
"""The vocabulary of each skill. An operation is, by its kind, its code, the phrases that ask for it
and, if not 99, the largest number in it."""

_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwxz"
_CHUNKS = [v + c for v in _VOWELS for c in _CONSONANTS]
_CHUNKS += [c + v for c in _CONSONANTS for v in _VOWELS]

POOLS: dict[str, dict[str, list[Any]]] = {
    "integer": _cut(range(2, 1000)),
    **{use: _cut(words) for use, words in _WORDS.items()},
    "chunk": _cut(_CHUNKS),
    "letter": _cut("eaiourstlnmdpbgkcfhvwjxyzq"),
    "separator": _cut(list("-_/:;=&~#@!%,<>")),
}
"""The literals of each split, by what they are used for."""

_FIELDS = {"s": "chunk", "c": "letter", "word": "word", "p": "separator"}


class Literals:
    """Draws the literals of one task from its split, and keeps them for the edge cases."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng = rng
        self.split: Split = split
        self.numbers: list[int] = []
        self.strings: list[str] = []

    def draw_numbers(self, count: int, high: int = 99) -> list[int]:
        """Different integers from 2 to high, ascending; new ones while there are enough."""
        pool = POOLS["integer"][self.split]
        pool = pool[: bisect.bisect_right(pool, high)]
        fresh = [n for n in pool if n not in self.numbers]
        drawn = sorted(self.rng.sample(fresh if len(fresh) >= count else pool, count))
        self.numbers += drawn
        return drawn

    def draw_string(self, pool: str) -> str:
        """A new string of a pool."""
        fresh = [text for text in POOLS[pool][self.split] if text not in self.strings]
        self.strings.append(self.rng.choice(fresh))
        return self.strings[-1]

    def draw(self, operations: dict[str, list[Any]]) -> tuple[str, str, str]:
        """One of the operations (see `FORMS`): its kind, its code and a phrase that asks for it."""
        kind = self.rng.choice(list(operations))
        return kind, *self.fill(*operations[kind])

    def fill(self, code: str, phrases: Sequence[str], high: int = 99) -> tuple[str, str]:
        """Code and one of its phrases with the same literals in both.

        Fields: {n} and {m} are numbers up to high (n < m), the others strings of `_FIELDS`.
        Fields in double braces are left for later.
        """
        fields = [field for field in ("n", "m") if f"{{{field}}}" in code]
        numbers = self.draw_numbers(len(fields), high)
        values: dict[str, Any] = dict(zip(fields, numbers, strict=True))
        for field, pool in _FIELDS.items():
            if f"{{{field}}}" in code:
                values[field] = self.draw_string(pool)
        return code.format(**values), self.rng.choice(phrases).format(**values)

    def edges(self) -> list[int]:
        """The numbers drawn with their neighbours: where > and >= part."""
        return [n + step for n in self.numbers for step in (-1, 0, 1)]
