"""Which system calls a program may make, and the seccomp filter that enforces it."""

import errno
import json
import struct
from collections.abc import Sequence
from pathlib import Path

# Numbers from the kernel's headers (asm/unistd_64.h and asm-generic/unistd.h), by name.
_TABLES = json.loads(Path(__file__).with_name("syscalls.json").read_text(encoding="utf-8"))
ALLOWED: dict[str, dict[str, int]] = _TABLES["allowed"]
"""By machine."""
KILLED: dict[str, dict[str, int]] = _TABLES["killed"]
"""By machine: system calls that no ordinary program needs. It is killed, a violation. Those in
neither table (fork, socket, unlink) ordinary programs make: they fail, and the program goes on."""
KILLED_EVERYWHERE: dict[str, int] = _TABLES["killed_everywhere"]
CLONE3 = 435
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

RET_KILL, RET_ALLOW, RET_ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_LOAD, _RETURN, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x20, 0x06, 0x15, 0x35, 0x45
CLONE_THREAD, O_TMPFILE_BIT = 0x10000, 0o20000000
AF_UNIX, STREAM_CLOEXEC = 1, 0o2000001

IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX."""
FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, PIPE_SZ
"""Not F_SETOWN and F_SETSIG: together they send any signal to any process of the same user."""


def seccomp_filter(machine: str) -> bytes:
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
        code.append((_IF_EQUAL, 0, body, allowed[name]))
        load(16 + 8 * argument)  # the low half: the kernel takes these as 32 bits
        for test, operand, result in cases:
            when(test, operand, result)
        give(other)

    def only_with(name: str, arguments: dict[int, int]):
        code.append((_IF_EQUAL, 0, 3 * len(arguments) + 1, allowed[name]))
        for argument, value in arguments.items():
            load(16 + 8 * argument)
            code.append((_IF_EQUAL, 1, 0, value))
            give(denied)
        give(RET_ALLOW)

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
    # What asyncio needs: a pair of sockets that reach nobody else. No flags: MSG_OOB's part of the
    # kernel has had faults.
    only_with("socketpair", {0: AF_UNIX, 1: STREAM_CLOEXEC})
    only_with("sendto", {3: 0})
    only_with("recvfrom", {3: 0})
    special = {"openat", "open", "ioctl", "fcntl", "socketpair", "sendto", "recvfrom"}
    for name, number in allowed.items():
        if name not in special:
            when(_IF_EQUAL, number, RET_ALLOW)
    when(_IF_EQUAL, CLONE3, RET_ERRNO | errno.ENOSYS)  # libc then takes clone, which is checked
    for number in (KILLED[machine] | KILLED_EVERYWHERE).values():
        when(_IF_EQUAL, number, RET_KILL)
    give(denied)
    return b"".join(struct.pack("<HBBI", *one) for one in code)
