"""What protects is chosen, said and tried; what cannot protect is refused; nothing stays behind."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from dylora.sandbox import host
from dylora.sandbox.host import BACKENDS, Sandbox
from sandboxes import processes, survivors

HONEST = ("def f(x): return 2 * x", "assert f(2) == 4")


def works(backend: str) -> bool:
    with contextlib.suppress(ValueError), Sandbox(backend=backend):
        return True
    return False


AVAILABLE = [backend for backend in BACKENDS if works(backend)]
"""On this machine. The refusals and the choice are tested with fakes, wherever it runs."""


@pytest.fixture
def without(monkeypatch, tmp_path: Path) -> Callable[[str, str], None]:
    """Replaces a line of the launcher's in a copy, which sandboxes then start."""

    def replace(old: str, new: str) -> None:
        copy = tmp_path / "launcher"
        shutil.copytree(host._LAUNCHER, copy)
        monkeypatch.setattr(host, "_LAUNCHER", copy)
        source = (copy / "guard.py").read_text()
        assert source.count(old) == 1
        (copy / "guard.py").write_text(source.replace(old, new))

    return replace


@pytest.fixture
def fake_bwrap(monkeypatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts a script in bubblewrap's place. `$folder` is what it would have to make."""

    def write(last_line: str) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (tmp_path / "bin").mkdir()
        script = tmp_path / "bin" / "bwrap"
        script.write_text(
            "#!/bin/sh\n"
            'if [ "$1" = --version ]; then echo bubblewrap 9.9; exit; fi\n'
            'while [ "$1" != -- ]; do [ "$1" = --chdir ] && folder=$2; shift; done; shift\n'
            f"{last_line}\n"
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)

    return write


NO_LANDLOCK = ("if self.abi < 1:", "if True:")


# The choice


def test_landlock_is_tried_first_and_bubblewrap_next(monkeypatch):
    tried = []

    def start(self: Sandbox, backend: str) -> str:
        tried.append(backend)
        raise host._Refused("not here")

    monkeypatch.setattr(Sandbox, "_start", start)
    with pytest.raises(ValueError, match="landlock: not here; bubblewrap: not here; --unsafe-exec"):
        Sandbox()
    with pytest.raises(ValueError, match="here: bubblewrap: not here"):
        Sandbox(backend="bubblewrap")
    assert tried == ["landlock", "bubblewrap", "bubblewrap"]


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_level_that_is_asked_for_protects_and_says_its_name(backend: str):
    with Sandbox(backend=backend) as box:
        assert box.backend.startswith(backend)
        assert box.backend.endswith("+ seccomp + rlimits, unprivileged")


@pytest.mark.parametrize("backend", AVAILABLE)
def test_what_a_program_can_learn_of_other_files_is_what_the_documents_say(backend: str):
    source = (
        "import os\ndef exists(path): return os.path.exists(path)\n"
        "def installed():\n    path = os.path.dirname(os.__file__) + '/site-packages'\n"
        "    try: return os.listdir(path)\n    except OSError: return []"
    )
    with Sandbox(backend=backend) as box:
        _, values = box.call(source, [("exists", ["/etc/passwd"]), ("installed", [])])
    assert values[0] is (backend == "landlock")
    if backend == "bubblewrap":
        assert values[1] == []


@pytest.mark.parametrize("backend", AVAILABLE)
def test_installed_packages_of_any_python_of_the_system_cannot_be_read(backend: str):
    library = Path(os.__file__).parent
    folders = [*library.glob("*-packages"), *Path("/usr/lib").glob("python3*/*-packages")]
    files = [str(file) for folder in folders for file in list(folder.rglob("*.py"))[:1]]
    source = (
        "def readable(path):\n    try: return bool(open(path, 'rb').read(1))\n"
        "    except OSError: return False"
    )
    with Sandbox(backend=backend) as box:
        asked = [("readable", [file]) for file in ("/etc/ld.so.cache", *files)]
        _, values = box.call(source, asked)
    assert values == [True] + [False] * len(files)


def test_bubblewrap_is_taken_where_the_kernel_has_no_landlock(without, fake_bwrap, monkeypatch):
    without(*NO_LANDLOCK)
    fake_bwrap('mkdir -m 700 "$folder" && exec "$@"')
    monkeypatch.setattr(host, "_PROBES", ())  # this one lets the world in
    with Sandbox() as box:
        assert box.backend == "bubblewrap 9.9 + seccomp + rlimits, unprivileged"
        assert box.run_tests(*HONEST, entry_points=["f"]).outcome == "passed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "landlok"}, "no sandbox 'landlok'; choose auto, landlock or bubblewrap"),
        ({"backend": "landlock", "unsafe": True}, "both landlock and unsafe"),
    ],
)
def test_a_level_that_does_not_exist_or_contradicts_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Sandbox(**options)


