"""Rows of a source: what a record becomes, by the form in which its set is written.

Raises BadRecord, with the reason, for a record that is no row.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from dylora.data.prompts import mbpp_instruction
from dylora.data.record import BadRecord, Columns
from dylora.data.splits import MBPP_TASKS
from dylora.data_config import RowFormat, SourceConfig
from dylora.fields import nearest, shown


class Row(NamedTuple):
    """One question and its answer, or a text."""

    instruction: str  # stripped; of a conversation what comes before its first answer; "" of a text
    input: str  # stripped; "" when there is none
    output: str  # without trailing white space; of a conversation all answers
    id: str  # MBPP's task id, <split>/<n> of a skill, else the content's hash
    location: str = ""  # file:line
    chat: str = ""  # of a conversation: its messages and tools, in JSON


def row_content(row: Row) -> tuple[str, ...]:
    """What two rows have in common when they are duplicates."""
    return (row.chat,) if row.chat else (row.instruction, row.input, row.output)


class RowReader(NamedTuple):
    """How the records of one source become rows."""

    format: RowFormat
    columns: Columns
    to_row: Callable[[dict[str, Any]], Row]


# How sets are written elsewhere: the columns that tell a format, and a further one that may be.
_LAYOUTS: tuple[tuple[RowFormat, tuple[str, ...], str | None], ...] = (
    ("instruction", ("instruction", "output"), "input"),  # Alpaca
    ("instruction", ("instruction", "response"), "context"),  # Dolly
    ("chat", ("messages",), "tools"),
    ("chat", ("conversations",), "tools"),  # ShareGPT
    ("completion", ("prompt", "completion"), None),
    ("instruction", ("question", "answer"), None),
    ("text", ("text",), None),
)
_COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "instruction": ("instruction_column", "output_column"),
    "completion": ("instruction_column", "output_column"),
    "chat": ("messages_column",),
    "text": ("text_column",),
}


def choose_reader(source: SourceConfig, found: set[str]) -> RowReader:
    """How to read a source, by its settings and the columns that were found in it.

    Raises ValueError where the columns tell nothing, or settings do not go together.
    """
    format_, columns, further = _layout(source, found)
    further = source.input_column or further
    named = [name for names in _COLUMNS.values() for name in names]
    for name in {*named, "input_column"} - {*_COLUMNS[format_]}:
        if getattr(source, name) is not None and not (
            name == "input_column" and format_ == "instruction"
        ):
            raise ValueError(
                f"source {source.name!r}: {name} does not apply to rows of {format_}; leave it out"
            )
    required = [*columns, *([source.input_column] if source.input_column else [])]
    optional = {"instruction": [further], "chat": ["tools", "system"]}.get(format_, [])
    optional = [name for name in optional if name is not None and name not in required]
    to_row: dict[RowFormat, Callable[[dict[str, Any]], Row]] = {
        "instruction": partial(
            columns_to_row, instruction=columns[0], input_=further, output=columns[-1]
        ),
        "completion": lambda row: Row(_text(row, columns[0]), "", _answer(row, columns[-1]), ""),
        "chat": partial(_chat_to_row, column=columns[0]),
        "text": lambda row: Row("", "", _text(row, columns[0]), ""),
    }
    return RowReader(format_, Columns(required, optional), to_row[format_])


def _layout(source: SourceConfig, found: set[str]) -> tuple[RowFormat, tuple[str, ...], str | None]:
    """The format, the columns that it needs, and the further one that it may have."""
    for format_ in ("chat", "text", "instruction", "completion"):
        if source.format not in (None, format_):
            continue
        given = [getattr(source, name) for name in _COLUMNS[format_]]
        if not any(given):
            continue
        for place, name in enumerate(_COLUMNS[format_]):
            usual = [columns[place] for kind, columns, _ in _LAYOUTS if kind == format_]
            given[place] = given[place] or next((one for one in usual if one in found), None)
            if given[place] is None:
                raise ValueError(f"source {source.name!r}: {name} is missing")
        return format_, tuple(given), "input" if format_ == "instruction" else None
    for format_, columns, further in _LAYOUTS:
        if source.format in (None, format_) and set(columns) <= found:
            return format_, columns, further
    known = ", ".join(" + ".join(columns) for _, columns, _ in _LAYOUTS)
    what = "rows of a known format" if source.format is None else f"rows of {source.format}"
    raise ValueError(
        f"source {source.name!r} has the columns {', '.join(sorted(found)) or '(none)'}, which are "
        f"not those of {what} ({known}): name its columns with instruction_column and "
        "output_column, messages_column, or text_column"
    )


# Records to rows


def columns_to_row(
    fields: dict[str, Any],
    *,
    instruction: str,
    input_: str | None,
    output: str,
    id_: str | None = None,
) -> Row:
    """A question and its answer in columns of their own."""
    return Row(
        _text(fields, instruction).strip(),
        # A row without further input leaves the field out or has null there.
        "" if input_ is None or fields.get(input_) is None else _text(fields, input_).strip(),
        _answer(fields, output).rstrip(),
        "" if id_ is None else _text(fields, id_),
    )


def mbpp_to_row(fields: dict[str, Any]) -> Row:
    """A task of MBPP as it is published."""
    task_id, tests = fields.get("task_id"), fields.get("test_list")
    if type(task_id) is not int or not 1 <= task_id <= MBPP_TASKS:
        raise BadRecord(f"task_id is {task_id!r}, but must be from 1 to {MBPP_TASKS}")
    if not isinstance(tests, list) or not tests or not isinstance(tests[0], str):
        raise BadRecord("test_list has no test")
    text, code = _text(fields, "text"), _text(fields, "code").rstrip()
    return Row(mbpp_instruction(text, tests[0]) if text.strip() else "", "", code, str(task_id))


_ROLES = {"human": "user", "gpt": "assistant", "function": "tool", "observation": "tool"}
"""ShareGPT's names of roles."""
_ROLE_NAMES = ("system", "developer", "user", "assistant", "tool")


