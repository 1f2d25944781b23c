"""The command prefix that starts the launcher in bubblewrap, for kernels without Landlock.

Inside are Python's standard library and the system's shared libraries to read, four devices, and a
file system in memory to write to; no /proc, no network, no other process.
"""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from dylora.sandbox.launcher.files import DEVICES, INSTALLED, LIBRARIES

# For changing to the user nobody, and for ending its processes and removing its files.
_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "KILL", "SETGID", "SETPCAP", "SETUID")


class CommandPrefix(NamedTuple):
    """How to start a process inside bubblewrap."""

    name: str  # for the results
    command: list[str]  # comes before the process's own command
    folder: str  # the only writable folder inside


def build(*inside: str) -> CommandPrefix:
    """The prefix for a process that may also read the paths `inside`, under their own names.

    Raises OSError where bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("there is no bwrap (package bubblewrap)")
    name = subprocess.run([program, "--version"], capture_output=True, text=True).stdout.strip()
    # Exists inside only: a bwrap that does not isolate finds no such folder to write to.
    folder = str(Path(tempfile.gettempdir(), f"dylora-{secrets.token_hex(8)}"))
    library = os.path.dirname(os.__file__)
    prefix = os.path.join(sys.base_prefix, "lib")
    options = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    options += ["--unshare-cgroup-try"]
    if os.geteuid() == 0:  # root stays root inside: the launcher changes to the user nobody
        options += [word for one in _CAPABILITIES for word in ("--cap-add", f"CAP_{one}")]
    else:
        options += ["--unshare-user"]
    paths = dict.fromkeys((*LIBRARIES, prefix, library, os.path.realpath(sys.executable)))
    folders = {Path(path) for path in paths if not os.path.islink(path)}
    paths = [path for path in paths if not folders & set(Path(path).parents)]
    # Parents that bubblewrap itself makes would have the child's mode, closed to the user nobody.
    above = {str(one) for path in (*paths, *inside) for one in Path(path).parents}
    options += [word for path in sorted(above - {"/"}) for word in ("--dir", path)]
    for path in paths:
        if os.path.islink(path):  # /lib, where everything lies in /usr
            options += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            options += ["--ro-bind", path, path]
    parents = (library, "/usr/lib/python3")
    hidden = [os.path.join(parent, name) for parent in parents for name in INSTALLED]
    hidden = [path for path in hidden if os.path.isdir(path)]
    options += [word for path in hidden for word in ("--tmpfs", path)]
    options += [word for path in inside for word in ("--ro-bind", path, path)]
    for device in ("/dev/null", *DEVICES):
        options += ["--dev-bind", device, device]
    options += ["--tmpfs", folder, "--chdir", folder]
    options += [word for path in (*hidden, "/") for word in ("--remount-ro", path)]
    return CommandPrefix(name, [program, *options, "--"], folder)
