"""The process that runs answers: `python -I -S worker.py`, jobs in, values out, a line each.

It stands alone (standard library only) and never sees an expected value. Each job runs in a
forked child with limits and an empty folder of its own, so that an answer that hangs, exits or
eats memory fails alone. The child reports over a pipe what its answer *returned*; exit codes and
prints count for nothing. These are limits against accidents, not a sandbox against malice.

The jobs' `kind`: function (source defines job["function"], called on each input), expression
(evaluated with job["variable"] bound to each input), sql (run on each input, a table), regex
(full match on each input, a string), arithmetic (numbers and operators only).
"""

import ast
import contextlib
import json
import math
import operator
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 512 * 2**20
REPLY_BYTES = 2**20
LARGEST_EXPONENT = 64

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def calculate(source: str) -> int | float:
    """The value of an expression of numbers, + - * / // % ** and parentheses.

    Raises ValueError on anything else, SyntaxError on what is no expression.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = value(node.left), value(node.right)
            if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
                raise ValueError(f"exponent {right} is beyond {LARGEST_EXPONENT}")
            return _OPERATORS[type(node.op)](left, right)
        raise ValueError(f"{ast.unparse(node)} is not arithmetic")

    return value(ast.parse(source, mode="eval").body)


def run_query(source: str, databases: list[dict[str, Any]]) -> list[list[list[Any]]]:
    """The rows of one reading statement on each of several contents of a single table.

    Raises a sqlite3 error when the source is no query, several statements, or writes.
    """
    import sqlite3  # here: each answer has a process of its own, and few are queries

    table, columns = databases[0]["table"], databases[0]["columns"]
    results = []

    def allow_reading(action: int, *_: str | None) -> int:
        allowed = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
        return sqlite3.SQLITE_OK if action in allowed else sqlite3.SQLITE_DENY

    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute(f"create table {table} ({', '.join(columns)})")
        connection.execute("begin")
        for database in databases:
            connection.set_authorizer(None)
            connection.execute(f"delete from {table}")
            marks = ", ".join("?" * len(columns))
            connection.executemany(f"insert into {table} values ({marks})", database["rows"])
            connection.set_authorizer(allow_reading)
            results.append([list(row) for row in connection.execute(source).fetchall()])
    return results


def run_answer(job: dict[str, Any]) -> list[Any]:
    """What the answer gives for each input of its job; any exception of the answer passes on."""
    source, inputs = job["source"], job["inputs"]
    match job["kind"]:
        case "function":
            namespace: dict[str, Any] = {"__name__": "answer"}
            exec(compile(source, "answer", "exec"), namespace)
            return [namespace[job["function"]](value) for value in inputs]
        case "expression":
            code = compile(source, "answer", "eval")
            return [eval(code, {job["variable"]: value}) for value in inputs]
        case "sql":
            return run_query(source, inputs)
        case "regex":
            pattern = re.compile(source)
            return [pattern.fullmatch(text) is not None for text in inputs]
        case "arithmetic":
            return [calculate(source) for _ in inputs]
    raise ValueError(f"unknown kind of answer {job['kind']!r}")


def answer_values(job: dict[str, Any]) -> list[Any]:
    """`run_answer`, and TypeError where it gives what JSON has no type for."""
    return [_plain(value) for value in run_answer(job)]


def _plain(value: Any) -> Any:
    """The value, if it is made of JSON's own types and no look-alikes; TypeError otherwise."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} is no plain value")


def _child(job: dict[str, Any], folder: str, write: int) -> None:
    """Runs the job with limits and writes its values, or nothing when it fails."""
    os.setpgid(0, 0)
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.closerange(3, write)
    os.closerange(write + 1, 256)
    seconds = math.ceil(job["timeout_s"]) + 1
    for limit, bound in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),  # no effect for root
    ):
        resource.setrlimit(limit, (bound, bound))
    values = json.dumps(answer_values(job)).encode()
    while values:
        values = values[os.write(write, values) :]


def _run(job: dict[str, Any]) -> bytes:
    """The child's reply, or nothing when it fails, is late or says too much."""
    deadline = time.monotonic() + job["timeout_s"]
    folder = tempfile.mkdtemp(dir=".")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever the answer raises, SystemExit too, ends in an empty reply.
        with contextlib.suppress(BaseException):
            _child(job, folder, write)
        os._exit(0)
    os.close(write)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # here too: the group must exist before it is killed
    reply = b""
    while len(reply) <= REPLY_BYTES:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(read, 2**16) if ready else None
        if not piece:
            reply = reply if piece == b"" else b""
            break
        reply += piece
    os.close(read)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return b"" if b"\n" in reply or len(reply) > REPLY_BYTES else reply


def main() -> None:
    """Answers a job a line until the jobs end."""
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_run(json.loads(line)) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
