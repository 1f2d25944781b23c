"""The program's process: runs the program and answers calls to its functions."""

import builtins
import contextlib
import errno
import itertools
import json
import operator
import re
import sys
import types
from collections.abc import Callable
from typing import Any

from . import wire

_DO: dict[str, Callable[..., Any]] = {
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "len": len,
    "iter": iter,
    "next": lambda iterator: list(itertools.islice(iterator, 1)),  # empty at its end
    "str": str,
    "call": lambda target, *args, **named: target(*args, **named),
}


def serve_program(source: str, channel: int) -> None:
    """Runs the program, reports that it ran, then answers requests until the channel is closed.

    A request is {"do", "of", "args", "named"}: `do` is one of `_DO`, `of` a name that the program
    defines or the number of a handle. A reply is {"value"}, {"digest"} of a large value, or
    {"error": [type, message], "refused"}. While it works on a request the program may call a
    function of the tests', {"call", "args", "named"}, whose {"value"} or {"error"} it is sent.
    """
    program = _Program(channel)
    with contextlib.suppress(wire.Closed):
        program.reply(lambda: exec(compile(source, "program", "exec"), program.module.__dict__))
        program.receive()


class _Program:
    """The program's objects, and its end of the channel."""

    def __init__(self, channel: int) -> None:
        self.channel = channel
        self.module = types.ModuleType("program")
        sys.modules["program"] = self.module
        self.objects: list[Any] = []

    def receive(self) -> Any:
        """Answers requests until a function of the tests' has returned; its value."""
        while True:
            message = json.loads(wire.read_frame(self.channel, wire.VALUE_BYTES))
            if "do" in message:
                self.reply(lambda message=message: self.answer(**message))
            elif "value" in message:
                return wire.decode(message["value"], self.find)
            else:
                name, text = message["error"]
                raise getattr(builtins, name)(text)

    def reply(self, work: Callable[[], Any]) -> None:
        """Writes what the work returns or raises."""
        try:
            value = work()
            content = b""
            if not wire.is_large(value):
                content = json.dumps({"value": wire.encode(value, self.number)}).encode()
            if not content or (len(content) > wire.VALUE_BYTES and type(value) in (list, tuple)):
                content = json.dumps({"digest": wire.digest(value)}).encode()
        except BaseException as error:  # SystemExit too: leaving early must not pass
            described = {"error": wire.describe_exception(error), "refused": _is_refusal(error)}
            content = json.dumps(described).encode()
        wire.write_frame(self.channel, content)

    def answer(self, do: str, of: Any, args: list[Any], named: dict[str, Any]) -> Any:
        if not isinstance(of, int) and of not in self.module.__dict__:
            raise NameError(f"the program defines no {of}")
        target = self.objects[of] if isinstance(of, int) else self.module.__dict__[of]
        given = [wire.decode(item, self.find) for item in args]
        return _DO[do](
            target, *given, **{name: wire.decode(item, self.find) for name, item in named.items()}
        )

    def number(self, value: Any) -> list[Any]:
        if isinstance(value, _TestsFunction):
            return ["f", value.number]
        self.objects.append(value)
        return ["m" if type(value) is re.Match else "h", len(self.objects) - 1]

    def find(self, tag: str, number: int) -> Any:
        return _TestsFunction(self, number) if tag == "f" else self.objects[number]


class _TestsFunction:
    """A function that the tests have passed to the program; it runs where they do."""

    def __init__(self, program: _Program, number: int) -> None:
        self.program, self.number = program, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        program = self.program
        sent = [wire.encode(item, program.number) for item in args]
        also = {name: wire.encode(item, program.number) for name, item in named.items()}
        message = {"call": self.number, "args": sent, "named": also}
        wire.write_frame(program.channel, json.dumps(message).encode())
        return program.receive()


def _is_refusal(error: BaseException) -> bool:
    """Whether an exception comes of what the sandbox does not have, as far as can be told."""
    seen: BaseException | None = error
    for _ in range(10):  # of a chain that may have no end
        if seen is None:
            break
        if isinstance(seen, PermissionError) and seen.errno in (errno.EPERM, errno.EACCES):
            return True
        if isinstance(seen, ModuleNotFoundError) or seen.args == ("can't start new thread",):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
