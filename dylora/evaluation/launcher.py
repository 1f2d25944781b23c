"""The process that starts hostile programs: jobs on stdin, results on stdout, a frame each.

It stands alone (standard library only) and never sees an expected value. One job is two children,
each a single process that can start no other:

    host ── job: the program ──► launcher ──fork──► program     serves calls of its functions
         ── tests ─────────────────fork──► examiner ◄─ values ─┘  runs the tests, gives the verdict

Tests run in a process of their own and reach the program by calls alone, so there is nothing
beside them that the program could read, replace or fake: it gets arguments and returns values,
plain ones by copy, others as handles that equal nothing. The launcher forks the program before
the tests have been in any memory that the program inherits; the examiner reads them itself.

Both children give up root, capabilities, files (Landlock), system calls (seccomp) and resources
(rlimits) before they run a line that is not ours. See `Guard`.
"""

import builtins
import contextlib
import ctypes
import errno
import importlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, cast

MESSAGE_BYTES = 8 * 2**20
"""The longest frame that is read from a program."""
NOBODY = 65534
ENDED_EARLY = "the program ended early"
TICK_S = 0.01
"""How often the size of the folder is looked at."""


# Frames: four bytes of length, then JSON


class Closed(Exception):
    """The other side has gone."""


class TooLong(Exception):
    """The other side announces more than it may say."""


def read_exactly(descriptor: int, count: int) -> bytes:
    """`count` bytes; raises Closed when the other side ends before."""
    parts = []
    while count:
        try:
            part = os.read(descriptor, min(count, 2**20))
        except ConnectionResetError:  # it died with our words unread
            part = b""
        if not part:
            raise Closed
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int, limit: int = MESSAGE_BYTES) -> bytes:
    """The next frame's content; raises Closed at the end, TooLong beyond `limit` bytes."""
    (size,) = struct.unpack("<I", read_exactly(descriptor, 4))
    if size > limit:
        raise TooLong
    return read_exactly(descriptor, size)


def write_frame(descriptor: int, content: bytes) -> None:
    """Writes a frame whole; raises Closed when nobody reads it."""
    rest = memoryview(struct.pack("<I", len(content)) + content)
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except (BrokenPipeError, ConnectionResetError):
        raise Closed from None


# Values that pass between processes: JSON with the types that it lacks as [tag, content]


