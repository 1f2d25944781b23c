"""Folders that are either whole or absent.

A folder is written under a temporary name, every file is hashed into manifest.json and flushed to
the disk, one rename makes it appear, and it is read back before anything older is deleted. A reader
verifies the manifest. Beside checkpoint-<step> a run's folder may hold, for a moment or after a
crash: .checkpoint-<step>.writing, .replaced and .removing, which `recover` settles.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from dylora.storage.manifest import (
    MANIFEST,
    NOTES,
    OPTIONAL,
    is_intact,
    is_run_checkpoint,
    listed_files,
    verify,
    write_manifest,
)
from dylora.storage.schema import ADAPTERS

PREFLIGHT = "checkpoint-rehearsal"  # written and deleted before the first step
FEWEST_KEPT = 2  # a single checkpoint is lost with the first bit that flips in it
STAGING = ".staged"  # within a folder of exported experts, while they are written
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_EXPERT = re.compile(r"expert_\d+")


def write_folder(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Let `write_files` fill a temporary folder, then rename it to `folder`.

    An older folder of that name is replaced if it is of ours, or empty; `check_place` is for what a
    user names. Raises FileExistsError if it holds something else.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    replaced = _replaced(folder)
    _recover(folder)
    _require_ours(folder)
    _make_parents(folder)
    _fill(temporary, write_files)
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    _flush(folder.parent)
    _recover(folder, always=True)


def write_into_folder(folder: Path, write_files: Callable[[Path], None]) -> None:
    """As `write_folder`, but what others have put into the folder stays where it is.

    Others may write into a folder that exists meanwhile. There the manifest comes last: after a
    crash before it, nothing verifies. Raises FileExistsError for the checkpoint of a run.
    """
    if not folder.exists():
        write_folder(folder, write_files)
        return
    if (folder / MANIFEST).exists() and is_run_checkpoint(folder):
        raise FileExistsError(f"{folder} is a run's checkpoint, which is not replaced")
    fresh = folder / "_writing"  # transformers' Trainer uploads no name that begins so
    _fill(fresh, write_files)
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in OPTIONAL:  # of what was there before: listed no more, it would not verify
        (folder / name).unlink(missing_ok=True)
    for path in sorted(fresh.iterdir(), key=lambda path: path.name == MANIFEST):
        old = folder / path.name
        if old.is_dir():
            shutil.rmtree(old)
        if path.name in NOTES and old.exists():  # a card that a trainer has written
            path.unlink()
        else:
            path.replace(old)
    _flush(folder)
    fresh.rmdir()
    verify(folder)


def check_place(folder: Path, *, overwrite: bool = False, over_mixture: bool = False) -> None:
    """Raises FileExistsError unless what a user makes may be put there.

    An absent or empty folder is filled. An earlier result of ours is replaced with `overwrite`; a
    mixture only with `over_mixture` besides; a training checkpoint, or a part of a mixture, never.
    """
    for parent in folder.resolve().parents:
        if _is_mixture(parent):
            raise FileExistsError(
                f"{folder} lies in the checkpoint {parent}, which would not verify any more: "
                "name a folder outside"
            )
    if (folder / "trainer_state.json").exists() or (_is_mixture(folder) and not over_mixture):
        raise FileExistsError(f"{folder} is a checkpoint, which is not replaced: name another")
    _require_ours(folder)
    if not overwrite and folder.exists() and any(path.name != STAGING for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds an earlier result: name another folder, or replace it with "
            "--overwrite (overwrite=True)"
        )


def write_file(file: Path, text: str) -> None:
    """A text file that is the old one or the new one, whatever happens meanwhile."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def quarantine(folder: Path, why: str) -> Path:
    """Rename a folder to <name>.<why>, with a number where that is taken; returns the new name."""
    target, count = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{why}-{count}")
    folder.rename(target)
    _flush(folder.parent)
    return target


