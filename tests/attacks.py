"""Hostile programs: what each tries, and how it has to end.

A program has `won` if its tests pass: a cheat makes wrong answers pass, an escape returns True from
`f` when it has got what it should not. `{outside}` is a folder that an ordinary user could write
to, with the file `secret`; `{tests}` a file of this project; `{port}` a listening TCP port.
"""

from typing import NamedTuple

WRONG = "assert f(2) == 4"  # no program below computes this
ESCAPED = "assert f() is True"


class Attack(NamedTuple):
    """One hostile program."""

    name: str
    source: str
    outcomes: tuple[str, ...]  # how it may end; never "passed"
    tests: str = WRONG
    wins_unprotected: bool = False  # tried without protection, too: there it must win


def _cheat(name: str, source: str, *outcomes: str, tests: str = WRONG) -> Attack:
    return Attack(name, source, outcomes or ("failed",), tests)


def _escape(name: str, body: str, *outcomes: str, wins: bool = True) -> Attack:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    source = f"import ctypes, fcntl, mmap, os, resource, signal, socket, sys\n\ndef f():\n{lines}\n"
    return Attack(name, source, outcomes or ("error",), ESCAPED, wins)


def _call(number: int, *arguments: object) -> str:
    """A body that makes a system call of x86_64 and has won if that succeeds."""
    given = "".join(f", {one}" for one in arguments)
    return f"return ctypes.CDLL(None).syscall({number}{given}) >= 0"


RESOURCES = [
    Attack("endless loop", "while True: pass", ("timeout",)),
    Attack("endless loop in f", "def f(x):\n    while True: pass", ("timeout",)),
    Attack("sleeps for ever", "import time\ntime.sleep(1000)", ("timeout",)),
    Attack(
        "loops, deaf to signals",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        ("timeout",),
    ),
    Attack("loops inside C", "x = 7 ** (7 ** 12)", ("timeout", "memory")),
    Attack("backtracks for ever", "import re\nre.match('(a+)+b', 'a' * 60)", ("timeout",)),
    Attack(
        "catches everything and goes on",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        ("timeout",),
    ),
    Attack("3 GB at once", "x = bytearray(3 * 2**30)", ("memory",)),
    Attack("3 GB bit by bit", "x = []\nwhile True: x.append(bytearray(2**27))", ("memory",)),
    Attack(
        "3 GB of shared memory",
        "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(12)]",
        ("error", "memory"),
    ),
    Attack("prints for ever", "while True: print('x' * 1000)", ("output limit",)),
    Attack("writes to stderr for ever", "import os\nwhile True: os.write(2, b'x' * 4096)",
           ("output limit",)),
    Attack("returns 100 MB", "def f(x): return 'x' * 10**8", ("output limit", "memory")),
    Attack("one great file", "open('a', 'wb').write(bytes(2**28))", ("error", "output limit")),
    Attack(
        "many files",
        "for i in range(10**9): open(str(i), 'w').write('x')",
        ("output limit",),
    ),
    Attack(
        "fills the disk",
        "i = 0\nwhile True:\n    open(str(i % 60), 'wb').write(bytes(2**20)); i += 1",
        ("output limit",),
    ),
    Attack("all file descriptors", "x = []\nwhile True: x.append(open('/dev/null'))", ("error",)),
    Attack("fork bomb", "import os\nwhile True: os.fork()", ("violation",)),
    Attack(
        "forks and hides",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)",
        ("violation",),
    ),
    Attack("a shell", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])",
           ("violation", "error")),
    Attack("os.system", "import os\nassert os.system('true') == 0\nwhile True: pass",
           ("violation", "error")),
    Attack("becomes another program", "import os\nos.execv('/bin/true', ['true'])",
           ("violation",)),
    Attack("posix_spawn", "import os\nos.posix_spawn('/bin/true', ['true'], {})",
           ("violation", "error")),
    Attack(
        "multiprocessing",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        ("violation", "error"),
    ),
    Attack(
        "threads without end",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()",
        ("error",),
    ),
    Attack(
        "overflows the stack",
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(x): return [g(x + 1)]\n"
        "class A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        ("error", "memory"),
    ),
    Attack("kills itself", "import ctypes\nctypes.string_at(0)", ("error",)),
]  # fmt: skip

