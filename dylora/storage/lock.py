"""One writer per folder: a lock that dies with its process, however that ends."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = "trainer.lock"


@contextlib.contextmanager
def lock_folder(folder: Path, option: str = "--name") -> Iterator[None]:
    """Hold `folder`, which is made; what is made and ends up empty is taken away again.

    `option` is the one of the command line that names another folder.

    The kernel lets go of the lock when the process ends, so a killed one leaves nothing to clean.
    Raises FileExistsError, naming the process, when another one holds it, and ValueError on a file
    system without locks and for what is no folder or cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file, option)
    except OSError as error:
        if error.errno is None:  # of `_acquire`, in words
            raise
        raise ValueError(
            f"{folder} cannot be written ({error.filename}: {error.strerror}): give another "
            f"{option}, or make it a folder that can be"
        ) from error
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(descriptor)
        with contextlib.suppress(PermissionError):  # there another process may have opened it since
            file.unlink(missing_ok=True)
        if sys.platform != "win32":
            os.close(descriptor)
        for path in made:
            with contextlib.suppress(OSError):  # it holds a run, as it should
                path.rmdir()


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another process holds it."""
    if sys.platform == "win32":
        import msvcrt

        try:
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # others read what stands before that
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _acquire(file: Path, option: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
            # Whoever held it before may have removed the file between our two calls.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                os.truncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise FileExistsError(
                f"{file.parent} is in use by {holder or 'another process'}: wait for its "
                f"end, or give another {option}"
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise ValueError(
                f"{file} cannot be locked ({error.strerror}): give an --output_dir on a disk that "
                "has locks, or two trainers could write over each other"
            ) from None
        os.close(descriptor)
