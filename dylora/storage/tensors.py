"""Files of tensors, looked at before they are loaded: safetensors, and torch.save's archives.

What a header claims is held against the file's size before anything is allocated. An archive of
torch.save holds a pickle; it is read by torch.load(weights_only=True) only after its program has
been found to name nothing but tensors.
"""

import io
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dylora.fields import shown
from dylora.storage.safe_io import MAX_DEPTH, check_link, open_regular, parse_json

MAX_FILE = 32 << 30  # bytes of one file of tensors
MAX_HEADER = 16 << 20  # bytes that name 100,000 tensors
MAX_PICKLE = 32 << 20  # and as many moments; of an archive's table of contents likewise
_TYPES = ("F16", "BF16", "F32", "F64")
_NAMED = {  # what the pickles of `training/resume.py` name, and those of adapters in older files
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2"),
    *("torch FloatStorage", "torch DoubleStorage", "torch LongStorage", "torch ByteStorage"),
    *("torch HalfStorage", "torch BFloat16Storage", "torch._utils _rebuild_parameter"),
}
_MALFORMED = (  # torch's reader, zipfile and pickletools raise them all over broken files
    *(pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, AssertionError, OSError),
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, struct.error),
)
MAX_EXPANSION = 4  # times its file: tied weights are written once
_END_OF_ARCHIVE = 22 + 20 + 56  # bytes of the three records that end an archive of torch.save


class Header(NamedTuple):
    """What a safetensors file says of a tensor."""

    dtype: str  # F16, BF16, F32 or F64
    shape: tuple[int, ...]


