"""manifest.json: size and SHA-256 of every file of a folder."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from dylora.fields import is_whole_number, shown
from dylora.storage.safe_io import MAX_JSON, check_link, open_regular, read_json
from dylora.storage.tensors import MAX_FILE, check_archive, read_headers
from dylora.storage.text_hashes import HASHES_FILE, MAX_HASHES

MANIFEST = "manifest.json"
RUN_STATE = "trainer_state.json"  # listed in the checkpoint of a run, and there alone
_OF_RUNS = {"optimizer.pt", "scheduler.pt", "rng_state.pt", RUN_STATE}
OPTIONAL = {"bias_shifts.safetensors", "skill_library.safetensors", HASHES_FILE}
LOADED = {  # names of all files that a loader reads
    *OPTIONAL,
    *("config.json", "router.safetensors"),
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    *_OF_RUNS,
}
NOTES = {"README.md"}  # for readers, who may write on it

_LARGE = 64 << 20  # bytes, hashed in a twentieth of a second
_CHECKPOINT = re.compile(r"checkpoint-\d+/")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def write_manifest(folder: Path) -> None:
    """manifest.json: size and SHA-256 of every file below the folder but notes."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hash_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOTES
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def verify(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing, has changed, or came in later.

    Notes of others may lie beside ours; a file that a loader would read may not. Sizes and links
    are looked at before anything is hashed. A manifest is proof against accidents; whoever writes
    the files can write one that fits, so what they hold is checked where it is read.
    """
    for name, what in integrity_errors(folder):
        raise ValueError(f"{folder / name} {what}")


def integrity_errors(folder: Path) -> Iterator[tuple[str, str]]:
    """Each file that `verify` finds wrong, relative to the folder, and what is wrong with it.

    Raises ValueError where the manifest itself is of no use.
    """
    listed = listed_files(folder)
    # transformers' Trainer puts files of these names beside a mixture, which only a run's resume
    # would read.
    read = LOADED if RUN_STATE in listed else LOADED - _OF_RUNS
    for path in entries(folder):
        name = path.relative_to(folder).as_posix()
        if _CHECKPOINT.match(name):  # a Trainer saves its last beside them
            continue
        if path.name in read and name not in listed:
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


def is_intact(folder: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
    try:
        verify(folder)
    except (ValueError, OSError):
        return False
    return True


def is_run_checkpoint(folder: Path) -> bool:
    """Whether a mixture is the checkpoint of a run, with all that it needs to go on."""
    return RUN_STATE in listed_files(folder)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed_files(folder: Path) -> dict[str, dict[str, Any]]:
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
    most = MAX_HASHES if path.name == HASHES_FILE else MAX_JSON if path.suffix == ".json" else size
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, but may have {most:,}")
    if path.suffix == ".safetensors" and size > _LARGE:
        read_headers(path)
    if path.suffix == ".pt" and size > _LARGE:
        check_archive(path)


def entries(folder: Path) -> Iterator[Path]:
    """Every file below a folder, links to folders not followed.

    Raises ValueError for one that leads outside: a loader would follow it.
    """
    for parent, folders, files in os.walk(folder):
        for name in folders:
            check_link(Path(parent, name), folder)
        yield from (Path(parent, name) for name in sorted(files))
