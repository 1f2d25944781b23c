"""Hostile programs neither pass nor escape nor survive; honest ones pass."""

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import attacks
from attacks import ESCAPES, RESOURCES, Attack
from cheats import CHEATS
from dylora.evaluation import launcher, sandbox
from dylora.evaluation.sandbox import Limits, Opaque, Sandbox, run_all

ATTACKS = [*RESOURCES, *ESCAPES, *CHEATS]
ROOT = os.geteuid() == 0
USERS = ["root", "ordinary"] if ROOT else ["ordinary"]
SHORT = Limits(seconds=1, wall_seconds=8.0)
IMPATIENT = Limits(seconds=1, wall_seconds=0.4)
"""For programs that must be stopped, so that to wait for it takes less time."""

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
import os, sys
words = sys.argv[1:]
for place, word in enumerate(words):
    if word in ("--ro-bind", "--dev-bind"):  # opened here: some lie where only root can pass
        descriptor = os.open(words[place + 1], os.O_PATH)
        os.set_inheritable(descriptor, True)
        words[place + 1] = f"/proc/self/fd/{{descriptor}}"
os.setgroups([]), os.setresgid(12345, 12345, 12345), os.setresuid(12345, 12345, 12345)
os.execv({bwrap!r}, ["bwrap", *words])
"""


@contextlib.contextmanager
def started(level: str, user: str, limits: Limits | None = None) -> Iterator[Sandbox]:
    """A sandbox whose launcher runs as root or as an ordinary user."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        if user == "ordinary" and ROOT and level == "bubblewrap" and shutil.which("bwrap"):
            words = {"python": os.path.realpath(sys.executable), "bwrap": shutil.which("bwrap")}
            script = Path(folder, "bwrap")
            script.write_text(BWRAP_AS_ORDINARY.format(**words))
            script.chmod(0o755)
            patch.setenv("PATH", folder, prepend=os.pathsep)
            patch.setattr(os, "geteuid", lambda: 12345)
        elif user == "ordinary" and ROOT:
            package = Path(launcher.__file__).parent
            words = {"parent": str(package.parent), "name": f"{package.name}.jobs"}
            Path(folder, "__main__.py").write_text(AS_ORDINARY.format(**words))
            patch.setattr(sandbox, "_LAUNCHER", Path(folder))
        box = Sandbox(limits, level=level)
    with box:
        yield box


class Place(NamedTuple):
    """Where programs run: on one level, for one user."""

    name: str
    short: Sandbox
    impatient: Sandbox
    residents: dict[Sandbox, set[str]]  # the processes of each while it has no job


@pytest.fixture(scope="module")
def places() -> Iterator[list[Place]]:
    """Every level that this machine has, as every user that there can be; all attacks share them.

    A level may be missing for the machine's sake alone: that its absence is told, and what a fake
    one comes to, other tests show.
    """
    found = []
    with contextlib.ExitStack() as stack:
        for level, user in itertools.product(sandbox.LEVELS, USERS):
            try:
                boxes = [stack.enter_context(started(level, user, SHORT))]
            except ValueError as refusal:
                if ("no Landlock" if level == "landlock" else "bwrap") not in str(refusal):
                    raise
                continue
            boxes.append(stack.enter_context(started(level, user, IMPATIENT)))
            residents = {box: processes(box) for box in boxes}
            found.append(Place(f"{level} as {user}", *boxes, residents))
        assert found
        yield found


@pytest.fixture(scope="module")
def threads(places: list[Place]) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(len(places)) as pool:
        yield pool


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as opened:
        yield opened


@pytest.fixture
def outside() -> Iterator[Path]:
    """A folder that everybody can write to, with files that nobody should read or change."""
    folder = Path(tempfile.mkdtemp(prefix="outside-"))
    folder.chmod(0o777)
    for name in ("secret", "open", "victim", "other"):
        (folder / name).write_text("swordfish")
        (folder / name).chmod(0o666)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


def run(box: Sandbox, attack: Attack, outside: Path, server: socket.socket) -> sandbox.Result:
    source = attack.source.replace("{outside}", str(outside))
    source = source.replace("{tests}", str(Path(attacks.__file__)))
    source = source.replace("{port}", str(server.getsockname()[1]))
    return box.run_tests(source, attack.tests, entry_points=["f"])


