"""Folders that `datasets` writes with save_to_disk: Arrow streams, mapped into memory.

Whatever is packed, and would unfold before its size could be told, is refused: save_to_disk packs
nothing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora.data.parquet_file import batch_records
from dylora.data.record import Columns, Record
from dylora.fields import nearest, shown
from dylora.storage.safe_io import check_link, expansion_bound, open_regular, read_json

if TYPE_CHECKING:
    import pyarrow as pa

STATE, SPLITS = "state.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk has written this folder."""
    return (folder / STATE).is_file() or has_splits(folder)


def has_splits(folder: Path) -> bool:
    """Whether it holds splits by name, and not one set alone."""
    return (folder / SPLITS).is_file()


def read_saved_folder(
    folder: Path, columns: Columns, splits: Sequence[str] | None
) -> Iterator[Record]:
    """splits: of a folder with several, those that are wanted, as far as they are there; none:
    train. Raises ValueError for what cannot be read."""
    if not has_splits(folder):
        yield from _read_split(folder, columns)
        return
    names = read_json(folder / SPLITS).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{folder / SPLITS}: splits is {shown(names)}, not a list of names")
    splits = ("train",) if splits is None else splits
    if not set(splits) & set(names):
        known = nearest(splits[0], names)
        raise ValueError(f"{folder} has no split {' or '.join(map(repr, splits))}{known}")
    for split in splits:
        if split in names:
            yield from _read_split(folder / split, columns)


def _read_split(folder: Path, columns: Columns) -> Iterator[Record]:
    state = read_json(folder / STATE)
    files = state.get("_data_files")
    if not isinstance(files, list) or state.get("_indices_data_files"):
        raise ValueError(
            f"{folder / STATE} is not as save_to_disk of datasets 2 or newer writes it"
        )
    for entry in files:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or "/" in name:
            raise ValueError(f"{folder / STATE}: the file {shown(name)} is none of this folder")
        check_link(folder / name, folder)
        yield from _read_stream(folder / name, columns)


def _read_stream(file: Path, columns: Columns) -> Iterator[Record]:
    import pyarrow as pa

    open_regular(file).close()
    try:
        if any(map(_is_compressed, pa.ipc.MessageReader.open_stream(pa.memory_map(str(file))))):
            raise ValueError("its batches are compressed, which save_to_disk never does")
        stream = pa.ipc.open_stream(pa.memory_map(str(file)))
        names = columns.choose(str(file), stream.schema.names)
        yield from batch_records(str(file), _checked(stream), names, expansion_bound(file))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as Arrow: {error}") from error


def _checked(stream: Any) -> "Iterator[pa.RecordBatch]":
    for batch in stream:
        batch.validate(full=True)  # offsets of an untrusted file may point anywhere
        yield batch


def _is_compressed(message: Any) -> bool:
    """Whether a message is a batch with compressed buffers, by its flatbuffer (Arrow's Message.fbs
    and FlatBuffers' layout: a table begins with the way back to the list of its fields' places)."""
    data = message.metadata.to_pybytes()

    def number(place: int, size: int, *, signed: bool = False) -> int:
        if not 0 <= place <= len(data) - size:
            raise ValueError("its metadata are broken")
        return int.from_bytes(data[place : place + size], "little", signed=signed)

    def field(table: int, index: int) -> int:
        places = table - number(table, 4, signed=True)
        within = 4 + 2 * index < number(places, 2)
        offset = number(places + 4 + 2 * index, 2) if within else 0
        return table + offset if offset else 0

    def target(place: int) -> int:
        return place + number(place, 4)

    if message.type not in ("record batch", "dictionary batch"):
        return False
    batch = target(field(target(0), 2))  # Message.header
    if message.type == "dictionary batch":
        batch = target(field(batch, 1))  # DictionaryBatch.data
    return field(batch, 3) != 0  # RecordBatch.compression
