"""Runs untrusted programs: the host's side.

`Sandbox` starts launcher/, which runs each program in a process that can compute and little
else, and the tests in another one. No program sees a test or an expected value, and its exit code
and output do not decide.
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
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar, cast

from dylora.sandbox import bubblewrap
from dylora.sandbox.launcher import wire

Outcome = Literal[
    "passed", "failed", "error", "timeout", "memory", "output limit", "not supported", "violation"
]
Job = TypeVar("Job")
Output = TypeVar("Output")

BACKENDS = ("landlock", "bubblewrap")
"""What can keep a program from files, in the order in which "auto" tries them."""
_LAUNCHER = Path(__file__).with_name("launcher")
_GRACE_S = 20.0
"""A launcher that has not answered this long after a job's limit is killed."""
_PROBES = (
    # where files are kept away they do not exist, or may not be opened
    ("open('/etc/passwd').read()", ("error", "not supported")),
    ("import os; os.kill(os.getppid(), 0)", ("violation",)),
)
"""Programs, and the outcomes that only a working sandbox gives them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Each must be above 0."""

    seconds: int = 5  # processor time of the program, and of its tests, however busy the machine is
    wall_seconds: float = 20.0  # wall-clock time in which neither computes
    memory_mb: int = 512  # address space, in MiB
    output_kb: int = 64  # printed text, in KiB
    file_kb: int = 1024  # one file of its folder, in KiB
    disk_kb: int = 8192  # all files of its folder, in KiB; checked every 10 ms
    files: int = 64  # in its folder
    open_files: int = 32  # file descriptors

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ValueError(f"{item.name} must be above 0, got {getattr(self, item.name)}")

    @property
    def longest_seconds(self) -> float:
        """Wall-clock time after which a job is ended in any case, even on a very busy machine."""
        return self.wall_seconds + 20 * self.seconds


class Result(NamedTuple):
    """How one program ended."""

    # failed: an assertion of the tests; error: any other exception, or an early end; not supported:
    # an honest program may want it, this sandbox has it not; violation: a system call of attacks
    outcome: Outcome
    detail: str = ""  # one line for a reader
    output: str = ""  # what it printed, up to the limit
    seconds: float = 0.0  # wall-clock time
    cpu_seconds: float = 0.0  # processor time of the program or the tests, whichever took more


