"""The test runner's process: runs the tests, which call the program through a channel."""

import builtins
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

from . import wire

ENDED_EARLY = "the program ended early"
PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, set, frozenset),
    *(dict, type, Decimal, Fraction),
)
"""Types whose values are copied from the program: no object that stays there equals one."""


class ProgramFault(Exception):
    """Why the program cannot answer: an outcome and a detail."""


class Remote:
    """An object in the program's process: a function by name, or a value that is not copied.

    Calls, attributes, items, length, iteration and `str` are asked for there. It equals itself
    only: what its own class says of truth, equality and order is not trusted.
    """

    __slots__ = ("_channel", "_of", "_tag")

    def __init__(self, channel: "Channel", of: str | int, tag: str = "h") -> None:
        for name, value in zip(self.__slots__, (channel, of, tag), strict=True):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._channel.ask("call", self._of, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the program must not decide what copy and isinstance find
            raise AttributeError(name)
        return self._channel.ask("get", self._of, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.ask("set", self._of, (name, value))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._channel.ask("iter", self._of)
        while item := self._channel.ask("next", self._channel.number(iterator)[1]):
            yield item[0]

    def __len__(self) -> int:
        return self._channel.ask("len", self._of)

    def __getitem__(self, key: Any) -> Any:
        return self._channel.ask("item", self._of, (key,))

    def __str__(self) -> str:
        return self._channel.ask("str", self._of)

    def __eq__(self, other: object) -> bool:
        if self is other or isinstance(other, PLAIN):
            return self is other
        raise self._channel.failure("not supported", "objects compared by their classes")

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self._tag == "m" or self._unsupported()

    def _unsupported(self, *_: object) -> NoReturn:
        raise self._channel.failure(
            "not supported", "the truth, order or next() of a program's object"
        )

    # Not next(): at its end a program could stop the tests' own map or zip.
    __next__ = __lt__ = __le__ = __gt__ = __ge__ = _unsupported


class LargeValue:
    """A list or tuple of the program's that is too large to be copied: only its digest is here."""

    def __init__(self, channel: "Channel", digest: str) -> None:
        self.channel, self.digest = channel, digest

    def __eq__(self, other: object) -> bool:
        """True, or the run ends: values of other types may be equal and have another digest."""
        if isinstance(other, (list, tuple)) and wire.digest(other) == self.digest:
            return True
        raise self.failure()

    def failure(self) -> ProgramFault:
        return self.channel.failure("output limit", "it returned too much, and nothing expected")

    def _fail(self, *_: object) -> NoReturn:
        raise self.failure()

    __hash__ = None  # type: ignore[assignment]
    __bool__ = __iter__ = __len__ = __getitem__ = __contains__ = _fail


class Channel:
    """Sends requests to the program, and trusts nothing of its replies but their checked form."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.fault: ProgramFault | None = None
        """Why the run has failed, whatever the tests make of it."""
        self.functions: dict[int, Callable[..., Any]] = {}
        """Those of the tests' that the program was given, by number."""

    def ask(
        self, do: str, of: str | int, args: Sequence[Any] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """The program's value; raises its exceptions of built-in types here as well."""
        sent = [wire.encode(item, self.number) for item in args]
        also = {name: wire.encode(item, self.number) for name, item in (named or {}).items()}
        return self.request(do, of, sent, also)

    def request(self, do: str, of: str | int, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """`ask` for arguments that are encoded already."""
        self._send({"do": do, "of": of, "args": args, "named": named})
        return self.receive()

    def receive(self) -> Any:
        """The next reply's value, once the program has called the functions that it wants to."""
        refused = False
        try:
            while "call" in (reply := self._read()):
                self._call_back(reply)
            if "digest" in reply:
                return LargeValue(self, str(reply["digest"]))
            if "value" in reply:
                return wire.decode(reply["value"], self.find)
            name, message = (str(part)[: wire.DETAIL_LENGTH] for part in reply["error"])
            refused = reply["refused"] is True
        except wire.Closed:
            raise self.failure("error", ENDED_EARLY) from None
        except wire.TooLong:
            raise self.failure("output limit", "it returned too much") from None
        except MemoryError:
            raise self.failure("memory", "in what it returned") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise self.failure("error", "its reply is no value") from None
        if name == "MemoryError":
            raise self.failure("memory", "MemoryError")
        kind = getattr(builtins, name, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            raise self.failure("error", f"{name}: {message}")  # SystemExit and the like
        # An AssertionError of the program is no failed test, and its StopIteration would end the
        # tests' map or zip before everything was compared: both end the run as an error.
        if kind not in (AssertionError, StopIteration, StopAsyncIteration):
            error = ProgramFault("error", f"{name}: {message}")
            with contextlib.suppress(TypeError):  # UnicodeError's children want five arguments
                error = kind(message)
                error.__dict__["refused"] = refused
            raise error
        raise ProgramFault("error", f"{name}: {message}")

    def number(self, value: Any) -> list[Any]:
        """What stands for an object of the program's or a function; others end the run."""
        if isinstance(value, Remote):
            return ["h", object.__getattribute__(value, "_of")]
        if isinstance(value, LargeValue):
            raise value.failure()
        if not callable(value) or isinstance(value, type):
            raise self.failure(
                "not supported", f"a {type(value).__name__} cannot be sent to the program"
            )
        number = len(self.functions)
        self.functions[number] = value
        return ["f", number]

    def find(self, tag: str, number: int) -> Any:
        return self.functions[number] if tag == "f" else Remote(self, number, tag)

    def failure(self, outcome: str, detail: str) -> ProgramFault:
        """What ends the run, to be raised; noted first, for tests may catch every exception."""
        self.fault = ProgramFault(outcome, detail)
        return self.fault

    def _read(self) -> Any:
        return json.loads(wire.read_frame(self.descriptor, wire.VALUE_BYTES))

    def _send(self, content: dict[str, Any]) -> None:
        with contextlib.suppress(wire.Closed):  # receive reports it
            wire.write_frame(self.descriptor, json.dumps(content).encode())

    def _call_back(self, asked: dict[str, Any]) -> None:
        """Calls a function of the tests' for the program."""
        function = self.functions[asked["call"]]
        args = [wire.decode(item, self.find) for item in asked["args"]]
        named = {str(name): wire.decode(item, self.find) for name, item in asked["named"].items()}
        try:
            reply = {"value": wire.encode(function(*args, **named), self.number)}
        except ProgramFault:
            raise
        except BaseException as error:
            reply = {"error": wire.describe_exception(error)}
        self._send(reply)


def run_tests(job: dict[str, Any], channel: int) -> dict[str, Any]:
    """Runs the tests or the calls of a job on the program: outcome, detail, values of the calls."""
    asked = Channel(channel)
    outcome, detail, values = "passed", "", []
    try:
        asked.receive()  # the program has run to its end
        if job["tests"] is not None:
            _run_tests(job, asked)
        for name, args in job["calls"]:
            values.append(wire.encode(asked.request("call", name, args, {}), asked.number))
    except ProgramFault as fault:
        outcome, detail = fault.args
    except AssertionError as error:
        outcome, detail = "failed", ": ".join(wire.describe_exception(error))
    except MemoryError:
        outcome, detail = "memory", "in the tests"
    except BaseException as error:
        missing = getattr(error, "refused", isinstance(error, ModuleNotFoundError))
        outcome = "not supported" if missing else "error"
        detail = ": ".join(wire.describe_exception(error))
    if asked.fault is not None:
        outcome, detail = asked.fault.args
    return {"outcome": outcome, "detail": detail, "values": values}


def _run_tests(job: dict[str, Any], asked: Channel) -> None:
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(job["setup"], "setup", "exec"), names)
    code = compile(job["tests"], "tests", "exec")
    # MBPP's tests use modules that the reference imports; those of the program are not trusted.
    for name in set(code.co_names) & sys.stdlib_module_names - set(names):
        names[name] = importlib.import_module(name)
    names |= {name: Remote(asked, name) for name in job["entry_points"]}
    exec(code, names)
