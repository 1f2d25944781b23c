"""Computes what an answer gives for each input of its task.

The standard library alone: checking.py sends this text to the sandbox, for model-written answers.

The `kind` of a job: function (source defines job["function"], called on each input), expression
(evaluated with job["variable"] bound to each input), sql (run on each input, a table), regex
(full match on each input, a string), arithmetic (numbers and operators only).
"""

import ast
import contextlib
import operator
import re
from collections.abc import Callable
from typing import Any

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
    """The value of numbers with + - * / // % ** and (); raises ValueError or SyntaxError."""

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

    Raises sqlite3.Error when the source is no query, several statements, or writes.
    """
    import sqlite3  # here: every answer is run in a new process, and few are queries

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
    """What the answer gives for each input of its job; raises whatever the answer raises."""
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
    """`run_answer`; raises TypeError for values that are not exactly of JSON's types."""
    return [_plain(value) for value in run_answer(job)]


def _plain(value: Any) -> Any:
    """The value; raises TypeError unless it consists of JSON's types and not of subclasses."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} is not a value of JSON")
