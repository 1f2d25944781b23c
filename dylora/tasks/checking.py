"""Whether answers are right: the sandbox runs them, and this process compares the values."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dylora.sandbox.host import Limits, Result, Sandbox, run_all
from dylora.tasks.task import Task

ANSWER_LIMITS = Limits(seconds=2, wall_seconds=10)
_ANSWERS_SOURCE = Path(__file__).with_name("answers.py").read_text(encoding="utf-8")


def check_answers(
    tasks: Sequence[Task],
    answers: Sequence[str],
    *,
    workers: int = 2,
    limits: Limits = ANSWER_LIMITS,
) -> tuple[list[bool], str]:
    """Runs each answer, stripped of surrounding white space, and compares what it gives.

    A machine on which no sandbox works runs them in separate processes with resource limits.
    Returns whether each answer is right, and what protected the machine. Raises ValueError where
    the numbers of tasks and answers differ, or workers is below 1.
    """
    if len(tasks) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(tasks)} tasks")
    unsafe = False
    try:
        with Sandbox(limits) as sandbox:
            backend = sandbox.backend
    except ValueError as refusal:
        unsafe, backend = True, f"resource limits only ({refusal})"
    results = run_all(
        list(zip(tasks, answers, strict=True)),
        lambda sandbox, job: check_answer(sandbox, job[0].check, job[1]),
        workers=workers,
        limits=limits,
        unsafe=unsafe,
    )
    return [result.outcome == "passed" for result in results], backend


def check_answer(sandbox: Sandbox, check: dict[str, Any], answer: str) -> Result:
    """Runs one answer to a task with this check; "failed" means that it gave other values.

    The process that runs the answer is not told what is expected.
    """
    job = {key: item for key, item in check.items() if key != "expected"}
    call = ("answer_values", [job | {"source": answer.strip()}])
    result, values = sandbox.call(_ANSWERS_SOURCE, [call])
    if result.outcome == "passed" and not is_right(check, values[0]):
        return result._replace(outcome="failed", detail="not what was expected")
    return result


def is_right(check: dict[str, Any], values: Any) -> bool:
    """Whether an answer's values, one for each input of its check, are those expected.

    Types count (True is not 1, a tuple is no list), but for arithmetic; floats may differ by
    rounding; the rows of a query without an order may come in any.
    """
    expected = check["expected"]
    if not isinstance(values, list) or len(values) != len(expected):
        return False
    try:
        if check.get("compare") == "unordered":
            values = [_sorted(rows) for rows in values]
            expected = [_sorted(rows) for rows in expected]
        if check["kind"] == "arithmetic":
            values = [float(value) for value in values if type(value) in (int, float)]
            expected = [float(value) for value in expected]
        return _is_same(values, expected)
    except (TypeError, OverflowError):  # a set among rows, an integer beyond all floats
        return False


def _sorted(rows: Any) -> Any:
    return sorted(rows, key=json.dumps) if isinstance(rows, list) else rows


def _is_same(value: Any, expected: Any) -> bool:
    if type(value) is not type(expected):
        return False
    if isinstance(value, list):
        return len(value) == len(expected) and all(map(_is_same, value, expected))
    if isinstance(value, dict):
        return value.keys() == expected.keys() and all(
            _is_same(value[key], expected[key]) for key in value
        )
    if isinstance(value, float):
        return math.isclose(value, expected, rel_tol=1e-9)
    return value == expected