def read_headers(file: Path) -> dict[str, Header]:
    """Names, dtypes and shapes in a safetensors file, without reading a tensor.

    Raises ValueError naming the file for anything but floating tensors that lie one after the other
    and fill it; FileNotFoundError when it is missing.
    """
    check_link(file, file.parent)
    with open_regular(file, MAX_FILE) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{file}: not a readable safetensors file (it has {size:,} bytes and claims a "
                f"header of {length:,})"
            )
        content = parse_json(stream.read(length), f"{file}: the header")
    if not isinstance(content, dict):
        raise ValueError(f"{file}: the header is not a JSON object")
    for name, entry in content.items():
        known = {"dtype", "shape", "data_offsets"}
        if name != "__metadata__" and not (isinstance(entry, dict) and entry.keys() == known):
            raise ValueError(f"{file}: {shown(name)} has not dtype, shape and data_offsets alone")
    try:
        with safe_open(file, "pt") as opened:
            slices = {n: opened.get_slice(n) for n in content if n != "__metadata__"}
            headers = {n: Header(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, MemoryError) as error:
        raise _unreadable(file, error) from error
    for name, header in headers.items():
        if header.dtype not in _TYPES:
            raise ValueError(
                f"{file}: {shown(name)} is of type {header.dtype}, not of {', '.join(_TYPES)}"
            )
    return headers


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises as `read_headers`."""
    read_headers(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    """The library's words, which may hold a name of the file's, in a form for one line."""
    return ValueError(f"{file}: not a readable safetensors file ({shown(str(error))})")


def read_state(file: Path) -> Any:
    """What torch.save wrote of numbers, texts, lists, mappings and dense tensors.

    The tensors lie in the file itself (mmap): copy what is to be changed or to outlive it.
    Raises ValueError naming the file for an archive that is compressed, that claims more than it
    holds, that unfolds to far more than its size or that names anything besides tensors;
    FileNotFoundError when it is missing.
    """
    check_archive(file)
    with _reading(file):
        content = torch.load(file, weights_only=True, map_location="cpu", mmap=True)
        if _expanded_size(content) > MAX_EXPANSION * file.stat().st_size:
            raise ValueError(f"it unfolds to more than {MAX_EXPANSION} times its size")
    return content


def read_pickled(file: Path) -> dict[str, Any]:
    """A dictionary that torch.save wrote. Raises as `read_state`, and for other content."""
    content = read_state(file)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    return content


def check_archive(file: Path) -> None:
    """All that can be said of a file of `read_state` before it is loaded. Raises likewise."""
    check_link(file, file.parent)
    with open_regular(file, MAX_FILE) as stream, _reading(file):
        _check_pickle(_pickle_of(stream))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns the many errors of broken files into one."""
    try:
        yield
    except _MALFORMED as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{file}: not a readable file of plain tensors ({reason})") from error


def is_plain(value: Any, dtype: torch.dtype) -> bool:
    """Whether a value is an ordinary dense tensor of this type on the CPU, each number its own."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.dtype == dtype
        and value.device.type == "cpu"
        and value.is_contiguous()
    )


def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Give tensors the values of those of the same names.

    Raises ValueError, which begins with `where`, for one that is missing, of another shape or not
    finite.
    """
    for name, target in targets.items():
        if name not in tensors:
            raise ValueError(f"{where}{name} is missing")
        found = tensors[name]
        if found.shape != target.shape:
            raise ValueError(
                f"{where}{name} has shape {list(found.shape)}, expected {list(target.shape)}"
            )
        if not found.isfinite().all():
            raise ValueError(f"{where}{name} holds values that are not finite")
        target.copy_(found)


def _pickle_of(stream: BinaryIO) -> bytes:
    """The pickle inside an archive whose records are stored as they are, each under a name of its
    own and all in one folder: so every reader finds the same one."""
    size = stream.seek(0, io.SEEK_END)
    if size < _END_OF_ARCHIVE:
        raise ValueError("it is too short")
    stream.seek(-_END_OF_ARCHIVE, io.SEEK_END)
    end = stream.read()
    # The last 22 bytes: a mark, where the table of contents lies, and a comment that is empty.
    if end[-22:-18] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise ValueError("it does not end as an archive of torch.save")
    table = int.from_bytes(end[-10:-6], "little")
    if table == 2**32 - 1:  # it stands in the record before
        table = int.from_bytes(end[40:48], "little")
    if table > MAX_PICKLE:
        raise ValueError(f"its table of contents has {table:,} bytes")
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        names = {record.filename for record in records}
        folders = {name.partition("/")[0] for name in names}
        if len(names) < len(records) or len(folders) != 1:
            raise ValueError("its records have not each a name of its own in one folder")
        if any(r.compress_type or r.file_size != r.compress_size for r in records):
            raise ValueError("its records are compressed, which torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise ValueError("its records claim more than the file has")
        (folder,) = folders
        if f"{folder}/data.pkl" not in names:
            raise ValueError("it holds no data.pkl")
        found = archive.getinfo(f"{folder}/data.pkl")
        if found.file_size > MAX_PICKLE:
            raise ValueError(f"its pickle has {found.file_size:,} bytes")
        return archive.read(found)


def _check_pickle(program: bytes) -> None:
    """Raises ValueError for a pickle that names anything but what makes dense tensors.

    weights_only would let through constructors that allocate what they are told, sparse tensors and
    subclasses. A tuple inside of others by reference takes exponential time to hash as a key.
    """
    made, tuples = "", set()  # the last opcode that made a value; the memo's indices of tuples
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name not in ("BINPUT", "LONG_BINPUT"):
            made = opcode.name
        elif made.startswith("TUPLE"):
            tuples.add(argument)
        else:
            tuples.discard(argument)
        if opcode.name in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise ValueError("it refers to one tuple twice, which no state of ours does")
        if opcode.name == "GLOBAL" and argument not in _NAMED:
            raise ValueError(f"it names {shown(argument)}, which no state of ours holds")
        if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX") or (
            opcode.name.startswith(("EXT", "BYTEARRAY", "LONG4"))
        ):
            raise ValueError(f"it holds {opcode.name}, which no state of ours needs")


def _expanded_size(content: Any) -> int:
    """Bytes of all tensors and the number of all other values, what is referred to twice counted
    twice. None of them takes less than a byte in a file.

    Raises ValueError for more than MAX_DEPTH containers in one another, or in themselves.
    """
    known: dict[int, int] = {}

    def measure(value: Any, depth: int) -> int:
        if isinstance(value, Tensor):
            return value.numel() * value.element_size()
        if not isinstance(value, dict | list | tuple):
            return 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it has more than {MAX_DEPTH} containers in one another")
        if id(value) not in known:
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            known[id(value)] = 1 + sum(measure(item, depth + 1) for item in inner)
        return known[id(value)]

    return measure(content, 0)
