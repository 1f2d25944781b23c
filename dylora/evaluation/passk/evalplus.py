"""HumanEval+ and MBPP+ (EvalPlus, arXiv:2305.01210), in both forms in which they are published.

The JSONL of EvalPlus' releases holds the inputs as `base_input` and `plus_input`; the sets of the
hub hold them in a line of `test`, `inputs = […]`. The tests' process runs the reference on them.
"""

import re
from collections.abc import Callable
from typing import Any

from dylora.evaluation.passk.problem import PROMPTS, Checker, Problem, ProgramTests, unix

COMPARE = '''
import copy, math
from math import inf, nan

def _is_floats(value):
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)

def _near(given, expected, atol):
    """Numbers, or lists and tuples of numbers, as far apart as EvalPlus allows (numpy.allclose)."""
    if isinstance(expected, (list, tuple)):
        return (
            isinstance(given, (list, tuple))
            and len(given) == len(expected)
            and all(_near(one, other, atol) for one, other in zip(given, expected))
        )
    numbers = (int, float, complex)
    return isinstance(given, numbers) and isinstance(expected, numbers) and (
        given == expected or abs(given - expected) <= atol + 1e-7 * abs(expected)
    )

def _equal(given, expected, atol):
    if given == expected:
        return True
    atol = atol or (1e-6 if _is_floats(expected) else 0)
    return bool(atol) and type(given) is type(expected) and _near(given, expected, atol)

def _not_none(value):
    return value if isinstance(value, bool) else value is not None

def _upright_surface(base, height):  # Mbpp/581 does not say which height it means
    return round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))

def _padded_distance(one, other):  # Mbpp/558 does not say how numbers of two lengths are aligned
    width = max(len(str(one)), len(str(other)))
    pairs = zip(str(one).zfill(width), str(other).zfill(width))
    return sum(abs(int(a) - int(b)) for a, b in pairs)
'''
"""Functions of the tests' process that compare values."""


def humaneval_plus(task: dict[str, Any]) -> Problem:
    """A row of either form. Raises KeyError, TypeError or ValueError for any other row."""
    program, name = unix(task["prompt"] + task["canonical_solution"]), task["entry_point"]
    inputs, atol = _inputs(task, lambda rows: rows)
    # find_zero has many right answers: its own definition decides (HumanEval/32).
    verdict = f"_equal(given, expected, {atol!r})"
    if name == "find_zero":
        verdict = f"abs(_scope['poly'](*arguments, given)) <= {atol or 1e-4!r}"
    return continued_function(task, _checker(name, program, inputs, verdict))


def continued_function(task: dict[str, Any], checker: Checker) -> Problem:
    """A task of HumanEval, whose prompt is the beginning of a function."""
    prompt, answer = unix(task["prompt"]), unix(task["canonical_solution"])
    return Problem(
        task_id=task["task_id"],
        prompt=prompt,
        prefix=prompt,
        stops=tuple(PROMPTS["stops"]["continuation"]),
        reference=prompt + answer,
        texts=(prompt, prompt + answer),  # a body alone may occur in other programs
        checker=checker,
    )


def mbpp_plus(task: dict[str, Any]) -> Problem:
    """A row of either form. Raises KeyError, TypeError or ValueError for any other row."""
    number = int(str(task["task_id"]).rpartition("/")[2])
    reference = unix(task["canonical_solution"] if "canonical_solution" in task else task["code"])
    inputs, atol = _inputs(task, lambda rows: [typed_input(number, row) for row in rows])
    if "entry_point" in task:
        name, prompt = task["entry_point"], unix(task["prompt"])
        question = prompt.strip().strip("\"'")
    else:
        called = re.search(r"(\w+)\(\*inp\)", task["test"])
        if not called:
            raise ValueError("its test calls no function")
        name, question = called[1], unix(task["prompt"])
        prompt = f'"""\n{question}\n{unix(task["test_list"][0])}\n"""\n'
    verdict = (
        PROMPTS["verdicts"].get(name, "_equal(given, expected, {atol})").format(atol=repr(atol))
    )
    return Problem(
        task_id=f"Mbpp/{number}",
        prompt=prompt,
        prefix=prompt,
        stops=tuple(PROMPTS["stops"]["docstring"]),
        reference=prompt + reference,
        texts=(question, question.partition("\nassert ")[0], reference),
        checker=_checker(name, reference, inputs, verdict.format(atol=repr(atol))),
    )


def _checker(name: str, reference: str, inputs: str, verdict: str) -> ProgramTests:
    # The reference has a scope of its own, so that what it calls by name is not the program's.
    scope = f"_scope = {{'__name__': 'reference'}}\nexec({reference!r}, _scope)\n"
    tests = (
        f"for arguments in {inputs}:\n"
        f"    expected = _reference(*copy.deepcopy(arguments))\n"
        f"    given = {name}(*arguments)\n"
        f"    assert {verdict}\n"
    )
    return ProgramTests(tests, (name,), f"{COMPARE}\n{scope}_reference = _scope[{name!r}]\n")


def _inputs(task: dict[str, Any], typed: Callable[[list[Any]], list[Any]]) -> tuple[str, float]:
    """The arguments of every call as Python source, and the tolerance for floats."""
    if "plus_input" in task:
        return repr(typed([*task["base_input"], *task["plus_input"]])), float(task["atol"])
    found = re.search(r"^\s*inputs = (\[.*\])\s*$", task["test"], re.MULTILINE)
    tolerance = re.search(r"([\d.]+(?:e-?\d+)?)\)?\s*$", task["test"])
    if not found or not tolerance:
        raise ValueError("its test has no line of inputs")
    return found[1], float(tolerance[1])


# MBPP's functions take tuples, sets and complex numbers, for which JSON has lists and strings


def _tuples(rows: list[Any]) -> list[Any]:
    return [tuple(row) for row in rows]


def _deep(value: Any) -> Any:
    return tuple(map(_deep, value)) if isinstance(value, list) else value


_TYPES: dict[str, Callable[..., list[Any]]] = {
    "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809": (
        lambda *each: [tuple(one) for one in each]
    ),
    "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780": (
        lambda *each: [_tuples(one) for one in each]
    ),
    "75 413 444 753": lambda first, *rest: [_tuples(first), *rest],
    "106 750": lambda first, second: [first, tuple(second)],
    "250 307 405 446 617 720 763 808": lambda first, *rest: [tuple(first), *rest],
    "259 401 445": lambda *each: [tuple(_tuples(one)) for one in each],
    "580 615 791": lambda *each: [_deep(one) for one in each],
    "115": lambda rows: [[set(row) if isinstance(row, list) and row else {} for row in rows]],
    "124": lambda first, second: [float(first), complex(second)],
    "252": lambda number: [complex(number)],
    "278": lambda row: [tuple(tuple(item) if isinstance(item, list) else item for item in row)],
    "722": lambda first, *rest: [{key: tuple(item) for key, item in first.items()}, *rest],
}
"""MBPP's task ids, and what the JSON of their arguments stands for (EvalPlus' data/mbpp.py)."""
_CONVERSIONS = {int(number): convert for ids, convert in _TYPES.items() for number in ids.split()}


def typed_input(number: int, arguments: list[Any]) -> list[Any]:
    """The arguments of one call of MBPP's task `number`, of the types that its function takes."""
    return _CONVERSIONS[number](*arguments) if number in _CONVERSIONS else arguments
