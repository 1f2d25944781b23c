"""Which system calls a program may make, and the seccomp filter that enforces it."""

import errno
import struct
from collections.abc import Sequence

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
"""System calls that run, a few with some arguments only (`seccomp_filter`). Others get EPERM."""

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
"""System calls that no ordinary program needs: it is killed, and the outcome is a violation."""
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
