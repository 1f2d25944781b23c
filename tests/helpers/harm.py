"""How good files are harmed, and how a refusal is held to its limits.

Whoever writes hostile files writes a manifest that fits them, and so does `seal`: it is the strict
loaders that have to find them, not the hashes. `refusal` makes the call under limits of memory and
time, and holds that nothing was written.
"""

import hashlib
import json
import os
import pickle
import resource
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dylora.storage.manifest import MANIFEST

ROOM = 512 << 20  # bytes of memory that a refusal may take beyond what the process has
SECONDS = 5.0  # of processor time: a guard against what grows or hangs, no measurement
HANG = 60  # seconds by the clock
GIB = 1 << 30
SECRET = "swordfish"  # what lies beside the folder and must not be read


# What is done to files


def in_json(*path: str | int, to: Any) -> Callable[[Path], None]:
    """Set a value of a JSON file; `to` may be JSON in bytes, or a function of the old value."""

    def damage(file: Path) -> None:
        tree = json.loads(file.read_text())
        inner = tree
        for key in path[:-1]:
            inner = inner[key]
        old = inner.get(path[-1]) if isinstance(inner, dict) else inner[path[-1]]
        inner[path[-1]] = "<here>" if isinstance(to, bytes) else to(old) if callable(to) else to
        text = json.dumps(tree).encode()
        file.write_bytes(text.replace(b'"<here>"', to) if isinstance(to, bytes) else text)

    return damage


def content(data: bytes) -> Callable[[Path], None]:
    return lambda file: replace(file, lambda: file.write_bytes(data))


def twice(key: str, value: str) -> Callable[[Path], None]:
    """The JSON object with one more entry at its end."""

    def damage(file: Path) -> None:
        text = file.read_text().rstrip().removesuffix("}")
        file.write_text(f'{text}, "{key}": {value}}}')

    return damage


def parquet(text: str | None, times: int, rows: int | None = None) -> Callable[[Path], None]:
    """Columns of some kilobytes that hold a text so many times, in as many rows or in lists."""

    def damage(file: Path) -> None:
        import pyarrow as pa
        from pyarrow.parquet import write_table

        texts = pa.array([text] if text else [], pa.string())
        codes = pa.array([0] * times, pa.int32()) if text else pa.nulls(times, pa.int32())
        column: Any = pa.DictionaryArray.from_arrays(codes, texts)
        if rows:
            column = pa.ListArray.from_arrays([0, times], column)
        write_table(pa.table({"question": column, "answer": column}), file, compression="zstd")
        assert file.stat().st_size < 2**20

    return damage


def sparse(size: int) -> Callable[[Path], None]:
    """A file that claims so many bytes and takes none on the disk."""
    return lambda file: os.truncate(file, size)


def pipe(file: Path) -> None:
    replace(file, lambda: os.mkfifo(file))


def folder(file: Path) -> None:
    replace(file, file.mkdir)


def link(target: str) -> Callable[[Path], None]:
    return lambda file: replace(file, lambda: file.symlink_to(target))


def moved_out(path: Path) -> None:
    """The file or folder lies beside the checkpoint, with a link in its place."""
    outside = next(p for p in path.parents if (p.parent / "secret").exists()).parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


def replace(file: Path, make: Callable[[], Any]) -> None:
    file.unlink()
    make()


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the header of a safetensors file and leave its data."""

    def damage(file: Path) -> None:
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return damage


def first(header: dict[str, Any], **changes: Any) -> None:
    header[min(header)].update(changes)


def header_text(text: bytes, length: int | None = None) -> Callable[[Path], None]:
    return content(struct.pack("<Q", len(text) if length is None else length) + text)


def vast_header(file: Path) -> None:
    header_text(b"{}", GIB)(file)
    os.truncate(file, 2 * GIB)


def doubled_name(file: Path) -> None:
    """Both entries of the header have one name: readers take the first or the last."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = min(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])