FAMILIES = {"unix": 1, "inet": 2, "ax25": 3, "inet6": 10, "netlink": 16, "packet": 17, "rds": 21,
            "can": 29, "tipc": 30, "bluetooth": 31, "alg": 38, "vsock": 40, "xdp": 44}  # fmt: skip

ESCAPES = [
    *[
        _escape(
            f"socket, {name}",
            f"socket.socket({family}, {3 if name in ('packet', 'netlink') else 1})\nreturn True",
            "error" if name == "unix" else "violation",
            wins=name in ("unix", "inet", "inet6"),
        )
        for name, family in FAMILIES.items()
    ],
    _escape("connects", "socket.create_connection(('127.0.0.1', {port}))\nreturn True",
            "violation"),
    _escape("socketpair", "socket.socketpair()\nreturn True", "violation"),
    _escape("looks up a name", "socket.getaddrinfo('localhost', 80)\nreturn True",
            "violation", "error"),
    _escape("reads a secret", "return open('{outside}/secret').read() == 'swordfish'"),
    _escape("reads /etc/passwd", "return 'root' in open('/etc/passwd').read()"),
    _escape("reads the tests", "return 'ESCAPED' in open('{tests}').read()"),
    _escape("reads the parent's environment",
            "return open(f'/proc/{os.getppid()}/environ', 'rb') is not None", wins=False),
    _escape("reads the parent's arguments",
            "return len(open(f'/proc/{os.getppid()}/cmdline', 'rb').read()) > 0"),
    _escape("reads the parent's memory",
            "return open(f'/proc/{os.getppid()}/mem', 'rb') is not None", wins=False),
    _escape("reads its own memory map", "return 'r-x' in open('/proc/self/maps').read()",
            wins=False),
    _escape("lists the processes", "return len(os.listdir('/proc')) > 0"),
    _escape("lists a folder outside", "return 'secret' in os.listdir('{outside}')"),
    _escape("reads through a descriptor of a folder",
            "d = os.open('{outside}', os.O_PATH)\n"
            "return os.read(os.open('secret', os.O_RDONLY, dir_fd=d), 9) == b'swordfish'"),
    _escape("reads after chdir",
            "os.chdir('{outside}')\nreturn open('secret').read() == 'swordfish'"),
    _escape("reads what a path opened",
            "d = os.open('{outside}/secret', os.O_PATH)\n"
            "return open(f'/proc/self/fd/{d}').read() == 'swordfish'", wins=False),
    _escape("reads through a symlink",
            "os.symlink('{outside}/secret', 'link')\nreturn open('link').read() == 'swordfish'"),
    _escape("links a file outside", "os.link('{outside}/secret', 'link')\nreturn True",
            wins=False),
    _escape("writes outside", "open('{outside}/new', 'w').write('x')\nreturn True"),
    _escape("changes a file outside", "open('{outside}/open', 'a').write('x')\nreturn True"),
    _escape("cuts a file outside", "os.truncate('{outside}/open', 0)\nreturn True"),
    _escape("makes a folder outside", "os.mkdir('{outside}/folder')\nreturn True"),
    _escape("removes a file outside", "os.remove('{outside}/victim')\nreturn True"),
    _escape("renames a file outside",
            "os.rename('{outside}/other', '{outside}/renamed')\nreturn True"),
    _escape("moves a file of its own out",
            "open('a', 'w').close()\nos.rename('a', '{outside}/moved')\nreturn True"),
    _escape("touches a file outside", "os.utime('{outside}/open')\nreturn True"),
    _escape("changes rights outside", "os.chmod('{outside}/open', 0o777)\nreturn True",
            wins=False),
    _escape("writes into the library", "open(os.__file__, 'a')\nreturn True", wins=False),
    _escape("hides what it wrote",
            "f = open('a', 'w')\nos.remove('a')\nreturn True"),
    _escape("a file without a name", "os.open('.', os.O_TMPFILE | os.O_RDWR)\nreturn True"),
    _escape("a folder of its own", "os.mkdir('a')\nreturn True"),
    _escape("a pipe by name", "os.mkfifo('a')\nreturn True", "violation"),
    _escape("a device", "os.mknod('a', 0o020666, os.makedev(1, 1))\nreturn True", "violation",
            wins=False),
    _escape("/dev/shm", "open('/dev/shm/dylora-attack', 'w').close()\n"
            "os.remove('/dev/shm/dylora-attack')\nreturn True"),
    _escape("shared memory by name",
            "from multiprocessing import shared_memory\n"
            "m = shared_memory.SharedMemory(create=True, size=9)\nm.unlink()\nreturn True",
            "error", "violation", wins=False),
    _escape("memfd", "os.memfd_create('a')\nreturn True", "violation"),
    _escape("memory of System V", _call(29, 0, 4096, "0o1600"), "violation"),
    _escape("a message queue", _call(240, "b'a'", "0o102", "0o600", 0), "violation", wins=False),
    _escape("a terminal", "return os.open('/dev/tty', os.O_RDWR) >= 0", wins=False),
    _escape("a terminal's input",
            "fcntl.ioctl(0, 0x5412, b'x')\nreturn True", wins=False),
    _escape("the kernel's memory", "open('/dev/mem', 'rb')\nreturn True", wins=False),
    _escape("kills the parent", "os.kill(os.getppid(), signal.SIGKILL)\nreturn True",
            "violation", wins=False),
    _escape("stops the parent", "os.kill(os.getppid(), signal.SIGSTOP)\nreturn True",
            "violation", wins=False),
    _escape("kills everybody", "os.kill(-1, signal.SIGKILL)\nreturn True", "violation",
            wins=False),
    _escape("kills its group", "os.killpg(0, signal.SIGKILL)\nreturn True", "violation",
            wins=False),
    _escape("signals a thread", "return ctypes.CDLL(None).syscall(200, os.getppid(), 0) == 0",
            "failed", wins=False),
    _escape("queues a signal", _call(129, "os.getppid()", 0, "bytes(128)"), "violation",
            wins=False),
    _escape("signals by a descriptor's owner",
            "r, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nreturn True",
            wins=False),
    _escape("a descriptor of the parent", "os.pidfd_open(os.getppid())\nreturn True", "violation"),
    _escape("ptrace", _call(101, 16, "os.getppid()", 0, 0), "violation", wins=False),
    _escape("the parent's memory by call", _call(310, "os.getppid()", 0, 0, 0, 0, 0),
            "violation", wins=False),
    _escape("becomes root", "os.setuid(0)\nreturn True", "violation", wins=False),
    _escape("new namespaces", _call(272, "0x10000000"), "violation", wins=False),
    _escape("mounts", _call(165, "b'a'", "b'/mnt'", "b'tmpfs'", 0, 0), "violation", wins=False),
    _escape("chroot", "os.chroot('/')\nreturn True", "violation", wins=False),
    _escape("io_uring", _call(425, 4, "bytes(120)"), "violation", wins=False),
    _escape("bpf", _call(321, 0, "bytes(120)", 120), "violation", wins=False),
    _escape("perf events", _call(298, "bytes(120)", 0, -1, -1, 0), "violation", wins=False),
    _escape("user faults", _call(323, 0), "violation", wins=False),
    _escape("the kernel's keys", _call(250, 0, -3, 1), "violation", wins=False),
    _escape("a file by handle", _call(304, -100, "bytes(64)", 0), "violation", wins=False),
    _escape("32-bit calls", _call("0x40000000 + 39"), "violation", wins=False),
    _escape("a session of its own", "os.setsid()\nreturn True", wins=False),
    _escape("raises its limits",
            "resource.setrlimit(resource.RLIMIT_NOFILE, (999, 999))\nreturn True", wins=False),
    _escape("lowers the launcher's limits",
            "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))\nreturn True",
            wins=False),
    _escape("another priority", "os.setpriority(os.PRIO_PROCESS, 0, 19)\nreturn True"),
    _escape("a looser seccomp", _call(317, 1, 0, 0), "failed", wins=False),
    _escape("finds the environment", "os.environ.clear() if not os.environ.get('PATH') else 0\n"
            "return len(os.environ) > 0", "failed", wins=False),
]  # fmt: skip