def processes(box: Sandbox) -> set[str]:
    """The processes of a sandbox's session, and its launcher's children."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if box._process.pid in (int(fields[1]), int(fields[3])):
            found.add(folder.name)
    return found


def survivors(box: Sandbox, residents: set[str]) -> set[str]:
    """Processes that a job has left, 1 s after its result."""
    until = time.monotonic() + 1.0
    while (found := processes(box) - residents) and time.monotonic() < until:
        time.sleep(0.001)
    return found


def try_at(place: Place, attack: Attack, outside: Path, server: socket.socket) -> None:
    box = place.impatient if attack.outcomes[0] == "timeout" else place.short
    result = run(box, attack, outside, server)
    assert result.outcome in attack.outcomes, (place.name, result)
    assert result.seconds < box.limits.wall_seconds + 1, place.name
    assert survivors(box, place.residents[box]) == set(), place.name
    assert box._process.poll() is None, place.name
    honest = box.run_tests("def f(x): return 2 * x", "assert f(2) == 4", entry_points=["f"])
    assert honest.outcome == "passed", (place.name, honest)


# Attacks


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_an_attack_neither_passes_nor_escapes_nor_survives(
    places: list[Place],
    threads: ThreadPoolExecutor,
    attack: Attack,
    outside: Path,
    server: socket.socket,
):
    before = sorted((path.name, path.stat().st_mtime) for path in outside.iterdir())
    list(threads.map(lambda place: try_at(place, attack, outside, server), places))
    assert sorted((path.name, path.stat().st_mtime) for path in outside.iterdir()) == before
    with pytest.raises(BlockingIOError):
        server.accept()


@pytest.mark.parametrize(
    "attack",
    [attack for attack in ATTACKS if attack.wins_unprotected],
    ids=lambda attack: attack.name.replace(" ", "-"),
)
def test_the_attack_would_win_without_protection(
    attack: Attack, outside: Path, server: socket.socket, unprotected: Sandbox
):
    result = run(unprotected, attack, outside, server)
    with contextlib.suppress(BlockingIOError):
        server.accept()[0].close()
    assert result.outcome == "passed", result


@pytest.fixture(scope="module")
def unprotected() -> Iterator[Sandbox]:
    with Sandbox(SHORT, unsafe=True) as box:
        yield box


# Controls

TYPED = [
    *(None, True, 7, -(2**70), 0.1, float("inf"), "é\ud800\0", b"\0\xff", bytearray(b"a"), 1 + 2j),
    *([1, [2, "x"]], (1, (2,)), {1, 2}, frozenset({3}), {"a": 1, 2: (3,)}, [], (), {}, set(), int),
]


def test_values_of_pythons_own_types_pass_the_border_unchanged(box: Sandbox):
    result, values = box.call("def f(x): return x", [("f", [value]) for value in TYPED])
    assert result.outcome == "passed"
    assert values == TYPED
    assert [type(value) for value in values] == [type(value) for value in TYPED]


def test_a_value_of_a_class_of_the_programs_equals_nothing(box: Sandbox):
    _, values = box.call(
        "class A:\n    __eq__ = lambda s, o: True\ndef f(): return A()", [("f", [])]
    )
    assert isinstance(values[0], Opaque)
    assert values[0] != 4


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("import os; os._exit(0)", "error"),
        ("import sys; sys.exit(0)", "error"),
        ("def f(): return 'x' * 10**7", "output limit"),
        ("def f(): return bytearray(10**9)", "memory"),
        ("import socket; socket.socket()", "violation"),
        ("def f(): raise ValueError", "error"),
    ],
)
def test_calls_that_do_not_return_give_no_values(box: Sandbox, source: str, outcome: str):
    result, values = box.call(source, [("f", [])])
    assert (result.outcome, values) == (outcome, [])


def test_objects_of_the_program_can_be_made_changed_and_given_back(box: Sandbox):
    source = (
        "class Node:\n    def __init__(self, n): self.n, self.next = n, None\n"
        "def total(node): return node.n + (total(node.next) if node.next else 0)"
    )
    tests = "a = Node(1)\na.next = Node(2)\nassert total(a) == 3\nassert a.next.n == 2"
    assert box.run_tests(source, tests, entry_points=["Node", "total"]).outcome == "passed"


def test_tests_may_expect_an_exception_of_pythons_own(box: Sandbox):
    source = "def f(x):\n    class E(ValueError): pass\n    raise E('no')"
    tests = "try: f(1)\nexcept ValueError as error: assert str(error) == 'no'\nelse: assert False"
    assert box.run_tests(source, tests, entry_points=["f"]).outcome == "passed"


def test_what_the_setup_defines_the_program_cannot_replace(box: Sandbox):
    setup = "def twice(x): return 2 * x\ndef f(x): ..."
    source = "def twice(x): return 0\ndef f(x): return 0"
    tests = "def check(candidate): assert twice(candidate(1)) == 0 and twice(3) == 6\ncheck(f)"
    result = box.run_tests(source, tests, setup=setup, entry_points=["f"])
    assert result.outcome == "passed"


def test_a_program_may_use_the_library_its_folder_and_print(box: Sandbox):
    source = (
        "import csv, tempfile, unittest, xml.dom.minidom, zoneinfo\n"
        "def f(x):\n    print('hello')\n    with open('a', 'w') as file: file.write(x)\n"
        "    with tempfile.NamedTemporaryFile(delete=False) as file: file.write(b'x')\n"
        "    return open('a').read()"
    )
    result = box.run_tests(source, "assert f('text') == 'text'", entry_points=["f"])
    assert result.outcome == "passed", result


def test_a_program_starts_with_nothing_of_the_one_before(box: Sandbox):
    first = "import builtins\nbuiltins.left = 1\nopen('a', 'w').close()\ndef f(): return 1"
    second = "import builtins, os\ndef f(): return hasattr(builtins, 'left') or os.listdir('.')"
    assert box.run_tests(first, "assert f() == 1", entry_points=["f"]).outcome == "passed"
    assert box.run_tests(second, "assert f() == []", entry_points=["f"]).outcome == "passed"


def test_chance_and_the_order_of_sets_are_the_same_each_time():
    source = "import random\ndef f(): return random.random(), hash('a')"
    seen = []
    for _ in range(2):
        with Sandbox() as box:
            seen.append(box.call(source, [("f", [])])[1])
    assert seen[0] == seen[1]


def test_results_of_many_sandboxes_come_in_the_jobs_order():
    def square(box: Sandbox, number: int) -> int:
        return box.call("def f(x): return x * x", [("f", [number])])[1][0]

    assert list(run_all(range(12), square, workers=2)) == [number**2 for number in range(12)]


# Refusal, and what is left behind


def test_a_machine_that_cannot_protect_is_refused_and_unsafe_says_so(monkeypatch, tmp_path):
    broken = tmp_path / "launcher.py"
    source = Path(launcher.__file__).read_text()
    broken.write_text(source.replace("if self.abi < 1:", "if True:"))
    monkeypatch.setattr(sandbox, "_LAUNCHER", broken)
    with pytest.raises(ValueError, match=r"no Landlock.*--unsafe-exec"):
        Sandbox()
    with Sandbox(unsafe=True) as box:
        assert box.level.startswith("unsafe")


@pytest.mark.parametrize("part", ["landlock_restrict_self", "seccomp"])
def test_a_protection_that_does_not_hold_is_refused(monkeypatch, tmp_path, part: str):
    kept = [
        line
        for line in Path(launcher.__file__).read_text().splitlines()
        if f', "{part}")' not in line
    ]
    broken = tmp_path / "launcher.py"
    broken.write_text("\n".join(kept))
    monkeypatch.setattr(sandbox, "_LAUNCHER", broken)
    with pytest.raises(ValueError, match="the probe"):
        Sandbox()


@pytest.mark.parametrize("name", ["seconds", "memory_mb", "files"])
def test_a_limit_that_is_not_above_zero_is_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Limits(**{name: 0})


def test_the_folder_and_the_launcher_go_when_the_host_is_killed(tmp_path: Path):
    script = (
        "import sys\nfrom dylora.evaluation.sandbox import *\nbox = Sandbox()\n"
        "print(box._process.pid, flush=True)\n"
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
        time.sleep(0.3)
        host.send_signal(signal.SIGKILL)
        host.wait()
        time.sleep(1.0)
    stat = Path(f"/proc/{pid}/stat")  # gone, or dead and not yet buried by init
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
    assert [path for folder in tmp_path.iterdir() for path in folder.iterdir()] == []


def test_runs_leave_no_process_no_mount_no_file_and_no_descriptor():
    leaves(60)


@pytest.mark.slow
def test_two_thousand_runs_leave_nothing_and_cost_little_each():
    assert leaves(2000) < 0.060


def leaves(runs: int) -> float:
    """Seconds a run, after having checked that nothing is left."""

    def state() -> tuple[object, ...]:
        descriptors = len(os.listdir("/proc/self/fd"))
        return Path("/proc/self/mounts").read_text(), os.listdir("/dev/shm"), descriptors

    sources = ["def f(x): return 2 * x\nopen('a', 'w').close()", "import socket\nsocket.socket()"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chmod(folder, 0o711)
        patch.setattr(tempfile, "tempdir", folder)
        before = state()
        with Sandbox() as box:
            launched = box._process.pid
            descriptors = len(os.listdir(f"/proc/{launched}/fd"))
            begin = time.perf_counter()
            for run in range(runs):
                result = box.run_tests(sources[run % 2], "assert f(2) == 4", entry_points=["f"])
                assert result.outcome == ("passed", "violation")[run % 2]
            seconds = (time.perf_counter() - begin) / runs
            assert survivors(box) == []
            assert len(os.listdir(f"/proc/{launched}/fd")) == descriptors
        assert state() == before
        assert os.listdir(folder) == []
        assert not Path(f"/proc/{launched}").exists()
    return seconds


def test_the_numbers_of_system_calls_are_the_kernels():
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("needs the kernel's headers for x86_64")
    numbers = dict(
        line.split()[1:] for line in header.read_text().splitlines() if "__NR" in line[:14]
    )
    table = launcher.ALLOWED["x86_64"] | launcher.KILLED["x86_64"] | launcher.KILLED_EVERYWHERE
    assert {name: int(numbers[f"__NR_{name}"]) for name in table} == table
