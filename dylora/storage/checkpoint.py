"""Folders that are either whole or absent.

A folder is written under a temporary name, every file is hashed into manifest.json and flushed to
the disk, and one rename makes it appear. A reader verifies the manifest.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dylora.storage.peft_format import read_json

FORMAT_VERSION = 2  # of a mixture's config.json
MANIFEST = "manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 20
_DESCRIBED = ["base_model_name_or_path", "base_revision", "quantization"]
_DESCRIBED += ["moe", "experts", "training"]


def write_folder(folder: Path, write_files: Callable[[Path], None]) -> None:
    """Let `write_files` fill a temporary folder, then rename it to `folder`.

    An older folder of that name is replaced if it holds a manifest, or nothing.
    Raises FileExistsError if it holds something else.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    replaced = folder.with_name(f".{folder.name}.replaced")
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)  # a crash came between the two renames below
    if not _may_replace(folder):
        raise FileExistsError(f"{folder} exists and is no checkpoint of ours: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (temporary, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        write_files(temporary)
        write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
    except BaseException:
        shutil.rmtree(temporary)  # a disk that is full stays full otherwise
        raise
    if folder.exists():
        folder.rename(replaced)
    temporary.rename(folder)
    _flush(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def write_manifest(folder: Path) -> None:
    """manifest.json: size and SHA-256 of every file below the folder."""
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def verify(folder: Path) -> None:
    """Raises ValueError naming the first file that is missing or has changed."""
    for name, expected in _listed_files(folder).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != expected["size"] or hash_file(path) != expected["sha256"]:
            raise ValueError(f"{path} has changed since it was written")


def is_whole(folder: Path) -> bool:
    """Whether `verify` finds nothing wrong."""
    try:
        verify(folder)
    except ValueError:
        return False
    return True


def read_description(folder: Path) -> dict[str, Any]:
    """config.json of a verified folder. Raises ValueError for another format version."""
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    verify(folder)
    description = read_json(folder / "config.json")
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{folder}/config.json has format_version {description.get('format_version')!r}; "
            f"this version reads {FORMAT_VERSION}"
        )
    for key in _DESCRIBED:
        if key not in description:
            raise ValueError(f"{folder}/config.json: {key!r} is missing")
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
        except ValueError as error:
            report(f"skipped {path}: {error}")
        else:
            return path
    raise FileNotFoundError(f"no whole checkpoint under {run_folder}: nothing to resume from")


def prune(run_folder: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one; damaged ones stay."""
    for path in [path for path in checkpoints(run_folder) if is_whole(path)][:-keep]:
        if best is None or path.name != best.name:
            shutil.rmtree(path)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file. Raises ValueError where it says nothing of use."""
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is no whole checkpoint: it has no {MANIFEST}")
    files = read_json(folder / MANIFEST).get("files")
    if not (
        isinstance(files, dict)
        and files
        and all(isinstance(e, dict) and {"size", "sha256"} <= set(e) for e in files.values())
    ):
        raise ValueError(f"{folder / MANIFEST} lists no files with their size and sha256")
    return files


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


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