def _chat_to_row(fields: dict[str, Any], *, column: str) -> Row:
    messages = fields.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRecord(f"{column!r} is {shown(messages)}, not a list of messages")
    turns = [_message(message, index) for index, message in enumerate(messages)]
    if fields.get("system"):
        turns.insert(0, {"role": "system", "content": _text(fields, "system")})
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise BadRecord("no message is the assistant's")
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise BadRecord("'tools' is no JSON") from None
    if not (tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools))):
        raise BadRecord(f"'tools' is {shown(tools)}, not a list of descriptions")
    try:
        chat = json.dumps({"messages": turns, "tools": tools or None}, ensure_ascii=False)
        chat.encode()
    except (UnicodeEncodeError, TypeError, ValueError, RecursionError):
        raise BadRecord("its messages hold what is no text and no JSON") from None
    before = "\n".join(turn["content"] for turn in turns[: answers[0]])
    after = [turn["content"] or shown(turn.get("tool_calls", "")) for turn in turns]
    return Row(before, "", "\n".join(after[index] for index in answers), "", chat=chat)


def _message(message: Any, index: int) -> dict[str, Any]:
    """A message with role and content; ShareGPT's `from` and `value` are these."""
    if not isinstance(message, dict):
        raise BadRecord(f"message {index + 1} is of type {type(message).__name__}, not an object")
    turn = {key: value for key, value in message.items() if value is not None}
    sender, role = turn.pop("from", None), turn.pop("role", None)
    role = sender or role
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _ROLE_NAMES:
        known = nearest(str(role), [*_ROLES, *_ROLE_NAMES])
        raise BadRecord(f"message {index + 1} has the role {shown(role)}{known}")
    value, content = turn.pop("value", None), turn.pop("content", "")
    content = content if value is None else value
    if isinstance(content, list):  # parts, as of messages with images
        texts = [_text_part(part) for part in content]
        if None in texts:
            raise BadRecord(f"message {index + 1} has parts that are no text")
        content = "".join(filter(None, texts))
    if not isinstance(content, str):
        raise BadRecord(f"message {index + 1} is of type {type(content).__name__}, not text")
    if not content.strip() and not turn.get("tool_calls"):
        raise BadRecord(f"message {index + 1} is empty")
    return {"role": role, "content": content.replace("\r\n", "\n"), **turn}


def _text_part(part: Any) -> str | None:
    if not isinstance(part, dict) or part.get("type") != "text":
        return None
    text = part.get("text", "")
    return text if isinstance(text, str) else None


def _answer(fields: dict[str, Any], column: str) -> str:
    """Text, or a number as it is written (`json_file.Number`)."""
    value = fields.get(column)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRecord(f"{column!r} is {value}, which is no number")
    if type(value) is int or isinstance(value, float):
        return str(value)
    return _text(fields, column)


def _text(fields: dict[str, Any], column: str) -> str:
    if column not in fields:
        raise BadRecord(f"no {column!r}")
    value = fields[column]
    if not isinstance(value, str):
        raise BadRecord(f"{column!r} is of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{column!r} holds half a surrogate pair, which is no text") from None
    return value