# Refusal


def test_a_machine_that_cannot_protect_is_refused_and_unsafe_says_so(without, monkeypatch):
    without(*NO_LANDLOCK)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"no Landlock.*there is no bwrap.*--unsafe-exec"):
        Sandbox()
    with Sandbox(unsafe=True) as box:
        assert box.backend.startswith("unsafe")


def test_what_bubblewrap_says_when_it_cannot_is_in_the_refusal(fake_bwrap):
    fake_bwrap("echo 'bwrap: No permissions to create a new namespace' >&2; exit 1")
    with pytest.raises(ValueError, match="bubblewrap: bwrap: No permissions to create"):
        Sandbox(backend="bubblewrap")


@pytest.mark.parametrize("part", ["landlock_restrict_self", "seccomp"])
def test_a_protection_that_does_not_hold_is_refused(without, part: str):
    (line,) = (
        line
        for line in (host._LAUNCHER / "guard.py").read_text().splitlines()
        if f', "{part}")' in line
    )
    without(line, line[: len(line) - len(line.lstrip())] + "pass")
    with pytest.raises(ValueError, match="the probe"):
        Sandbox(backend=AVAILABLE[0] if part == "seccomp" else "landlock")


def test_a_bubblewrap_that_lets_the_world_in_is_refused(fake_bwrap):
    fake_bwrap('mkdir -m 700 "$folder" && exec "$@"')
    with pytest.raises(ValueError, match=r"the probe \"open\('/etc/passwd'\)"):
        Sandbox(backend="bubblewrap")


def test_a_bubblewrap_that_makes_no_folder_is_refused_and_touches_none(fake_bwrap, tmp_path: Path):
    fake_bwrap('exec "$@"')
    with pytest.raises(ValueError, match=r"bubblewrap: .*[Nn]o such file"):
        Sandbox(backend="bubblewrap")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


# What is left


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_folder_and_the_launcher_go_when_the_host_is_killed(backend: str, tmp_path: Path):
    script = (
        "import sys\nfrom dylora.sandbox.host import *\n"
        f"box = Sandbox(backend={backend!r})\nprint(box._process.pid, flush=True)\n"
        "box.run_tests('while True: pass', '', entry_points=[])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        text=True,
    ) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        time.sleep(0.2)
        host.send_signal(signal.SIGKILL)
        host.wait()
    until = time.monotonic() + 5.0
    while processes(pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert processes(pid) == set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", AVAILABLE)
def test_runs_leave_no_process_no_mount_no_file_and_no_descriptor(backend: str, monkeypatch):
    name = uuid.uuid4().hex  # other processes come and go in /dev/shm
    left = (
        "def f(x): return 2 * x\n"
        f"for path in ('a', '/dev/shm/{name}', '/tmp/{name}'):\n"
        "    try: open(path, 'w').close()\n"
        "    except OSError: pass"
    )

    def state() -> tuple[str, int, list[bool]]:
        descriptors = len(os.listdir("/proc/self/fd"))
        shared = [Path(folder, name).exists() for folder in ("/dev/shm", "/tmp")]
        return Path("/proc/self/mounts").read_text(), descriptors, shared

    sources = [left, "import os\nos.kill(1, 0)"]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)  # nobody has to pass
        monkeypatch.setattr(tempfile, "tempdir", folder)
        before = state()
        with Sandbox(backend=backend) as box:
            launched = box._process.pid
            residents = processes(launched)
            descriptors = len(os.listdir(f"/proc/{launched}/fd"))
            for run in range(60):
                result = box.run_tests(sources[run % 2], HONEST[1], entry_points=["f"])
                assert result.outcome == ("passed", "violation")[run % 2]
            assert survivors(launched, residents) == set()
            assert len(os.listdir(f"/proc/{launched}/fd")) == descriptors
        assert state() == before
        assert os.listdir(folder) == []
    assert survivors(launched, set()) == set()