def encode(value: Any, handle: Callable[[Any], int]) -> Any:
    """A value of Python's own types as JSON can say it; of others, the number of a handle.

    Instances of subclasses go as what they are underneath, so no method of theirs is ever asked.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < 2**63 else ["i", hex(number)]
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
            if isinstance(value, kind):
                items: Iterator[Any] = cast(Any, kind).__iter__(value)
                return [tag, [encode(item, handle) for item in items]]
    if isinstance(value, dict):
        pairs = dict.items(value)
        return ["d", [[encode(key, handle), encode(item, handle)] for key, item in pairs]]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "B", value.hex()]
    if isinstance(value, complex):
        return ["c", [value.real, value.imag]]
    if (
        isinstance(value, type)
        and vars(builtins).get(type.__getattribute__(value, "__name__")) is value
    ):
        return ["y", type.__getattribute__(value, "__name__")]
    return ["h", handle(value)]


def decode(content: Any, handle: Callable[[int], Any]) -> Any:
    """The value that `encode` was given; ValueError or TypeError for what it never writes."""
    if content is None or type(content) in (bool, int, float, str):
        return content
    if type(content) is not list or len(content) != 2:
        raise ValueError("not a value")
    tag, inner = content
    if tag == "i":
        return int(inner, 16)
    if tag == "h" and type(inner) is int:
        return handle(inner)
    if tag == "y" and isinstance(getattr(builtins, inner), type):
        return getattr(builtins, inner)
    if tag == "c":
        real, imaginary = map(float, inner)
        return complex(real, imaginary)
    if tag == "d":
        return {decode(key, handle): decode(item, handle) for key, item in inner}
    for name, kind in (("b", bytes), ("B", bytearray)):
        if tag == name:
            return kind.fromhex(inner)
    for name, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if tag == name and type(inner) is list:
            return kind(decode(item, handle) for item in inner)
    raise ValueError("not a value")


# The program's side


def serve_program(source: str, channel: int) -> None:
    """Runs the program, says that it runs, then answers calls until nobody asks.

    A request is {"do", "of", "args"}: call, get an attribute, set one; `of` is a name of the
    program's or the number of a handle. A reply is {"value"} or {"error": [type, message]}.
    """
    module = types.ModuleType("program")
    sys.modules["program"] = module
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    def answer(request: dict[str, Any] | None) -> Any:
        if request is None:
            exec(compile(source, "program", "exec"), module.__dict__)
            return None
        of, do = request["of"], request["do"]
        args = [decode(item, objects.__getitem__) for item in request["args"]]
        named = {name: decode(item, objects.__getitem__) for name, item in request["named"].items()}
        if of not in module.__dict__ and not isinstance(of, int):
            raise NameError(f"the program defines no {of}")
        target = objects[of] if isinstance(of, int) else module.__dict__[of]
        if do == "get":
            return getattr(target, *args)
        if do == "set":
            return setattr(target, *args)
        return target(*args, **named)

    request = None
    while True:
        try:
            reply = {"value": encode(answer(request), keep)}
            content = json.dumps(reply).encode()
        except BaseException as error:  # SystemExit too: to leave is no way to pass
            content = json.dumps({"error": _told(error)}).encode()
        write_frame(channel, content)
        try:
            request = json.loads(read_frame(channel))
        except Closed:
            return


def _told(error: BaseException) -> list[str]:
    message = ""
    with contextlib.suppress(BaseException):
        message = str(error)[:300].encode("utf-8", "replace").decode()
    # The nearest class of Python's own: tests may expect a ValueError, and know no others.
    own = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
    return [own[0], message]


# The examiner's side


class ProgramFault(Exception):
    """What kept the program from answering: an outcome and a detail."""


class Remote:
    """Something of the program's: a function by name, or a value that is not plain.

    To call it and to get or set its attributes happens over there. It equals itself only, has no
    truth and no order: what the program says about such things counts for nothing.
    """

    __slots__ = ("_ask", "_of")

    def __init__(self, ask: Callable[..., Any], of: str | int) -> None:
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_of", of)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", self._of, args, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and isinstance look for is not the program's to say
            raise AttributeError(name)
        return self._ask("get", self._of, (name,), {})

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self._of, (name, value), {})

    def __bool__(self) -> bool:
        raise TypeError("a value that is not plain is neither true nor false")


class Channel:
    """Asks the program, and believes nothing but the shape of its replies."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def ask(self, do: str, of: str | int, args: Sequence[Any], named: dict[str, Any]) -> Any:
        """What the program gives; its exceptions of Python's own types are raised here too."""
        request = {
            "do": do,
            "of": of,
            "args": [encode(item, self._number) for item in args],
            "named": {name: encode(item, self._number) for name, item in named.items()},
        }
        with contextlib.suppress(Closed):  # reading tells
            write_frame(self.descriptor, json.dumps(request).encode())
        return self.receive()

    def receive(self) -> Any:
        try:
            reply = json.loads(read_frame(self.descriptor))
            if "value" in reply:
                return decode(reply["value"], lambda of: Remote(self.ask, of))
            name, message = reply["error"]
        except Closed:
            raise ProgramFault("error", ENDED_EARLY) from None
        except TooLong:
            raise ProgramFault("output limit", "it returned too much") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ProgramFault("error", "its reply is no value") from None
        if name == "MemoryError":
            raise ProgramFault("memory", "MemoryError")
        kind = getattr(builtins, str(name), None)
        if (
            isinstance(kind, type)
            and issubclass(kind, Exception)
            and kind is not AssertionError  # only the tests' own count as failed
        ):
            with contextlib.suppress(TypeError):  # UnicodeError's children want five arguments
                raise kind(message)
        raise ProgramFault("error", f"{name}: {message}")

    @staticmethod
    def _number(value: Any) -> int:
        if isinstance(value, Remote):
            return object.__getattribute__(value, "_of")
        raise TypeError(f"a {type(value).__name__} cannot be sent to the program")


