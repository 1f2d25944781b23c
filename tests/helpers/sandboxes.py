"""Sandboxes as root and as an ordinary user, on every backend, and what lives in them."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dylora.sandbox import host, launcher
from dylora.sandbox.host import Limits, Sandbox

ROOT = os.geteuid() == 0
USERS = ["root", "ordinary"] if ROOT else ["ordinary"]
AS_ORDINARY = """
import ctypes, importlib, os, sys
sys.path.append({parent!r})
main = importlib.import_module({name!r}).main
sys.path.pop()
os.chown("program", 12345, 12345)
os.setgroups([]), os.setresgid(12345, 12345, 12345), os.setresuid(12345, 12345, 12345)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # what dropping root made unreadable, as for a real user
main()
"""
BWRAP_AS_ORDINARY = """#!{python}
import ctypes, os, sys
libc, words = ctypes.CDLL(None), sys.argv[1:]
here = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "seen")
if "--ro-bind" in words:  # what lies where root alone can pass is shown in a place for all
    if libc.unshare(0x20000) or libc.mount(b"", b"/", None, 0x44000, None):
        sys.exit("bwrap: No permissions to create a new namespace")
    assert libc.mount(b"tmpfs", here.encode(), b"tmpfs", 0, b"mode=755") == 0
for place, word in enumerate(words):
    if word == "--ro-bind":
        source, words[place + 1] = words[place + 1], f"{{here}}/{{place}}"
        os.mkdir(words[place + 1]) if os.path.isdir(source) else open(words[place + 1], "w").close()
        assert libc.mount(source.encode(), words[place + 1].encode(), None, 0x1000, None) == 0
os.setgroups([]), os.setresgid(12345, 12345, 12345), os.setresuid(12345, 12345, 12345)
os.execv({bwrap!r}, ["bwrap", *words])
"""


@contextlib.contextmanager
def started(backend: str, user: str, limits: Limits | None = None) -> Iterator[Sandbox]:
    """A host whose launcher runs as root or as an ordinary user."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if user == "ordinary" and ROOT and backend == "bubblewrap" and shutil.which("bwrap"):
            words = {"python": os.path.realpath(sys.executable), "bwrap": shutil.which("bwrap")}
            Path(folder).chmod(0o755)
            Path(folder, "seen").mkdir()
            script = Path(folder, "bwrap")
            script.write_text(BWRAP_AS_ORDINARY.format(**words))
            script.chmod(0o755)
            patch.setenv("PATH", folder, prepend=os.pathsep)
            patch.setattr(os, "geteuid", lambda: 12345)
        elif user == "ordinary" and ROOT:
            package = Path(launcher.__file__).parent
            words = {"parent": str(package.parent), "name": f"{package.name}.jobs"}
            Path(folder, "__main__.py").write_text(AS_ORDINARY.format(**words))
            patch.setattr(host, "_LAUNCHER", Path(folder))
        box = Sandbox(limits, backend=backend)
    with box:
        yield box


def processes(session: int) -> set[str]:
    """The processes of a session, and the children of the one that it is named after.

    The dead that init has not yet buried are none.
    """
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        state, parent, _, of = fields[:4]
        if str(session) in (parent, of) and (state, parent) != ("Z", "1"):
            found.add(folder.name)
    return found


def survivors(session: int, residents: set[str]) -> set[str]:
    """Processes that a job has left: those that have not ended within 10 s of its result, as a busy
    machine takes its time."""
    until = time.monotonic() + 10.0
    while (found := processes(session) - residents) and time.monotonic() < until:
        time.sleep(0.01)
    return found
