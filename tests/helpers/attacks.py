"""Hostile programs: what each tries, and how it has to end. Those that cheat are in cheats.py.

An escape returns True from `f` when it has got what it should not, so that its tests pass.
`{outside}` is a folder that an ordinary user could write to, with the file `secret`; `{tests}` a
file of this project; `{port}` a listening TCP port.
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


def _escape(name: str, body: str, *outcomes: str, wins: bool = True) -> Attack:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    source = f"import ctypes, fcntl, mmap, os, resource, signal, socket, sys\n\ndef f():\n{lines}\n"
    return Attack(name, source, outcomes or ("error", "not supported"), ESCAPED, wins)


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
    Attack(  # where zeroing memory is slow, time is over first
        "3 GB bit by bit",
        "x = []\nwhile True: x.append(bytearray(2**27))",
        ("memory", "timeout"),
    ),
    Attack(
        "3 GB of shared memory",
        "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(12)]",
        ("error", "memory"),
    ),
    Attack("prints for ever", "while True: print('x' * 1000)", ("output limit",)),
    Attack("writes to stderr for ever", "import os\nwhile True: os.write(2, b'x' * 4096)",
           ("output limit",)),
    Attack("returns 100 MB", "def f(x): return 'x' * 10**8",
           ("output limit", "memory", "timeout")),
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
    # A file of its own: some namespaces open no devices, and /dev/null would be refused first.
    Attack("all file descriptors", "x = []\nwhile True: x.append(open('a', 'w'))", ("error",)),
    Attack("fork bomb", "import os\nwhile True: os.fork()", ("not supported",)),
    Attack(
        "fork bomb that goes on",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        ("timeout",),
    ),
    Attack(
        "forks and hides",
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)",
        ("not supported",),
    ),
    Attack("a shell", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'])",
           ("not supported", "error")),
    Attack("os.system", "import os\nassert os.system('true') == 0\nwhile True: pass",
           ("not supported", "error")),
    Attack("becomes another program", "import os\nos.execv('/bin/true', ['true'])",
           ("violation",)),
    Attack("posix_spawn", "import os\nos.posix_spawn('/bin/true', ['true'], {})",
           ("not supported", "error")),
    Attack(
        "multiprocessing",
        "import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()",
        ("not supported",),
    ),
    Attack(
        "threads without end",
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[9]).start()",
        ("not supported",),
    ),
    Attack(
        "overflows the stack",
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(x): return [g(x + 1)]\n"
        "class A:\n    def __repr__(self): return repr(self)\nrepr(A())",
        ("error", "memory"),
    ),
    Attack(
        "fills the disk through memory",
        "import mmap\ni = 0\nwhile True:\n    with open(str(i % 60), 'w+b') as file:\n"
        "        file.truncate(2**20); mmap.mmap(file.fileno(), 2**20).write(bytes(2**20)); i += 1",
        ("output limit",),
    ),
    Attack("a file of a terabyte", "open('a', 'w').truncate(2**40)", ("error",)),
    Attack("more parentheses than the parser can take", "eval('(' * 10**6)", ("error", "memory")),
    Attack("more signs than the parser can take", "eval('-' * 10**6 + '1')", ("error", "memory")),
    Attack(
        "lives on after its answer",
        "import signal\ndef loop(*_):\n    while True: pass\nsignal.signal(signal.SIGALRM, loop)\n"
        "class A:\n    def __del__(s): loop()\n"
        "def f(x):\n    a = A(); signal.setitimer(signal.ITIMER_REAL, 1e-4); return 0",
        ("timeout", "failed"),
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
            "not supported",
            wins=name in ("unix", "inet", "inet6"),
        )
        for name, family in FAMILIES.items()
    ],
    _escape("connects", "socket.create_connection(('127.0.0.1', {port}))\nreturn True",
            "not supported"),
    _escape("a pair of datagram sockets",
            "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\nreturn True", "not supported"),
    _escape("urgent bytes to itself",
            "a, b = socket.socketpair()\na.send(b'x', socket.MSG_OOB)\nreturn True",
            "not supported"),
    _escape("connects one of its own pair",
            "socket.socketpair()[0].connect('{outside}/open')\nreturn True", "violation",
            wins=False),
    _escape("names one of its own pair",
            "socket.socketpair()[0].bind('\\0dylora')\nreturn True", "violation", wins=False),
    _escape("looks up a name", "socket.getaddrinfo('localhost', 80)\nreturn True",
            "error", "not supported"),
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
            wins=False),
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
    _escape("calls through the 32-bit gate",  # mov eax, 20 (getpid); int 0x80; ret
            "m = mmap.mmap(-1, 4096, prot=7)\n"
            "m.write(bytes.fromhex('b814000000cd80c3'))\n"
            "code = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
            "return ctypes.CFUNCTYPE(ctypes.c_int)(code)() > 0", "violation", wins=False),
    _escape("starts a process by clone", "os.posix_spawn('/bin/true', ['true'], {})\nreturn True",
            wins=False),
    _escape("executes a descriptor", _call(322, 3, "b''", 0, 0, "0x1000"), "violation",
            wins=False),
    _escape("executes the loader",
            "os.execv('/lib64/ld-linux-x86-64.so.2', ['ld', '/bin/true'])\nreturn True",
            "violation", wins=False),
    _escape("sends a descriptor", _call(46, 3, "bytes(56)", 0), "violation", wins=False),
    _escape("makes itself readable", _call(157, 4, 1, 0, 0, 0), "failed"),
    _escape("watches files", _call(294, 0), "failed"),
    _escape("locks a file of the library",
            "fcntl.flock(open(os.__file__), fcntl.LOCK_EX)\nreturn True"),
    _escape("user faults by a device", "open('/dev/userfaultfd', 'r+b')\nreturn True",
            wins=False),
    _escape("looks around from an inherited descriptor",
            "for d in range(3, 64):\n    for name in ('bin', '..', '../..', 'share'):\n"
            "        try: return bool(os.listdir(os.open(name, os.O_RDONLY, dir_fd=d)))\n"
            "        except OSError: pass", "failed"),
    _escape("writes anywhere else",
            "library = os.path.dirname(os.__file__)\nabove = os.path.dirname(os.getcwd())\n"
            "for d in ('/', '/tmp', '/var/tmp', '/run', '/dev', '/dev/shm', '/usr', above,\n"
            "          library, library + '/site-packages', os.path.dirname(library)):\n"
            "    name = d + f'/dylora-attack-{os.getpid()}'\n"
            "    try: open(name, 'x').close()\n    except OSError: continue\n"
            "    os.remove(name)\n    return True", "failed"),
    _escape("hides what it wrote under another file",
            "for n in 'ab': open(n, 'w').close()\nos.rename('a', 'b')\nreturn True"),
    _escape("closes its folder", "os.chmod('.', 0)\nreturn True", wins=False),
    _escape("reads the questions on stdin", "return len(sys.stdin.read()) > 0", "failed",
            wins=False),
    _escape("a looser seccomp", _call(317, 1, 0, 0), "failed", wins=False),
    _escape("finds the environment", "os.environ.clear() if not os.environ.get('PATH') else 0\n"
            "return len(os.environ) > 0", "failed", wins=False),
]  # fmt: skip