def examine(job: dict[str, Any], channel: int) -> dict[str, str]:
    """Runs the tests on the program; the verdict."""
    names: dict[str, Any] = {"__name__": "tests"}
    asked = Channel(channel)
    try:
        asked.receive()  # the program has run to its end
        exec(compile(job["setup"], "setup", "exec"), names)
        code = compile(job["tests"], "tests", "exec")
        # MBPP's tests lean on modules that the reference imports. The program's own may be fake.
        for name in set(code.co_names) & sys.stdlib_module_names - set(names):
            names[name] = importlib.import_module(name)
        names |= {name: Remote(asked.ask, name) for name in job["entry_points"]}
        exec(code, names)
    except ProgramFault as fault:
        return {"outcome": fault.args[0], "detail": fault.args[1]}
    except AssertionError as error:
        return {"outcome": "failed", "detail": ": ".join(_told(error))}
    except MemoryError:
        return {"outcome": "memory", "detail": "in the tests"}
    except BaseException as error:
        return {"outcome": "error", "detail": ": ".join(_told(error))}
    return {"outcome": "passed", "detail": ""}


# What the children give up

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4

READ_FILE, READ_DIR, WRITE_FILE, MAKE_REG, TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 8, 1 << 14
HANDLED_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Every right over files that the kernel's version of Landlock knows; none is left open."""

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
DEVICES = ("/dev/urandom", "/dev/random", "/dev/zero")

# Numbers from the kernel's headers (asm/unistd_64.h and asm-generic/unistd.h).
ALLOWED = {
    "x86_64": {
        "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7,
        "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13,
        "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18,
        "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23, "sched_yield": 24,
        "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35,
        "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "clone": 56, "exit": 60,
        "uname": 63, "fcntl": 72, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getcwd": 79,
        "chdir": 80, "fchdir": 81, "readlink": 89, "umask": 95, "gettimeofday": 96,
        "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102,
        "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
        "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124,
        "rt_sigpending": 127, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "gettid": 186,
        "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
        "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
        "exit_group": 231, "openat": 257, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
        "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "get_robust_list": 274,
        "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getcpu": 309, "getrandom": 318,
        "membarrier": 324, "statx": 332, "rseq": 334, "close_range": 436, "faccessat2": 439,
    },
    "aarch64": {
        "getcwd": 17, "epoll_create1": 20, "dup": 23, "dup3": 24, "fcntl": 25, "ioctl": 29,
        "statfs": 43, "fstatfs": 44, "ftruncate": 46, "faccessat": 48, "chdir": 49, "fchdir": 50,
        "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63,
        "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "pselect6": 72,
        "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82, "fdatasync": 83,
        "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99, "get_robust_list": 100,
        "nanosleep": 101, "getitimer": 102, "setitimer": 103, "clock_gettime": 113,
        "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
        "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135,
        "rt_sigpending": 136, "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150,
        "times": 153, "getpgid": 155, "getsid": 156, "getgroups": 158, "uname": 160,
        "getrlimit": 163, "getrusage": 165, "umask": 166, "getcpu": 168, "gettimeofday": 169,
        "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
        "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216,
        "clone": 220, "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278,
        "membarrier": 283, "statx": 291, "rseq": 293, "close_range": 436, "faccessat2": 439,
    },
}  # fmt: skip
"""System calls that run, a few with some arguments only (`_filter`). The rest fail with EPERM."""