class Sandbox(contextlib.AbstractContextManager["Sandbox"]):
    """A launcher, ready for one program after the other. Use it in one thread, and `close` it.

    backend: one of `BACKENDS`; "auto" takes the first that works. unsafe: separate processes with
    resource limits only, on any machine. Raises ValueError for a backend that does not work here.
    """

    def __init__(
        self, limits: Limits | None = None, *, backend: str = "auto", unsafe: bool = False
    ) -> None:
        if backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"there is no sandbox {backend!r}; choose auto, {' or '.join(BACKENDS)}"
            )
        if unsafe and backend != "auto":
            raise ValueError(f"a sandbox cannot be both {backend} and unsafe")
        self.limits = limits or Limits()
        self.backend = ""
        """What protects the machine, in words for the results."""
        refusals = []
        wanted = ("unsafe",) if unsafe else BACKENDS if backend == "auto" else (backend,)
        for one in wanted:
            self._stack = contextlib.ExitStack()
            try:
                self.backend = self._start(one)
                for source, expected in () if unsafe else _PROBES:
                    result, _ = self.call(source, [])
                    if result.outcome not in expected:
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

        All are Python source: the program may print, and may not rely on `__main__`; a failed
        `assert` of the tests fails it; setup is run before the tests. entry_points: functions and
        classes of the program, which replace what setup defines of the same name.
        """
        return self._ask(source, setup=setup, tests=tests, entry_points=list(entry_points))[0]

    def call(
        self, source: str, calls: Sequence[tuple[str, Sequence[Any]]]
    ) -> tuple[Result, list[Any]]:
        """Runs a program, then calls its functions by name, with arguments of built-in types.

        Returns the result, and one value per call if it is "passed" (all calls returned). A value
        that is not of a built-in type comes as an `Opaque`.
        """
        sent = [[name, [wire.encode(item, _refuse) for item in args]] for name, args in calls]
        result, values = self._ask(source, calls=sent)
        if result.outcome != "passed":
            return result, []
        return result, [wire.decode(item, lambda *_: Opaque()) for item in values]

    def close(self) -> None:
        """Ends the launcher and removes its folder."""
        self._stack.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, backend: str) -> str:
        """Starts the launcher; returns what protects. Raises _Refused with the reason."""
        python = [os.path.realpath(sys.executable), *("-s", "-S", "-P", "-B", "-u", "-X", "utf8")]
        command = [*python, str(_LAUNCHER / "__main__.py")]
        home, python_home, cwd = None, sys.base_prefix, "/"
        if backend == "bubblewrap":
            try:
                prefix = bubblewrap.build(str(_LAUNCHER))
            except OSError as error:
                raise _Refused(str(error)) from None
            backend, command, folder = prefix.name, [*prefix.command, *command], prefix.folder
        else:
            cwd = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dylora-sandbox-"))
            os.chmod(cwd, 0o711)  # the program, an unprivileged user, must reach its own inside
            folder = os.path.join(cwd, "program")
            os.mkdir(folder, mode=0o700)
            if sys.platform == "linux":
                # Modules are found through the open folder, so that a user who cannot pass the
                # folders above it (an interpreter below /root) imports them all the same.
                home = os.open(sys.base_prefix, os.O_RDONLY | os.O_DIRECTORY)
                python_home = f"/proc/self/fd/{home}"
        settings = {
            "limits": asdict(self.limits),
            "longest_seconds": self.limits.longest_seconds,
            "home": home,
            "folder": folder,
            "backend": backend,
        }
        with tempfile.TemporaryFile() as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=cwd,
                env={"PYTHONHOME": python_home, "PYTHONHASHSEED": "0"},
                pass_fds=[] if home is None else [home],
                start_new_session=True,  # Ctrl-C is for the host, which then closes the launcher
                bufsize=0,
            )
            if home is not None:
                os.close(home)
            self._stack.callback(self._stop)
            try:
                self._write(settings)
                reply = json.loads(wire.read_frame(self._output))
            except wire.Closed:
                self._process.wait()
                errors.seek(0)
                said = errors.read().decode("utf-8", "replace").strip().splitlines()
                raise _Refused(said[-1] if said else "its launcher does not start") from None
        if "refused" in reply:
            raise _Refused(reply["refused"])
        return reply["backend"]

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
        wire.write_frame(cast(Any, self._process.stdin).fileno(), json.dumps(content).encode())

    def _ask(
        self, source: str, *, tests: str | None = None, calls: Sequence[Any] = (), **rest: Any
    ) -> tuple[Result, list[Any]]:
        """Sends a program, then its tests, which the test runner alone reads; the calls' values."""
        watch = threading.Timer(self.limits.longest_seconds + _GRACE_S, self._kill)
        watch.start()
        try:
            self._write(source)
            self._write({"tests": tests, "calls": calls, **rest})
            reply = json.loads(wire.read_frame(self._output, 2 * wire.MESSAGE_BYTES))
        except wire.Closed:
            raise RuntimeError("the sandbox's launcher died; no program can do that") from None
        finally:
            watch.cancel()
        reply["detail"] = _in_one_line(reply["detail"])
        return Result(**{name: reply[name] for name in Result._fields}), reply.get("values", [])


class Opaque:
    """A returned value that is not of a built-in type. It equals nothing but itself."""


def run_all(
    jobs: Sequence[Job],
    run: Callable[[Sandbox, Job], Output],
    *,
    workers: int = 2,
    limits: Limits | None = None,
    backend: str = "auto",
    unsafe: bool = False,
) -> Iterator[Output]:
    """`run(sandbox, job)` for every job, in the jobs' order, on `workers` sandboxes in parallel.

    Raises ValueError for workers below 1, or no backend that works on this machine.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    free: SimpleQueue[Sandbox] = SimpleQueue()

    def work(job: Job) -> Output:
        sandbox = free.get()
        try:
            return run(sandbox, job)
        finally:
            free.put(sandbox)

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            free.put(stack.enter_context(Sandbox(limits, backend=backend, unsafe=unsafe)))
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(work, jobs)


def _refuse(value: Any) -> list[Any]:
    raise ValueError(f"a {type(value).__name__} cannot be sent to a program")


def _in_one_line(text: str) -> str:
    """At most 400 printable characters: no control sequence reaches a terminal."""
    words = "".join(one if one.isprintable() else " " for one in text).split()
    return " ".join(words)[:400]


class _Refused(Exception):
    """Why a backend does not protect here."""