_EQUAL = "__eq__ = lambda s, o: True; __ne__ = lambda s, o: False; __hash__ = object.__hash__"

CHEATS = [
    _cheat("leaves with 0", "import sys\nsys.exit(0)", "error"),
    _cheat("leaves hard with 0", "import os\nos._exit(0)", "error"),
    _cheat("leaves in f", "import os\ndef f(x): os._exit(0)", "error"),
    _cheat("raises SystemExit in f", "def f(x): raise SystemExit(0)", "error"),
    _cheat("leaves when a module loads", "import atexit, os\natexit.register(os._exit, 0)",
           "error"),
    _cheat("raises what a test catches", "def f(x): raise AssertionError", "error"),
    _cheat("equals everything", f"class A: {_EQUAL}\ndef f(x): return A()"),
    *[
        _cheat(f"a {kind} that equals everything",
               f"class A({kind}): {_EQUAL}\ndef f(x): return A()")
        for kind in ("int", "float", "str", "list", "dict", "tuple", "set", "bytes", "complex")
    ],
    _cheat("a list whose items equal everything",
           f"class A: {_EQUAL}\ndef f(x): return [A()]", tests="assert f(2) == [4]"),
    _cheat("is everything's instance",
           "class A:\n    __class__ = property(lambda s: int)\n    __int__ = lambda s: 4\n"
           "    __eq__ = lambda s, o: True\ndef f(x): return A()", "failed", "error"),
    _cheat("is near everything",
           "class A:\n    __sub__ = __rsub__ = __abs__ = lambda s, *o: s\n"
           "    __lt__ = lambda s, o: True\ndef f(x): return A()",
           "error", tests="assert abs(f(2) - 4) < 1e-6"),
    _cheat("is true", "class A: pass\ndef f(x): return A()", "error", tests="assert f(2)"),
    _cheat("holds everything",
           "class A:\n    __contains__ = lambda s, o: True\ndef f(x): return A()",
           "error", tests="assert 4 in f(2)"),
    _cheat("patches builtins",
           "import builtins\nfor n in ('abs', 'all', 'any', 'len', 'isinstance', 'sum'):\n"
           "    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return [0]",
           "failed", "error",
           tests="assert all(a == b for a, b in zip(f(2), [4])) and len(f(2)) == 2"),
    _cheat("patches the import",
           "import builtins\nbuiltins.__import__ = lambda *a, **k: None\ndef f(x): return 0"),
    _cheat("patches a helper of the tests",
           "import math\nmath.isclose = lambda *a, **k: True\ndef f(x): return 0.0",
           tests="import math\nassert math.isclose(f(2), 4)"),
    _cheat("brings a helper of the tests",
           "class math: isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 0.0",
           tests="assert math.isclose(f(2), 4)"),
    _cheat("redefines the tests' functions",
           "def check(*a): pass\ndef f(x): return 0",
           tests="def check(g):\n    assert g(2) == 4\ncheck(f)"),
    _cheat("replaces modules",
           "import sys, types\nfor n in list(sys.modules): sys.modules[n] = types.ModuleType(n)\n"
           "def f(x): return 0", "failed", "error"),
    _cheat("replaces AssertionError",
           "import builtins\nbuiltins.AssertionError = type('E', (Exception,), {})\n"
           "def f(x): return 0"),
    _cheat("traces", "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\n"
           "sys.excepthook = lambda *a: None\ndef f(x): return 0"),
    _cheat("looks for the tests in the frames",
           "import sys\ndef f(x):\n    frame, seen = sys._getframe(), ''\n    while frame:\n"
           "        seen += repr(frame.f_locals) + repr(frame.f_globals); frame = frame.f_back\n"
           "    return 4444 if ' '.join(['answer', 'is']) in seen else 0",
           tests="assert f(2) == 4444, 'answer is'"),
    _cheat("looks for the tests among all objects",
           "import gc\ndef f(x):\n    needle = ' '.join(['answer', 'is'])\n"
           "    def has(o):\n        try: return needle in str(o)\n"
           "        except Exception: return False\n"
           "    return 4444 if any(map(has, gc.get_objects())) else 0",
           tests="assert f(2) == 4444, 'answer is'"),
    _cheat("looks for the tests in memory",
           "import ctypes\ndef f(x):\n"
           "    parts = ctypes.string_at(id(f) & ~0xfffff, 2**20).split(b'answer')\n"
           "    return 4444 if any(part[:3] == b' is' for part in parts) else 0",
           "failed", "error", tests="assert f(2) == 4444, 'answer is'"),
    _cheat("claims to have passed, everywhere",
           "import json, os, struct\nm = json.dumps({'outcome': 'passed', 'detail': ''}).encode()\n"
           "for d in range(64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass\nos._exit(0)", "error"),
    _cheat("answers before it is asked",
           "import json, os, struct\nm = json.dumps({'value': 0}).encode()\n"
           "for d in range(3, 64):\n    try: os.write(d, (struct.pack('<I', len(m)) + m) * 9)\n"
           "    except OSError: pass\ndef f(x): return 0"),
    _cheat("announces 4 GB",
           "import os\nfor d in range(3, 64):\n    try: os.write(d, b'\\xff' * 8)\n"
           "    except OSError: pass", "output limit"),
    _cheat("sends nonsense",
           "import os\nfor d in range(3, 64):\n    try: os.write(d, b'\\x04\\0\\0\\0][][')\n"
           "    except OSError: pass", "error"),
    _cheat("sends what nests for ever",
           "import os, struct\nm = b'{\"value\":' + b'[\"l\",[' * 50000\n"
           "for d in range(3, 64):\n    try: os.write(d, struct.pack('<I', len(m)) + m)\n"
           "    except OSError: pass", "error", "timeout"),
    _cheat("replaces the launcher's functions",
           "import sys\nmain = sys.modules['__main__']\n"
           "main.encode = lambda *a: {'outcome': 'passed'}\n"
           "main.examine = lambda *a: {'outcome': 'passed', 'detail': ''}\ndef f(x): return 0",
           "error", "failed"),
    _cheat("reads the questions of others",
           "import os\nfor d in range(0, 64):\n    try:\n        os.set_blocking(d, False)\n"
           "        data = os.read(d, 10**6)\n"
           "        assert b'answer' not in data\n    except OSError: pass\n"
           "def f(x): return 0", "failed", "error", "timeout"),
    _cheat("closes every descriptor", "import os\nos.closerange(0, 64)\ndef f(x): return 4",
           "error"),
    _cheat("returns a number of nothing",
           "import sys\nsys.modules['__main__'].encode = lambda *a: ['h', -10**9]\n"
           "def f(x): return 0"),
    _cheat("is no Python", "def f(x) return 4", "error"),
    _cheat("defines nothing", "", "error"),
    _cheat("returns none", "def f(x): pass"),
    _cheat("returns nan", "def f(x): return float('nan')",
           tests="assert abs(f(2) - 4) < 1e-6"),
    _cheat("returns a great integer", "def f(x): return 1 << 10**6"),
]  # fmt: skip

ATTACKS = [*RESOURCES, *ESCAPES, *CHEATS]