KILLED = {
    "x86_64": {
        "shmget": 29, "shmat": 30, "shmctl": 31, "socket": 41, "connect": 42, "accept": 43,
        "sendto": 44, "sendmsg": 46, "bind": 49, "listen": 50, "socketpair": 53, "fork": 57,
        "vfork": 58, "execve": 59, "kill": 62, "semget": 64, "msgget": 68, "ptrace": 101,
        "setuid": 105, "setgid": 106, "setgroups": 116, "setresuid": 117, "setresgid": 119,
        "capset": 126, "rt_sigqueueinfo": 129, "mknod": 133, "modify_ldt": 154, "pivot_root": 155,
        "chroot": 161, "acct": 163, "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169,
        "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "mq_open": 240,
        "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "mknodat": 259,
        "unshare": 272, "move_pages": 279, "accept4": 288, "rt_tgsigqueueinfo": 297,
        "perf_event_open": 298, "setns": 308, "fanotify_init": 300, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
        "finit_module": 313, "memfd_create": 319, "bpf": 321, "execveat": 322, "userfaultfd": 323,
    },
    "aarch64": {
        "fanotify_init": 262, "name_to_handle_at": 264, "open_by_handle_at": 265, "mknodat": 33,
        "umount2": 39, "mount": 40, "pivot_root": 41, "chroot": 51, "acct": 89, "unshare": 97,
        "kexec_load": 104, "init_module": 105, "delete_module": 106, "capset": 91, "ptrace": 117,
        "kill": 129, "rt_sigqueueinfo": 138, "reboot": 142, "setgid": 144, "setuid": 146,
        "setresuid": 147, "setresgid": 149, "setgroups": 159, "mq_open": 180, "msgget": 186,
        "semget": 190, "shmget": 194, "shmctl": 195, "shmat": 196, "socket": 198,
        "socketpair": 199, "bind": 200, "listen": 201, "accept": 202, "connect": 203,
        "sendto": 206, "sendmsg": 211, "add_key": 217, "request_key": 218, "keyctl": 219,
        "execve": 221, "swapon": 224, "move_pages": 239, "rt_tgsigqueueinfo": 240,
        "perf_event_open": 241, "accept4": 242, "setns": 268, "process_vm_readv": 270,
        "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "memfd_create": 279,
        "bpf": 280, "execveat": 281, "userfaultfd": 282,
    },
}  # fmt: skip
"""System calls no honest answer makes: the program is killed, and the outcome is a violation."""
KILLED_EVERYWHERE = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "io_uring_enter": 426,
    "io_uring_register": 427, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432,
    "pidfd_open": 434, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "memfd_secret": 447, "process_mrelease": 448,
}  # fmt: skip
CLONE3 = 435
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

RET_KILL, RET_ALLOW, RET_ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_LOAD, _RETURN, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45
CLONE_THREAD, O_TMPFILE_BIT, AF_UNIX = 0x10000, 0o20000000, 1

IOCTLS = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONCLEX FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, PIPE_SZ
"""Not F_SETOWN and F_SETSIG: together they send any signal to any process of the same user."""


def _filter(machine: str) -> bytes:
    """The seccomp program (struct sock_filter[]) for x86_64 or aarch64."""
    allowed = ALLOWED[machine]
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((_LOAD, 0, 0, offset))

    def give(result: int) -> None:
        code.append((_RETURN, 0, 0, result))

    def when(test: int, operand: int, result: int) -> None:
        code.append((test, 0, 1, operand))
        give(result)

    def checked(name: str, argument: int, cases: Sequence[tuple[int, int, int]], other: int):
        body = 2 + 2 * len(cases)
        code.append((_IF_EQUAL, 0, body, (allowed | KILLED[machine])[name]))
        load(16 + 8 * argument)  # the low half: the kernel takes these as 32 bits
        for test, operand, result in cases:
            when(test, operand, result)
        give(other)

    load(4)  # seccomp_data.arch
    code.append((_IF_EQUAL, 1, 0, AUDIT_ARCH[machine]))
    give(RET_KILL)
    load(0)  # seccomp_data.nr
    when(_IF_AT_LEAST, 0x40000000, RET_KILL)  # the x32 calls of x86_64
    denied = RET_ERRNO | errno.EPERM
    no_tmpfile = [(_IF_ANY_BIT, O_TMPFILE_BIT, RET_ERRNO | errno.EOPNOTSUPP)]
    checked("openat", 2, no_tmpfile, RET_ALLOW)
    if "open" in allowed:
        checked("open", 1, no_tmpfile, RET_ALLOW)
    checked("ioctl", 1, [(_IF_EQUAL, one, RET_ALLOW) for one in IOCTLS], denied)
    checked("fcntl", 1, [(_IF_EQUAL, one, RET_ALLOW) for one in FCNTLS], denied)
    checked("clone", 0, [(_IF_ANY_BIT, CLONE_THREAD, denied)], RET_KILL)
    # libc asks a name service about users over a local socket (os.path.expanduser): no violation
    checked("socket", 0, [(_IF_EQUAL, AF_UNIX, denied)], RET_KILL)
    special = {"openat", "open", "ioctl", "fcntl", "clone"}
    for name, number in allowed.items():
        if name not in special:
            when(_IF_EQUAL, number, RET_ALLOW)
    when(_IF_EQUAL, CLONE3, RET_ERRNO | errno.ENOSYS)  # libc then takes clone, which is checked
    for number in (KILLED[machine] | KILLED_EVERYWHERE).values():
        when(_IF_EQUAL, number, RET_KILL)
    give(denied)
    return b"".join(struct.pack("<HBBI", *one) for one in code)


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(*arguments: int) -> int:
    full = [*arguments, 0, 0, 0, 0][:5]
    return _LIBC.prctl(full[0], *(ctypes.c_ulong(one) for one in full[1:]))


