"""The launcher and its runners: they fork the processes of a job and enforce its limits."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from typing import Any

from .guard import NOBODY, Guard, die_with, give_up_root, limit
from .program import serve_program
from .testing import ENDED_EARLY, run_tests
from .wire import MESSAGE_BYTES, Closed, read_frame, write_frame

TICK_S = 0.01
"""How often the size of the folder is checked."""
JOB_BYTES = 2**31
COMMON_MODULES = (
    *("array", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime"),
    *("decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "math"),
    *("operator", "random", "re", "statistics", "string", "textwrap", "typing"),
)
"""Those that programs often use, imported once for all forks."""


class Launcher:
    """Runs one job at a time, each in new processes and an empty folder."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.limits: dict[str, Any] = settings["limits"]
        self.longest_seconds: float = settings["longest_seconds"]
        self.home: int | None = settings["home"]
        self.folder = os.path.realpath(settings["folder"])
        backend = settings["backend"]
        self.guard = None
        if backend != "unsafe":
            self.guard = Guard(self.folder if backend == "landlock" else None)
            backend = f"landlock {self.guard.abi}" if backend == "landlock" else backend
        self.backend = f"{backend} + seccomp + rlimits, unprivileged"
        if self.guard is None:
            self.backend = "unsafe: resource limits only"
        os.listdir(self.folder)  # raises where there is none
        if os.geteuid() == 0:
            os.chown(self.folder, NOBODY, NOBODY)

    def serve(self) -> None:
        """Forks a runner for each job, until the host has gone or a runner fails."""
        waiting = select.poll()
        waiting.register(0, select.POLLIN)
        while any(event & select.POLLIN for _, event in waiting.poll()):
            launcher = os.getpid()
            runner = os.fork()
            if not runner:
                try:
                    die_with(launcher)
                    self._run(json.loads(read_frame(0, JOB_BYTES)))
                except BaseException:  # the fork must not continue the launcher's loop
                    os._exit(1)
                os._exit(0)
            if os.waitpid(runner, 0)[1]:
                return

    def _run(self, source: str) -> None:
        """Runs a program with its tests and writes the result."""
        self._empty_folder()
        theirs, ours = socket.socketpair()
        output, output_end = os.pipe()
        verdict, verdict_end = os.pipe()
        children: list[int] = []
        try:
            children.append(self._fork(source, ours.fileno(), verdict_end, None))
            if os.read(verdict, 1) != b"r":  # ready: it has read the tests from stdin
                raise SystemExit("the test runner did not start")
            children.append(self._fork(source, theirs.fileno(), None, output_end))
            theirs.close()
            ours.close()
            os.close(output_end)
            os.close(verdict_end)
            result = self._watch(output, verdict, children)
        finally:
            ends = [self._end(child) for child in reversed(children)]
        self._empty_folder()
        result["cpu_seconds"] = max(used for _, used in ends)
        signals = {signal_ for signal_, _ in ends}
        if signal.SIGSYS in signals:
            result |= {"outcome": "violation", "detail": "a forbidden system call"}
        elif result["detail"] == ENDED_EARLY and (
            signal.SIGXCPU in signals or result["cpu_seconds"] > self.limits["seconds"]
        ):
            result |= {"outcome": "timeout", "detail": "processor time"}
        write_frame(1, json.dumps(result).encode())

    def _fork(self, source: str, channel: int, verdict: int | None, output: int | None) -> int:
        """The pid of a new test runner (with `verdict`) or program (with `output`)."""
        parent = os.getpid()
        child = os.fork()
        if child:
            with contextlib.suppress(OSError):
                os.setpgid(child, child)  # here too: the group must exist before it is killed
            return child
        try:
            os.setpgid(0, 0)
            os.environ.clear()
            os.environ["TMPDIR"] = os.environ["HOME"] = tempfile.tempdir = self.folder
            os.chdir(self.folder)
            null = os.open(os.devnull, os.O_RDWR)
            if output is not None:
                os.dup2(null, 0)
            os.dup2(null if output is None else output, 1)
            os.dup2(null if output is None else output, 2)
            kept = {self.home, channel, verdict, self.guard.ruleset if self.guard else None}
            for descriptor in range(3, 64):
                if descriptor not in kept:
                    with contextlib.suppress(OSError):
                        os.close(descriptor)
            limit(self.limits)
            give_up_root()
            die_with(parent)
            if self.guard is not None:
                self.guard.apply()
            sys.modules["random"].seed(0)
            if verdict is not None:
                tests = json.loads(read_frame(0, JOB_BYTES))
                os.close(0)
                os.write(verdict, b"r")
                write_frame(verdict, json.dumps(run_tests(tests, channel)).encode())
            else:
                serve_program(source, channel)
        except BaseException as error:  # the fork must not continue the runner's code
            with contextlib.suppress(BaseException):
                os.write(2, repr(error).encode())
        os._exit(0)

    def _watch(self, output: int, verdict: int, children: list[int]) -> dict[str, Any]:
        """Waits for the verdict, for a limit or for the host's end; returns the result so far."""
        begin = time.monotonic()
        sleep = SleepLimit(self.limits["wall_seconds"], children)
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(verdict, select.POLLIN)
        poll.register(0, 0)  # hang-up only
        printed = reply = b""
        result: dict[str, Any] = {"outcome": "error", "detail": ENDED_EARLY}
        while True:
            if sleep.is_reached() or time.monotonic() > begin + self.longest_seconds:
                detail = f"{sleep.limit:g} s of wall-clock time without computing"
                result = {"outcome": "timeout", "detail": detail}
                break
            events = dict(poll.poll(1000 * TICK_S))
            if 0 in events:
                raise SystemExit  # nobody waits for the result
            if events.get(output):
                part = os.read(output, 2**16)
                printed += part
                if not part:
                    poll.unregister(output)
                if len(printed) > self.limits["output_kb"] * 1024:
                    result = {"outcome": "output limit", "detail": "printed too much"}
                    break
            if events.get(verdict):
                part = os.read(verdict, 2**16)
                reply += part
                if len(reply) > MESSAGE_BYTES:
                    result = {"outcome": "output limit", "detail": "it returned too much"}
                    break
                size = struct.unpack("<I", reply[:4])[0] if len(reply) >= 4 else None
                if not part or (size is not None and len(reply) >= size + 4):
                    if size is not None and len(reply) == size + 4:
                        result = json.loads(reply[4:])
                    break
            try:
                if not self._folder_is_small():
                    result = {"outcome": "output limit", "detail": "too much in files"}
                    break
            except OSError as error:  # only an unprotected program can shut or remove its folder
                detail = f"its folder cannot be read: {error.strerror}"
                result = {"outcome": "violation", "detail": detail}
                break
        seconds = time.monotonic() - begin
        return result | {"seconds": seconds, "output": printed.decode("utf-8", "replace")}

    def _folder_is_small(self) -> bool:
        size = count = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                count += 1
                if count > self.limits["files"] or size > self.limits["disk_kb"] * 1024:
                    return False
        return True

    def _empty_folder(self) -> None:
        os.makedirs(self.folder, exist_ok=True)
        with contextlib.suppress(OSError):  # not its owner: it is as it was made
            os.chmod(self.folder, 0o700)
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):  # only an unprotected program can make one
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)

    @staticmethod
    def _end(child: int) -> tuple[int, float]:
        """Kills a child and its group; the signal that ended it (0: none) and its CPU seconds."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
        return os.WTERMSIG(status), used.ru_utime + used.ru_stime


class SleepLimit:
    """Sums the wall-clock time in which the processes of a job do not compute.

    Where processor time cannot be read (other systems than Linux), all time counts.
    """

    def __init__(self, limit: float, children: list[int]) -> None:
        self.limit, self.children = limit, children
        self.period = min(0.5, limit / 4)
        self.checked, self.used, self.slept = time.monotonic(), 0.0, 0.0

    def is_reached(self) -> bool:
        passed = time.monotonic() - self.checked
        if passed >= self.period:
            before, self.used = self.used, sum(map(self._processor_time, self.children))
            self.checked += passed
            if self.used - before < passed / 20:
                self.slept += passed
        return self.slept >= self.limit

    @staticmethod
    def _processor_time(child: int) -> float:
        if sys.platform != "linux":
            return 0.0
        with contextlib.suppress(OSError):
            return time.clock_gettime(~child << 3 | 2)  # as clock_getcpuclockid(3) makes it
        return 0.0


def main() -> None:
    """Reports what protects, then runs jobs until the host closes stdin."""
    host = os.getppid()
    settings = json.loads(read_frame(0))
    try:
        launcher = Launcher(settings)
    except OSError as error:
        write_frame(1, json.dumps({"refused": error.strerror or str(error)}).encode())
        return
    for name in COMMON_MODULES:
        __import__(name)
    with contextlib.suppress(Closed):
        write_frame(1, json.dumps({"backend": launcher.backend}).encode())
        launcher.serve()
    if os.getppid() != host:  # the host was killed and cannot clean up
        shutil.rmtree(launcher.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(launcher.folder))  # the host made it for this folder alone