def recover(run_folder: Path) -> None:
    """Settle what crashes have left: half-written, half-replaced and half-removed folders.

    Only for the process that holds the run's lock: another one's save would look half-written.
    """
    remove_rehearsal(run_folder)
    for leftover in (".checkpoint-*.writing", ".checkpoint-*.removing"):
        for path in run_folder.glob(leftover):
            shutil.rmtree(path)
    for path in run_folder.glob(".checkpoint-*.replaced"):
        _recover(path.with_name(path.name.removeprefix(".").removesuffix(".replaced")))


def remove_rehearsal(run_folder: Path) -> None:
    """Take away the save of before the first step, also where it was put aside as damaged."""
    for leftover in (PREFLIGHT, f"{PREFLIGHT}.damaged*"):
        for path in run_folder.glob(leftover):
            shutil.rmtree(path)


def checkpoints(run_folder: Path) -> list[Path]:
    """The folders checkpoint-<step>, by step."""
    found = [
        (int(match[1]), path)
        for path in run_folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(
    run_folder: Path, report: Callable[[str], None], first: Path | None = None
) -> tuple[Path, list[Path]]:
    """The newest checkpoint that verifies, or `first`; says which it skipped and why.

    Returns those skipped as well. Raises FileNotFoundError when there is none.
    """
    skipped = []
    for path in dict.fromkeys([*filter(None, [first]), *reversed(checkpoints(run_folder))]):
        try:
            verify(path)
        except (ValueError, OSError) as error:
            report(f"skipped {path}: {error}")
            skipped.append(path)
        else:
            return path, skipped
    raise FileNotFoundError(f"no whole checkpoint under {run_folder}: nothing to resume from")


def rotate(run_folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one; damaged ones stay.

    At least FEWEST_KEPT are kept. A folder loses its name before it loses its files, so that a
    crash leaves no half of a checkpoint.
    """
    whole = [path for path in checkpoints(run_folder) if is_intact(path)]
    for path in whole[: -max(keep, FEWEST_KEPT)]:
        if best is None or path.name != best.name:
            removing = path.with_name(f".{path.name}.removing")
            path.rename(removing)
            shutil.rmtree(removing)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _fill(temporary: Path, write_files: Callable[[Path], None]) -> None:
    """Let `write_files` fill a folder that is whole and on the disk afterwards, or is not there.

    Raises OSError where it cannot be written, for which safetensors has an error of its own.
    """
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        write_files(temporary)
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a disk that is full stays full otherwise
        if isinstance(error, SafetensorError):
            raise OSError(f"{temporary} could not be written: {error}") from error
        raise


def _require_ours(folder: Path) -> None:
    if not _is_ours(folder):
        raise FileExistsError(f"{folder} exists and is no result of ours: name another folder")


def _is_ours(folder: Path) -> bool:
    """Whether a folder is absent, empty, with a manifest of ours, or of experts that have one."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    inner = [path for path in folder.iterdir() if path.name != STAGING]
    if all(_EXPERT.fullmatch(path.name) and (path / MANIFEST).exists() for path in inner):
        return all(map(_is_ours, inner))
    try:
        listed_files(folder)  # many other tools call a file of theirs manifest.json
    except ValueError:
        return False
    return True


def _is_mixture(folder: Path) -> bool:
    return (folder / ADAPTERS).is_dir() and (folder / MANIFEST).exists()


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _recover(folder: Path, *, always: bool = False) -> None:
    """Decide between a folder and the older one it replaces: the newer if it verifies.

    A crash may have come between the two renames, or before the newer one was read back; `always`
    reads it back where it replaces nothing, too.
    Raises what `verify` does, after putting the damaged one aside, where it was just written.
    """
    replaced = _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    elif always or (replaced.exists() and _is_ours(folder)):
        try:
            verify(folder)
        except (ValueError, OSError):
            quarantine(folder, "damaged")
            if replaced.exists():
                replaced.rename(folder)
            if always:
                raise
            return
        if replaced.exists():
            shutil.rmtree(replaced)


def _make_parents(folder: Path) -> None:
    """The folder's parent, and the entries that lead to it, on the disk."""
    missing = [path for path in folder.parents if not path.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _flush(path.parent)


def _flush(path: Path) -> None:
    """On the disk, and out of memory where the system allows it: reading it back reads the disk."""
    if sys.platform == "win32" and path.is_dir():  # cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
