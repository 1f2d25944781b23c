"""Decides whether answers are right by running them in worker processes (see worker.py)."""

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

from dylora.tasks.task import Task

_WORKER = Path(__file__).with_name("worker.py")
_GRACE_S = 5.0
"""A worker silent for this much longer than the time limit is dead."""


def check_answers(
    tasks: Sequence[Task],
    answers: Sequence[str],
    *,
    workers: int = 2,
    timeout_s: float = 2.0,
) -> list[bool]:
    """Runs each answer, stripped of surrounding white space, and compares what it gives.

    Values are compared in this process; the one that runs the answers is not told what is
    expected. Types count: True is not 1, 1.0 is not 1, a tuple is no list; floats may differ by
    rounding. Only the values of arithmetic may be int or float alike, and the rows of a query
    without an order may come in any.

    Args:
        workers: Processes side by side.
        timeout_s: Wall-clock limit of one answer over all its inputs.

    Raises:
        ValueError: As many answers as tasks are needed, a worker, and a positive limit.
    """
    if len(tasks) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(tasks)} tasks")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if timeout_s <= 0:
        raise ValueError(f"timeout_s must be above 0, got {timeout_s}")
    verdicts = [False] * len(tasks)

    def work(first: int) -> None:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            process = None
            for index in range(first, len(tasks), workers):
                if process is None:
                    process = stack.enter_context(_worker(folder))
                job = {key: item for key, item in tasks[index].check.items() if key != "expected"}
                job |= {"source": answers[index].strip(), "timeout_s": timeout_s}
                reply = _ask(process, json.dumps(job).encode() + b"\n", timeout_s + _GRACE_S)
                verdicts[index] = _is_right_reply(tasks[index].check, reply)
                if not reply.endswith(b"\n"):  # the worker died, and only this answer with it
                    process = None

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(work, first) for first in range(workers)]:
            future.result()
    return verdicts


@contextlib.contextmanager
def _worker(folder: str):
    command = [sys.executable, "-I", "-S", "-X", "utf8", str(_WORKER)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[bytes], job: bytes, limit_s: float) -> bytes:
    """The worker's line, or less than a line when it died or had to be killed."""
    watch = threading.Timer(limit_s, process.kill)
    watch.start()
    try:
        stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        stdin.write(job)
        stdin.flush()
        return stdout.readline()
    except BrokenPipeError:
        return b""
    finally:
        watch.cancel()


def _is_right_reply(check: dict[str, Any], reply: bytes) -> bool:
    try:
        values = json.loads(reply)
    except (ValueError, RecursionError):  # empty, cut off, or an integer beyond Python's limit
        return False
    return is_right(check, values)


def is_right(check: dict[str, Any], values: Any) -> bool:
    """Whether an answer's values, one for each input of its check, are those expected."""
    expected = check["expected"]
    if not isinstance(values, list) or len(values) != len(expected):
        return False
    try:
        if check.get("compare") == "unordered":
            values = [_sorted(rows) for rows in values]
            expected = [_sorted(rows) for rows in expected]
        same = _is_same_number if check["kind"] == "arithmetic" else _is_same
        return all(map(same, values, expected))
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


def _is_same_number(value: Any, expected: Any) -> bool:
    if type(value) not in (int, float) or not math.isfinite(value):
        return False
    return math.isclose(value, expected, rel_tol=1e-9)
