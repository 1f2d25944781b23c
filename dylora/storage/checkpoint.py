"""Folders that are either whole or absent.

A folder is written under a temporary name, every file is hashed into manifest.json and flushed to
the disk, one rename makes it appear, and it is read back before anything older is deleted. A reader
verifies the manifest. Beside checkpoint-<step> a run's folder may hold, for a moment or after a
crash: .checkpoint-<step>.writing, .replaced and .removing, which `tidy` settles.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from dylora.bounded import (
    MAX_JSON,
    check_link,
    is_whole_number,
    open_regular,
    read_json,
    shown,
)
from dylora.storage.description import check_description
from dylora.storage.tensor_files import MAX_FILE, check_archive, read_headers

MANIFEST = "manifest.json"
REHEARSAL = "checkpoint-rehearsal"  # written and deleted before the first step
LOADED = {  # names of all files that a loader reads
    *("config.json", "router.safetensors", "bias_shifts.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pt", "trainer_state.json"),
}
FEWEST_KEPT = 2  # a single checkpoint is lost with the first bit that flips in it
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 20
_LARGE = 64 << 20  # bytes, hashed in a twentieth of a second
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_folder(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Let `write_files` fill a temporary folder, then rename it to `folder`.

    An older folder of that name is replaced if it holds a manifest, or nothing.
    Raises FileExistsError if it holds something else.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    replaced = _replaced(folder)
    _recover(folder)
    check_place(folder)
    _make_parents(folder)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        write_files(temporary)
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a disk that is full stays full otherwise
        raise
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    _flush(folder.parent)
    _recover(folder, always=True)


def check_place(folder: Path) -> None:
    """Raises FileExistsError unless `write_folder` may put a folder there."""
    if not _may_replace(folder):
        raise FileExistsError(f"{folder} exists and is no checkpoint of ours: name another folder")


def write_file(file: Path, text: str) -> None:
    """A text file that is the old one or the new one, whatever happens meanwhile."""
    temporary = file.with_name(f".{file.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        temporary.rename(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder to <name>.<why>, with a number where that is taken; returns the new name."""
    target, count = folder.with_name(f"{folder.name}.{why}"), 1
    while target.exists():
        count += 1
        target = folder.with_name(f"{folder.name}.{why}-{count}")
    folder.rename(target)
    _flush(folder.parent)
    return target


def tidy(run_folder: Path) -> None:
    """Settle what crashes have left: half-written, half-replaced and half-removed folders.

    Only for the process that holds the run's lock: another one's save would look half-written.
    """
    for leftover in (".checkpoint-*.writing", ".checkpoint-*.removing", REHEARSAL):
        for path in run_folder.glob(leftover):
            shutil.rmtree(path)
    for path in run_folder.glob(".checkpoint-*.replaced"):
        _recover(path.with_name(path.name.removeprefix(".").removesuffix(".replaced")))


def write_manifest(folder: Path) -> None:
    """manifest.json: size and SHA-256 of every file below the folder."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def verify(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing, has changed, or came in later.

    Notes of others may lie beside ours; a file that a loader would read may not. Sizes and links
    are looked at before anything is hashed. A manifest is proof against accidents; whoever writes
    the files can write one that fits, so what they hold is checked where it is read.
    """
    for name, what in damage(folder):
        raise ValueError(f"{folder / name} {what}")


def damage(folder: Path) -> Iterator[tuple[str, str]]:
    """Each file that `verify` finds wrong, relative to the folder, and what is wrong with it.

    Raises ValueError where the manifest itself is of no use.
    """
    listed = _listed_files(folder)
    for path in _entries(folder):
        name = str(path.relative_to(folder))
        if path.name in LOADED and name not in listed:
            yield name, f"is not in {MANIFEST}: it came in later"
    sound = []
    for name, expected in listed.items():
        path = folder / name
        check_link(path, folder)
        if not path.is_file():
            yield name, "is no file" if path.exists() else "is missing"
        elif path.stat().st_size != expected["size"]:
            yield name, "has changed since it was written"
        else:
            if path.name in LOADED:
                _check_size(path, expected["size"])
            sound.append(name)
    for name in sound:
        if hash_file(folder / name) != listed[name]["sha256"]:
            yield name, "has changed since it was written"


def is_whole(folder: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
    try:
        verify(folder)
    except (ValueError, OSError):
        return False
    return True


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a verified folder, as far as its files bear it out.

    Raises ValueError for another format version, for a key or value that cannot be, and for a
    mixture larger than the folder's files: see `check_description`.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    verify(folder)
    description = read_json(folder / "config.json")
    check_description(folder, description)
    return description


def checkpoints(run_folder: Path) -> list[Path]:
    """The folders checkpoint-<step>, by step."""
    found = [
        (int(match[1]), path)
        for path in run_folder.glob("checkpoint-*")
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


def latest_checkpoint(run_folder: Path, report: Callable[[str], None]) -> Path:
    """The newest checkpoint that verifies; says which newer ones it skipped and why.

    Raises FileNotFoundError when there is none.
    """
    for path in reversed(checkpoints(run_folder)):
        try:
            verify(path)
        except (ValueError, OSError) as error:
            report(f"skipped {path}: {error}")
        else:
            return path
    raise FileNotFoundError(f"no whole checkpoint under {run_folder}: nothing to resume from")


def prune(run_folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one; damaged ones stay.

    At least FEWEST_KEPT are kept. A folder loses its name before it loses its files, so that a
    crash leaves no half of a checkpoint.
    """
    whole = [path for path in checkpoints(run_folder) if is_whole(path)]
    for path in whole[: -max(keep, FEWEST_KEPT)]:
        if best is None or path.name != best.name:
            removing = path.with_name(f".{path.name}.removing")
            path.rename(removing)
            shutil.rmtree(removing)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file. Raises ValueError where it says nothing of use."""
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is no whole checkpoint: it has no {MANIFEST}")
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{folder / MANIFEST} lists no files with their size and sha256")
    for name, entry in files.items():
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{folder / MANIFEST}: {shown(name)} lies outside the folder")
        if not (
            isinstance(entry, dict)
            and is_whole_number(entry.get("size"), 0, MAX_FILE)
            and isinstance(entry.get("sha256"), str)
            and _SHA256.fullmatch(entry["sha256"])
        ):
            raise ValueError(
                f"{folder / MANIFEST}: {shown(name)} has {shown(entry)}, but needs a size of at "
                f"most {MAX_FILE:,} bytes and a sha256"
            )
    return files


def _check_size(path: Path, size: int) -> None:
    """Raises ValueError for what a loader would refuse, where to hash it first would take long."""
    if path.suffix == ".json" and size > MAX_JSON:
        raise ValueError(f"{path} has {size:,} bytes, but may have {MAX_JSON:,}")
    if path.suffix == ".safetensors" and size > _LARGE:
        read_headers(path)
    if path.suffix == ".pt" and size > _LARGE:
        check_archive(path)


def _entries(folder: Path) -> Iterator[Path]:
    """Every file below a folder, links to folders not followed.

    Raises ValueError for one that leads outside: a loader would follow it.
    """
    for parent, folders, files in os.walk(folder):
        for name in folders:
            check_link(Path(parent, name), folder)
        yield from (Path(parent, name) for name in sorted(files))


def _may_replace(folder: Path) -> bool:
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        _listed_files(folder)  # many other tools call a file of theirs manifest.json
    except ValueError:
        return False
    return True


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
    elif always or (replaced.exists() and _may_replace(folder)):
        try:
            verify(folder)
        except (ValueError, OSError):
            set_aside(folder, "damaged")
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
