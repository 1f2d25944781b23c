"""The test runner's process: runs the tests, which call the program through a channel."""

import builtins
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .wire import (
    DETAIL_LENGTH,
    VALUE_BYTES,
    Closed,
    TooLong,
    decode,
    describe_exception,
    encode,
    read_frame,
    write_frame,
)

ENDED_EARLY = "the program ended early"


class ProgramFault(Exception):
    """Why the program cannot answer: an outcome and a detail."""


class Remote:
    """An object in the program's process: a function by name, or a value of no built-in type.

    Calls, attribute reads and writes are sent there. It equals itself only and has no truth value
    and no order, because the program's own methods for these are not trusted.
    """

    __slots__ = ("_ask", "_of")

    def __init__(self, ask: Callable[..., Any], of: str | int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_of", of)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", self._of, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the program must not decide what copy and isinstance find
            raise AttributeError(name)
        return self._ask("get", self._of, (name,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self._of, (name, value), {})

    def __bool__(self) -> bool:
        raise TypeError("a value that is not plain is neither true nor false")


class Channel:
    """Sends requests to the program, and trusts nothing of its replies but their checked form."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.fault: ProgramFault | None = None
        """Why the program cannot answer any more; kept, for tests may catch every exception."""

    def ask(self, do: str, of: str | int, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """The program's value; raises its exceptions of built-in types here as well."""
        sent = [encode(item, number_of) for item in args]
        return self.request(
            do, of, sent, {name: encode(item, number_of) for name, item in named.items()}
        )

    def request(self, do: str, of: str | int, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """`ask` for arguments that are encoded already."""
        request = {"do": do, "of": of, "args": args, "named": named}
        with contextlib.suppress(Closed):  # receive reports it
            write_frame(self.descriptor, json.dumps(request).encode())
        return self.receive()

    def receive(self) -> Any:
        try:
            reply = json.loads(read_frame(self.descriptor, VALUE_BYTES))
            if "value" in reply:
                return decode(reply["value"], lambda of: Remote(self.ask, of))
            name, message = (str(part)[:DETAIL_LENGTH] for part in reply["error"])
        except Closed:
            self._fail("error", ENDED_EARLY)
        except TooLong:
            self._fail("output limit", "it returned too much")
        except MemoryError:
            self._fail("memory", "in what it returned")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            self._fail("error", "its reply is no value")
        if name == "MemoryError":
            self._fail("memory", "MemoryError")
        kind = getattr(builtins, name, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception):
            self._fail("error", f"{name}: {message}")  # SystemExit and the like
        # An AssertionError of the program is no failed test, and its StopIteration would end the
        # tests' map or zip before everything was compared: both end the run as an error.
        if kind not in (AssertionError, StopIteration, StopAsyncIteration):
            with contextlib.suppress(TypeError):  # UnicodeError's children want five arguments
                raise kind(message)
        raise ProgramFault("error", f"{name}: {message}")

    def _fail(self, outcome: str, detail: str) -> NoReturn:
        self.fault = ProgramFault(outcome, detail)
        raise self.fault from None


def number_of(value: Any) -> int:
    """The handle of a value of no built-in type; raises TypeError for what is not the program's."""
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_of")
    raise TypeError(f"a {type(value).__name__} cannot be sent to the program")


def run_tests(job: dict[str, Any], channel: int) -> dict[str, Any]:
    """Runs the tests or the calls of a job on the program: outcome, detail, values of the calls."""
    asked = Channel(channel)
    outcome, detail, values = "passed", "", []
    try:
        asked.receive()  # the program has run to its end
        if job["tests"] is not None:
            _run_tests(job, asked)
        for name, args in job["calls"]:
            values.append(encode(asked.request("call", name, args, {}), number_of))
    except ProgramFault as fault:
        outcome, detail = fault.args
    except AssertionError as error:
        outcome, detail = "failed", ": ".join(describe_exception(error))
    except MemoryError:
        outcome, detail = "memory", "in the tests"
    except BaseException as error:
        outcome, detail = "error", ": ".join(describe_exception(error))
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
    names |= {name: Remote(asked.ask, name) for name in job["entry_points"]}
    exec(code, names)
