"""Runs programs that a model wrote, as if an enemy had written them.

`Sandbox` starts launcher/, which runs each program in a process that can compute and little
else, and the tests in another one. No program sees a test or an expected value; exit codes and
prints count for nothing. Files are kept from a program by Landlock, or by bubblewrap where the
kernel has no Landlock. Where the machine has neither, `Sandbox` refuses, unless told `unsafe`;
`level` says what protected, for the results.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

from dylora.sandbox import bubblewrap
from dylora.sandbox.launcher.wire import Closed, decode, encode, read_frame, write_frame

Outcome = Literal["passed", "failed", "error", "timeout", "memory", "output limit", "violation"]
Job = TypeVar("Job")
Done = TypeVar("Done")

LEVELS = ("landlock", "bubblewrap")
"""What can keep files from a program, the first choice first."""
_LAUNCHER = Path(__file__).with_name("launcher")
_GRACE_S = 20.0
"""A launcher silent for this much longer than a job's limit is dead."""
_PROBES = (
    ("open('/etc/passwd').read()", "error"),
    ("import os; os.kill(os.getppid(), 0)", "violation"),
)
"""Programs that only a sandbox which works ends in this way."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Each must be above 0."""

    seconds: int = 5
    """Processor time of the program, and of its tests: the same however busy the machine is.
    A program deaf to the signal that ends it is killed a third, but at least 1 s, later."""
    wall_seconds: float = 20.0
    """Wall-clock time of both together, for programs that wait."""
    memory_mb: int = 512
    """Address space, in MiB."""
    output_kb: int = 64
    """Printed text, in KiB."""
    file_kb: int = 1024
    """One file of its folder, in KiB."""
    disk_kb: int = 8192
    """All files of its folder, in KiB. Looked at every 10 ms."""
    files: int = 64
    """Files in its folder."""
    open_files: int = 32
    """Open file descriptors."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ValueError(f"{item.name} must be above 0, got {getattr(self, item.name)}")


class Result(NamedTuple):
    """How one program ended."""

    outcome: (
        Outcome  # failed: an assertion of the tests; error: any other exception, or an early end
    )
    detail: str  # one line for a reader
    output: str  # what it printed, up to the limit
    seconds: float  # wall-clock time
    cpu_seconds: float  # processor time of the program or the tests, whichever took more


class Sandbox:
    """A launcher, ready for one program after the other. Use it in one thread, and `close` it.

    Args:
        limits: What one program may use.
        level: One of `LEVELS`; "auto" takes the first that works.
        unsafe: Resource limits only, whatever the machine could do.

    Raises:
        ValueError: This machine cannot protect itself in the way that was asked for, and `unsafe`
            was not said.
    """

    def __init__(
        self, limits: Limits | None = None, *, level: str = "auto", unsafe: bool = False
    ) -> None:
        if level not in ("auto", *LEVELS):
            raise ValueError(f"there is no sandbox {level!r}; choose auto, {' or '.join(LEVELS)}")
        if unsafe and level != "auto":
            raise ValueError(f"a sandbox cannot be both {level} and unsafe")
        self.limits = limits or Limits()
        self.level = ""
        """What protects, for the results."""
        refusals = []
        wanted = ("unsafe",) if unsafe else LEVELS if level == "auto" else (level,)
        for one in wanted:
            self._stack = contextlib.ExitStack()
            try:
                self.level = self._start(one)
                for source, expected in () if unsafe else _PROBES:
                    result, _ = self.call(source, [])
                    if result.outcome != expected:
                        raise _Refused(f"the probe {source!r} ended as {result}")
                return
            except _Refused as refusal:
                self.close()
                refusals.append(f"{one}: {refusal}")
            except BaseException:
                self.close()
                raise
        raise ValueError(
            f"programs cannot be run safely here: {'; '.join(refusals)}; "
            "--unsafe-exec runs them without protection"
        )

    def run_tests(
        self, source: str, tests: str, *, entry_points: Sequence[str], setup: str = ""
    ) -> Result:
        """Runs a program and then its tests, which call it from another process.

        Args:
            source: Python source of the program; may print, may not rely on `__main__`.
            tests: Python source; a failed `assert` fails the program.
            entry_points: names of the program's that the tests use: functions or classes.
            setup: Python source that the tests' process runs first. Entry points replace what it
                defines of the same name.
        """
        job = {"kind": "tests", "source": source}
        inside = {"setup": setup, "tests": tests, "entry_points": list(entry_points)}
        result, _ = self._ask(job, inside)
        return result

    def call(
        self, source: str, calls: Sequence[tuple[str, Sequence[Any]]]
    ) -> tuple[Result, list[Any]]:
        """Runs a program, then calls its functions; what they return, to be compared out here.

        Args:
            source: Python source of the program.
            calls: names of functions with their arguments: values of Python's own types.

        Returns:
            The result, and a value a call if it is "passed" (all calls returned). A value that
            is not of Python's own types comes as an `Opaque`, which equals nothing.
        """
        sent = [[name, [encode(item, _refuse) for item in args]] for name, args in calls]
        job = {"kind": "calls", "source": source, "calls": sent}
        result, content = self._ask(job, None)
        if result.outcome != "passed":
            return result, []
        try:
            reply = json.loads(content)
            if "error" in reply:
                name, message = reply["error"]
                outcome = "memory" if name == "MemoryError" else "error"
                detail = _in_one_line(f"{name}: {message}")
                return result._replace(outcome=outcome, detail=detail), []
            values = [decode(item, lambda _: Opaque()) for item in reply["values"]]
            if len(values) != len(calls):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            return result._replace(outcome="error", detail="its reply is no value"), []
        return result, values

    def close(self) -> None:
        """Ends the launcher and removes its folder."""
        self._stack.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, level: str) -> str:
        """Starts the launcher; what protects. Raises _Refused with the reason."""
        python = [os.path.realpath(sys.executable), *("-s", "-S", "-P", "-B", "-u", "-X", "utf8")]
        command = [*python, str(_LAUNCHER / "__main__.py")]
        home, prefix, walls, place = None, sys.base_prefix, level, "/"
        if level == "bubblewrap":
            try:
                walls, around, folder = bubblewrap.build(str(_LAUNCHER))
            except OSError as error:
                raise _Refused(str(error)) from None
            command = [*around, *command]
        else:
            place = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dylora-sandbox-"))
            os.chmod(place, 0o711)  # the program, an unprivileged user, must reach its own inside
            folder = os.path.join(place, "program")
            os.mkdir(folder, mode=0o700)
            if sys.platform == "linux":
                # Modules are found through the open folder, so that a user who cannot pass the
                # folders above it (an interpreter below /root) imports them all the same.
                home = os.open(sys.base_prefix, os.O_RDONLY | os.O_DIRECTORY)
                prefix = f"/proc/self/fd/{home}"
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=place,
                env={"PYTHONHOME": prefix, "PYTHONHASHSEED": "0"},
                pass_fds=[] if home is None else [home],
                start_new_session=True,  # Ctrl-C is for the host, which then closes the launcher
                bufsize=0,
            )
            if home is not None:
                os.close(home)
            self._stack.callback(self._stop)
            settings = {
                "limits": asdict(self.limits),
                "home": home,
                "folder": folder,
                "walls": walls,
            }
            try:
                self._write(settings)
                reply = json.loads(read_frame(self._output))
            except Closed:
                self._process.wait()
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip().splitlines()
                raise _Refused(said[-1] if said else "its launcher does not start") from None
        if "refused" in reply:
            raise _Refused(reply["refused"])
        return reply["level"]

    def _stop(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            cast(Any, stream).close()
        try:
            self._process.wait(5)  # it ends the program in hand, then itself
        except subprocess.TimeoutExpired:
            self._kill()
            self._process.wait()

    def _kill(self) -> None:
        # The group: bubblewrap's process is not the launcher's own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def _output(self) -> int:
        return cast(Any, self._process.stdout).fileno()

    def _write(self, content: Any) -> None:
        write_frame(cast(Any, self._process.stdin).fileno(), json.dumps(content).encode())

    def _ask(self, job: dict[str, Any], inside: dict[str, Any] | None) -> tuple[Result, bytes]:
        """Sends a job, and the tests behind it for the test runner alone; the launcher's answer."""
        watch = threading.Timer(self.limits.wall_seconds + _GRACE_S, self._kill)
        watch.start()
        try:
            self._write(job)
            if inside is not None:
                self._write(inside)
            reply = json.loads(read_frame(self._output))
            content = read_frame(self._output)
        except Closed:
            raise RuntimeError("the sandbox's launcher died; no program can do that") from None
        finally:
            watch.cancel()
        reply["detail"] = _in_one_line(reply["detail"])
        return Result(**{name: reply[name] for name in Result._fields}), content