class Guard:
    """Landlock and seccomp, prepared once and put on by every child.

    Landlock leaves to read: Python's standard library (not site-packages), the system's shared
    libraries, time zones and devices of random numbers; to write: /dev/null and the job's folder,
    whose files cannot be removed or linked, so that what was written can be counted. seccomp lets
    the system calls of a computing process through and kills at those of `KILLED`.
    Raises OSError where the kernel or the machine lacks the means.
    """

    def __init__(self, folder: str) -> None:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in ALLOWED or struct.calcsize("P") != 8:
            raise OSError(errno.ENOSYS, f"no protection is known for {sys.platform} on {machine}")
        self.abi = _LIBC.syscall(444, None, ctypes.c_size_t(0), 1)
        if self.abi < 1:
            raise OSError(errno.ENOSYS, "the kernel has no Landlock (Linux 5.13 or newer has)")
        self.handled = HANDLED_BY_ABI[max(abi for abi in HANDLED_BY_ABI if abi <= self.abi)]
        net = 3 if self.abi >= 4 else 0  # binding and connecting TCP
        scoped = 3 if self.abi >= 6 else 0  # abstract sockets and signals to others
        attributes = struct.pack("<QQQ", self.handled, net, scoped)
        size = 24 if self.abi >= 6 else 16 if self.abi >= 4 else 8
        self.ruleset = _checked(
            _LIBC.syscall(444, attributes, ctypes.c_size_t(size), 0), "landlock_create_ruleset"
        )
        os.set_inheritable(self.ruleset, False)
        for path in (*LIBRARIES, *DEVICES):
            self._permit(path, READ_FILE | READ_DIR)
        self._permit("/dev/null", READ_FILE | WRITE_FILE | TRUNCATE)
        self._permit(folder, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE)
        library = os.path.dirname(os.__file__)
        self._permit(library, READ_DIR)
        for name in os.listdir(library):
            if name not in ("site-packages", "dist-packages"):
                self._permit(os.path.join(library, name), READ_FILE | READ_DIR)
        code = _filter(machine)
        self._code = ctypes.create_string_buffer(code, len(code))
        header = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(self._code))
        self._program = ctypes.create_string_buffer(header, len(header))

    def _permit(self, path: str, rights: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # /lib64 and the like are not everywhere
        if not os.path.isdir(path):
            rights &= READ_FILE | WRITE_FILE | TRUNCATE
        rule = struct.pack("<Qi", rights & self.handled, descriptor)
        result = _LIBC.syscall(445, self.ruleset, 1, rule, 0)
        os.close(descriptor)
        _checked(result, f"landlock_add_rule {path}")

    def put_on(self) -> None:
        """From here on this process can do little; there is no way back."""
        _checked(_prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
        _checked(_LIBC.syscall(446, self.ruleset, 0), "landlock_restrict_self")
        os.close(self.ruleset)
        program = ctypes.c_ulong(ctypes.addressof(self._program))
        _checked(_LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp")


def _give_up_root() -> None:
    """An unprivileged user without groups and capabilities, whoever this process was."""
    if sys.platform == "linux":
        for capability in range(64):
            if _prctl(PR_CAPBSET_DROP, capability) < 0:
                break  # an ordinary user may not, and has none to drop
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if sys.platform == "linux":
        header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
        _checked(_LIBC.capset(header, none), "capset")


def _limit(limits: dict[str, Any]) -> None:
    bounds = {
        "RLIMIT_CPU": limits["seconds"],  # the wall clock is the launcher's to watch
        "RLIMIT_AS": limits["memory_mb"] * 2**20,
        "RLIMIT_FSIZE": limits["file_kb"] * 1024,
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, bound in bounds.items():
        with contextlib.suppress(AttributeError):  # not every system has each
            resource.setrlimit(getattr(resource, name), (bound, bound))


# The launcher itself


class Launcher:
    """Runs one job at a time, each in new processes and an empty folder."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.limits: dict[str, Any] = settings["limits"]
        self.home: int | None = settings["home"]
        self.folder = os.path.realpath(settings["folder"])
        self.unsafe: bool = settings["unsafe"]
        self.guard = None if self.unsafe else Guard(self.folder)
        if os.geteuid() == 0:
            os.chown(self.folder, NOBODY, NOBODY)

    @property
    def level(self) -> str:
        """What protects, for the results."""
        if self.guard is None:
            return "unsafe: resource limits only"
        return f"landlock {self.guard.abi} + seccomp + rlimits, unprivileged"

    def run(self, job: dict[str, Any]) -> None:
        """Runs a job and writes its result."""
        self._empty_folder()
        theirs, ours = socket.socketpair()
        output, output_end = os.pipe()
        verdict, verdict_end = os.pipe()
        children: list[int] = []
        try:
            if job["kind"] == "tests":
                child = self._fork(job, ours.fileno(), verdict_end, None)
                children.append(child)
                if os.read(verdict, 1) != b"r":  # it has the tests: the next frame is a new job's
                    raise SystemExit("the examiner did not start")
            children.append(self._fork(job, theirs.fileno(), None, output_end))
            for one in (theirs, *([ours] if job["kind"] == "tests" else [])):
                one.close()
            os.close(output_end)
            os.close(verdict_end)
            if job["kind"] == "calls":
                os.close(verdict)
                verdict = ours.detach()
            result = self._watch(job, output, verdict)
        finally:
            ends = [self._end(child) for child in reversed(children)]
        os.close(output)
        os.close(verdict)
        self._empty_folder()
        content = result.pop("content", b"")
        result["cpu_seconds"] = max(used for _, used in ends)
        if any(signal_ == signal.SIGSYS for signal_, _ in ends):
            result |= {"outcome": "violation", "detail": "a forbidden system call"}
        elif (
            result["detail"] == ENDED_EARLY and result["cpu_seconds"] > 0.9 * self.limits["seconds"]
        ):
            # The kernel counts the limit a few per cent ahead of what it reports.
            result |= {"outcome": "timeout", "detail": "processor time"}
        write_frame(1, json.dumps(result).encode())
        write_frame(1, content)

    def _fork(self, job: dict[str, Any], channel: int, verdict: int | None, output: int | None):
        """Starts the examiner (with `verdict`) or the program (with `output`); its process id."""
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
            _limit(self.limits)
            _give_up_root()
            if sys.platform == "linux":
                _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(1)
            if self.guard is not None:
                self.guard.put_on()
            sys.modules["random"].seed(0)
            if verdict is None:
                self._be_program(job, channel)
            else:
                job = json.loads(read_frame(0, 2**31))
                os.close(0)
                os.write(verdict, b"r")
                write_frame(verdict, json.dumps(examine(job, channel)).encode())
        except BaseException as error:  # nothing may return into the launcher's own code
            with contextlib.suppress(BaseException):
                os.write(2, repr(error).encode())
        os._exit(0)

    @staticmethod
    def _be_program(job: dict[str, Any], channel: int) -> None:
        if job["kind"] == "tests":
            serve_program(job["source"], channel)
            return
        names: dict[str, Any] = {"__name__": "program"}
        calls = [[name, [decode(item, _no_handle) for item in args]] for name, args in job["calls"]]
        try:
            exec(compile(job["source"], "program", "exec"), names)
            values = [encode(names[name](*args), lambda _: -1) for name, args in calls]
            content = json.dumps({"values": values}).encode()
        except BaseException as error:
            content = json.dumps({"error": _told(error)}).encode()
        write_frame(channel, content)

    def _watch(self, job: dict[str, Any], output: int, verdict: int) -> dict[str, Any]:
        """Waits for the verdict, a limit or the host's end; what came of it, without the reasons
        that only the program's end tells."""
        begin, wall = time.monotonic(), self.limits["wall_seconds"]
        poll = select.poll()
        poll.register(output, select.POLLIN)
        poll.register(verdict, select.POLLIN)
        poll.register(0, 0)  # hang-up only
        printed = said = b""
        result: dict[str, Any] = {"outcome": "error", "detail": ENDED_EARLY}
        while True:
            left = begin + wall - time.monotonic()
            if left <= 0:
                result = {"outcome": "timeout", "detail": f"{wall:g} s of wall-clock time"}
                break
            events = dict(poll.poll(1000 * min(left, TICK_S)))
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
                try:
                    part = os.read(verdict, 2**16)
                except ConnectionResetError:
                    part = b""
                said += part
                if len(said) > MESSAGE_BYTES:
                    result = {"outcome": "output limit", "detail": "it returned too much"}
                    break
                size = struct.unpack("<I", said[:4])[0] if len(said) >= 4 else None
                if not part or (size is not None and len(said) >= size + 4):
                    whole = size is not None and len(said) == size + 4
                    if whole and job["kind"] == "tests":
                        result = json.loads(said[4:])
                    elif whole:
                        result = {"outcome": "passed", "detail": "", "content": said[4:]}
                    break
            if not self._folder_is_small():
                result = {"outcome": "output limit", "detail": "too much in files"}
                break
        seconds = time.monotonic() - begin
        return result | {"seconds": seconds, "output": printed.decode("utf-8", "replace")}

    def _folder_is_small(self) -> bool:
        size = count = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                size += entry.stat(follow_symlinks=False).st_blocks * 512
                count += 1
                if count > self.limits["files"] or size > self.limits["disk_kb"] * 1024:
                    return False
        return True

    def _empty_folder(self) -> None:
        for entry in os.scandir(self.folder):
            if entry.is_dir(follow_symlinks=False):  # possible without protection only
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)

    @staticmethod
    def _end(child: int) -> tuple[int, float]:
        """Kills a child with its group (of one, where protection is on).

        Returns the signal that ended it (0: none), and its processor time in seconds.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
        return os.WTERMSIG(status), used.ru_utime + used.ru_stime


def _no_handle(_: int) -> NoReturn:
    raise ValueError("arguments are plain values")


def _preload() -> None:
    """What answers import often: loaded once here and shared by the forks."""
    for name in (
        *("array", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime"),
        *("decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "math"),
        *("operator", "random", "re", "statistics", "string", "textwrap", "typing"),
    ):
        __import__(name)


def main() -> None:
    """Says how it protects, then runs jobs until they end; removes its folder."""
    settings = json.loads(read_frame(0))
    try:
        launcher = Launcher(settings)
    except OSError as error:
        write_frame(1, json.dumps({"refused": error.strerror or str(error)}).encode())
        return
    _preload()
    write_frame(1, json.dumps({"level": launcher.level}).encode())
    try:
        while True:
            launcher.run(json.loads(read_frame(0, 2**31)))
    except Closed:
        pass
    finally:
        if os.getppid() != settings["host"]:  # the host was killed and cannot tidy up
            shutil.rmtree(launcher.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