def in_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = {key: value.clone() for key, value in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return damage


def fill(name: str, value: float) -> Callable[[Path], None]:
    """One number of the first tensor whose name ends so."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(key for key in tensors if key.endswith(name))].view(-1)[0] = value

    return in_tensors(change)


def as_type(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = min(key for key in tensors if key.endswith(name))
        tensors[key] = tensors[key].to(dtype)

    return in_tensors(change)


def in_state(*path: Any, to: Any) -> Callable[[Path], None]:
    """Set a value of a file of torch.save; `to` may be a function of the old value. `...` in the
    path is the first key."""

    def damage(file: Path) -> None:
        state = torch.load(file, weights_only=True)
        inner = state
        steps = list(path)
        for step in steps[:-1]:
            inner = inner[min(inner) if step is ... else step]
        old = inner.get(steps[-1]) if isinstance(inner, dict) else inner[steps[-1]]
        inner[steps[-1]] = to(old) if callable(to) else to
        torch.save(state, file)

    return damage


def saved(value: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda file: torch.save(value(), file)


class Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def in_archive(change: Callable[[bytes], bytes], **options: Any) -> Callable[[Path], None]:
    """Write an archive of torch.save again with another pickle, or compressed."""

    def damage(file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            records = [(r.filename, archive.read(r)) for r in archive.infolist()]
        with zipfile.ZipFile(file, "w", **options) as archive:
            for name, data in records:
                archive.writestr(name, change(data) if name.endswith("/data.pkl") else data)

    return damage


def claims_more(file: Path) -> None:
    """Four numbers of which the pickle says that they are 2^28."""
    torch.save({"a": torch.ones(4)}, file)
    many = b"J" + struct.pack("<i", 1 << 28)
    in_archive(lambda program: program.replace(b"K\x04", many))(file)


def second_pickle(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}, protocol=2))


def shared_lists(file: Path) -> None:
    """8^14 items by reference, in a kilobyte; what they are in is that of a state of generators."""
    shared = [1]
    for _ in range(14):
        shared = [shared] * 8
    torch.save({"cuda": shared}, file)


def tuples_for_a_key(file: Path) -> None:
    """A mapping whose key takes 2^38 hashes."""
    program = b"\x80\x02}K\x01K\x02\x86q\x01"
    for index in range(2, 40):
        program += bytes([*b"h", index - 1, *b"h", index - 1, *b"\x86q", index])
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", program + b"K\x01s.")
        archive.writestr("archive/version", "3\n")


def one_number(file: Path) -> None:
    """A tensor of 8 GiB that stores four bytes."""
    torch.save({"k": torch.zeros(1).expand(4, GIB // 2)}, file)


def seal(checkpoint: Path) -> None:
    """A manifest that fits the files; of what is no file, or too large to hash, as it can."""
    entries = {}
    old = json.loads((checkpoint / MANIFEST).read_text())["files"]
    for name in old:
        path = checkpoint / name
        if path.is_file():
            size = path.stat().st_size
            digest = "0" * 64
            if size < GIB // 8:
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
            entries[name] = {"size": size, "sha256": digest}
        elif path.exists():
            entries[name] = {"size": path.stat().st_size, "sha256": "0" * 64}
    (checkpoint / MANIFEST).write_text(json.dumps({"files": entries}))


# The call


def refusal(call: Callable[[], Any], tree: Path) -> str:
    """The one line of a user's error that the call must end with, within limits of memory,
    processor time and clock, and with everything below `tree` as it was."""
    before = snapshot(tree)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    old = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(HANG)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    begun = time.process_time()
    try:
        call()
        message = None
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    finally:
        spent = time.process_time() - begun
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert message is not None, "nothing was refused"
    assert spent < SECONDS, f"{spent:.2f} s: {message}"
    assert len(message) < 1000, message[:1000]
    assert snapshot(tree) == before
    return message


def snapshot(tree: Path) -> dict[str, Any]:
    """Names, kinds, sizes, targets of links, and the content of what is small."""
    found = {}
    for parent, folders, files in os.walk(tree):
        for name in (*folders, *files):
            path = Path(parent, name)
            about = path.lstat()
            small = path.is_file() and about.st_size < 1 << 20
            target = os.readlink(path) if path.is_symlink() else None
            data = path.read_bytes() if small and target is None else None
            found[str(path.relative_to(tree))] = (about.st_mode, about.st_size, target, data)
    return found


def _hangs(*_: Any) -> None:
    raise AssertionError(f"still at it after {HANG} seconds")
