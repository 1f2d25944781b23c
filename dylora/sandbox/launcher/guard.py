"""What a child process gives up, for good, before it runs untrusted code.

First resources (`limit`), then the user (`give_up_root`), then files and system calls (`Guard`).
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

from .files import DEVICES, INSTALLED, LIBRARIES
from .syscalls import ALLOWED, seccomp_filter

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 22, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4

READ_FILE, READ_DIR, WRITE_FILE, MAKE_REG, TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 8, 1 << 14
HANDLED_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights over files that each version of Landlock restricts; programs get none by default."""

NOBODY = 65534


class Guard:
    """Landlock and seccomp, prepared once and applied by every child.

    Landlock leaves to read: Python's standard library (not site-packages), the system's shared
    libraries, time zones and devices of random numbers; to write: /dev/null and the job's folder,
    whose files cannot be removed or linked, so that their sizes can be summed. seccomp allows the
    system calls of a computing process and kills the process at those of `KILLED`. Without a
    `folder` there is no Landlock: bubblewrap contains the launcher as a whole, and seccomp alone
    keeps files from being removed and linked. Raises OSError where the kernel lacks the means.
    """

    def __init__(self, folder: str | None) -> None:
        machine = platform.machine()
        if sys.platform != "linux" or machine not in ALLOWED or struct.calcsize("P") != 8:
            raise OSError(errno.ENOSYS, f"no protection is known for {sys.platform} on {machine}")
        self.abi, self.ruleset = 0, None
        if folder is not None:
            self._prepare_landlock(folder)
        code = seccomp_filter(machine)
        self._code = ctypes.create_string_buffer(code, len(code))
        header = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(self._code))
        self._program = ctypes.create_string_buffer(header, len(header))

    def _prepare_landlock(self, folder: str) -> None:
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
        for path in DEVICES:
            self._permit(path, READ_FILE | READ_DIR)
        for path in map(os.path.realpath, LIBRARIES):
            inside = os.listdir(path) if os.path.isdir(path) else []
            kept = [os.path.join(path, name) for name in inside if not name.startswith("python")]
            # Entry by entry where a rule for the whole would hold for packages of a Python below.
            for one in [path] if len(kept) == len(inside) else kept:
                with contextlib.suppress(OSError):  # a link in a circle, say
                    self._permit(one, READ_FILE | READ_DIR)
        self._permit("/dev/null", READ_FILE | WRITE_FILE | TRUNCATE)
        self._permit(folder, READ_FILE | READ_DIR | WRITE_FILE | MAKE_REG | TRUNCATE)
        library = os.path.dirname(os.__file__)
        self._permit(library, READ_DIR)
        for name in os.listdir(library):
            if name not in INSTALLED:
                self._permit(os.path.join(library, name), READ_FILE | READ_DIR)

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

    def apply(self) -> None:
        """Restricts this process, irrevocably."""
        _checked(_prctl(PR_SET_NO_NEW_PRIVS, 1), "no_new_privs")
        if self.ruleset is not None:
            _checked(_LIBC.syscall(446, self.ruleset, 0), "landlock_restrict_self")
            os.close(self.ruleset)
        program = ctypes.c_ulong(ctypes.addressof(self._program))
        _checked(_LIBC.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), program, 0, 0), "seccomp")


def give_up_root() -> None:
    """Drops groups and capabilities; a process of root changes to the user nobody."""
    if sys.platform == "linux":
        for capability in range(64):
            if _prctl(PR_CAPBSET_DROP, capability) < 0:
                break  # an ordinary user has none to drop
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if sys.platform == "linux":
        header, none = struct.pack("<Ii", 0x20080522, 0), bytes(24)
        _checked(_LIBC.capset(header, none), "capset")


def die_with(parent: int) -> None:
    """Lets the kernel kill this process when its parent ends. Call it after a change of user."""
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def limit(limits: dict[str, Any]) -> None:
    """Sets those of `Limits` (sandbox/host.py) that the kernel enforces."""
    seconds = limits["seconds"]  # processor time; the runner watches the wall clock
    # SIGXCPU first, which a status shows. The SIGKILL for a process that ignores it comes so much
    # later that the time used, reported some per cent below what counts here, exceeds the limit.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + max(1, seconds // 3)))
    bounds = {
        "RLIMIT_AS": limits["memory_mb"] * 2**20,
        "RLIMIT_FSIZE": limits["file_kb"] * 1024,
        "RLIMIT_NOFILE": limits["open_files"],
        # 1, not 0: a kernel that pipes core dumps to a handler starts it even with a limit of 0.
        "RLIMIT_CORE": 1,
        "RLIMIT_NPROC": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, bound in bounds.items():
        with contextlib.suppress(AttributeError):  # not every system has each
            resource.setrlimit(getattr(resource, name), (bound, bound))


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(*arguments: int) -> int:
    full = [*arguments, 0, 0, 0, 0][:5]
    return _LIBC.prctl(full[0], *(ctypes.c_ulong(one) for one in full[1:]))
