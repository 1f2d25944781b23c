"""Untrusted files: what is opened, how much of it is read, and JSON without ambiguities.

A folder that somebody sends may hold a pipe (opening it waits for ever), a link that leads out of
it, a file that claims to be larger than memory, or JSON that two readers understand differently.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any

from dylora.fields import is_whole_number, shown

MAX_JSON = 8 << 20  # bytes, read in 2 s at the worst; a row of the table of experts has 300
_PART = 1 << 20  # bytes read at once
MAX_RATIO, FREE_EXPANSION = 1000, 64 << 20
MAX_DEPTH = 64  # of lists and mappings in one another
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(file: Path, limit: int | None = None) -> BufferedReader:
    """A file opened for reading bytes, if it is an ordinary one of at most `limit` bytes.

    Raises ValueError for a folder, a pipe, a device, a socket, a larger file or one that cannot be
    read; FileNotFoundError when it is missing.
    """
    try:
        _require_regular(file, os.stat(file).st_mode)  # to open a device may already do something
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    stream = open(descriptor, "rb")  # noqa: SIM115 - the caller closes it
    try:
        opened = os.fstat(descriptor)
        _require_regular(file, opened.st_mode)  # it may be another one by now
        if limit is not None and opened.st_size > limit:
            raise ValueError(f"{file} has {opened.st_size:,} bytes, but may have {limit:,}")
    except ValueError:
        stream.close()
        raise
    return stream


def read_bytes(file: Path, limit: int) -> bytes:
    """All of an ordinary file of at most `limit` bytes. Raises as `open_regular`."""
    with open_regular(file, limit) as stream:
        content = bytearray()  # in parts, as `read` makes room for all that it may give
        while part := stream.read(min(_PART, limit + 1 - len(content))):
            content += part
    if len(content) > limit:  # it has grown, or lies about its size as those in /proc do
        raise ValueError(f"{file} has more than {limit:,} bytes")
    return bytes(content)


def expansion_bound(file: Path) -> int:
    """Bytes that the content of a file may come to, for what it takes on the disk.

    No text shrinks to a thousandth by itself; what does was made to, or has holes.
    """
    about = os.stat(file)
    stored = about.st_blocks * 512 if hasattr(about, "st_blocks") else about.st_size
    return MAX_RATIO * stored + FREE_EXPANSION


def check_link(file: Path, folder: Path) -> None:
    """Raises ValueError when links lead from `file` out of `folder`.

    The hub's cache is let through: there snapshots/<commit>/<file> is a link into blobs/ beside
    snapshots/.
    """
    if "\0" in str(file):
        raise ValueError(f"{str(file)!r} is no name of a file")
    home, target = os.path.realpath(folder), os.path.realpath(file)
    if os.path.commonpath([home, target]) == home:
        return
    for parent in Path(os.path.abspath(file)).parents:
        blobs = os.path.join(os.path.realpath(parent.parent), "blobs")
        if parent.name == "snapshots" and os.path.dirname(target) == blobs:
            return
    raise ValueError(f"{file} is a link that leads out of its folder, to {target}: copy that there")


def require_followable(name: str, named_by: Path) -> None:
    """Raises ValueError for the name of a base that `named_by` gives, where no user does, and that
    is an address or leads out of the working directory.

    An untrusted file may name an embedded base, one of the hub, or a folder of this machine.
    """
    if "://" in name or name.startswith("~") or ".." in PurePath(name).parts:
        raise ValueError(
            f"{named_by} names the base {shown(name)}, an address or a path that leads out of "
            "here, which is not followed: if you mean it, give it as base= or --base"
        )


def read_json(file: Path, *, infinite: bool = False) -> dict[str, Any]:
    """A JSON object, read strictly; with `infinite` its numbers may be Infinity.

    Raises ValueError naming the file for anything larger than MAX_JSON, deeper than MAX_DEPTH, with
    a key twice or with NaN, and for a link out of the file's folder; FileNotFoundError when
    missing.
    """
    check_link(file, file.parent)
    content = parse_json(read_bytes(file, MAX_JSON), str(file), infinite=infinite)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is no row with a step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and is_whole_number(row.get("step")) else None


Checks = Mapping[str, Callable[[Any], bool]]


def require_keys(
    file: Path, where: str, found: Any, checks: Checks, optional: Checks = MappingProxyType({})
) -> None:
    """Raises ValueError unless `found` has exactly these keys, each with a value of its kind.

    where: path of `found` in the file, with a dot at its end.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {where.rstrip('.')} is {shown(found)}, not an object")
    for key in checks.keys() - found.keys():
        raise ValueError(f"{file}: {where}{key} is missing")
    for key in found.keys() - checks.keys() - optional.keys():
        raise ValueError(f"{file}: {where}{shown(key)} is not known to this version")
    for key, is_right in {**checks, **optional}.items():
        if key in found and not is_right(found[key]):
            raise ValueError(f"{file}: {where}{key} is {shown(found[key])}, which is invalid")


def parse_json(data: bytes, where: str, *, infinite: bool = False) -> Any:
    """JSON of one meaning. Raises ValueError that begins with `where`."""

    def constant(name: str) -> float:
        if name == "NaN" or not infinite:
            raise ValueError(f"{name} is no number in JSON")
        return float(name)

    try:
        value = json.loads(data, parse_constant=constant, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:  # ValueError: of syntax, UTF-8 or long numbers
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{where}: more than {MAX_DEPTH} lists and mappings in one another")
        level = [x for item in level for x in (item.values() if type(item) is dict else item)]
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook of json: the mapping. Raises ValueError for a key that stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands twice")
            seen.add(key)
    return found


def _require_regular(file: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"{file} is {_KINDS[stat.S_IFMT(mode)]}, not a file")