class Opaque:
    """A returned value that is not of Python's own types. It equals nothing but itself."""


def run_all(
    jobs: Sequence[Job],
    run: Callable[[Sandbox, Job], Done],
    *,
    workers: int = 2,
    limits: Limits | None = None,
    level: str = "auto",
    unsafe: bool = False,
) -> Iterator[Done]:
    """`run(sandbox, job)` for every job, in the jobs' order, with `workers` sandboxes at work.

    Raises:
        ValueError: No worker, or a machine that cannot protect itself.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    local = threading.local()
    with contextlib.ExitStack() as stack:
        sandboxes = [
            stack.enter_context(Sandbox(limits, level=level, unsafe=unsafe)) for _ in range(workers)
        ]
        free = list(sandboxes)

        def work(job: Job) -> Done:
            if not hasattr(local, "sandbox"):
                local.sandbox = free.pop()
            return run(local.sandbox, job)

        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(work, jobs)


def _refuse(value: Any) -> int:
    raise ValueError(f"a {type(value).__name__} cannot be sent to a program")


def _in_one_line(text: str) -> str:
    """At most 400 characters that a terminal shows and does not obey."""
    words = "".join(one if one.isprintable() else " " for one in text).split()
    return " ".join(words)[:400]


class _Refused(Exception):
    """Why a level does not protect here."""
