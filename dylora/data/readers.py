"""Records of a source, each with its location: local files by their endings, or the hub.

Raises ValueError only where a source cannot be used at all; a bad record comes out as a problem.
"""

import glob
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dylora.data.csv_file import read_csv_file
from dylora.data.json_file import read_json_file
from dylora.data.parquet_file import read_parquet_file
from dylora.data.record import Columns, Record, table_records
from dylora.data.saved_folder import is_saved, read_saved_folder
from dylora.data.text_file import read_text_file
from dylora.data.unpacked import COMPRESSED, plain_name
from dylora.storage.safe_io import open_regular

# By the ending of a file: (file, columns that are wanted) -> its records.
READERS: dict[str, Callable[[Path, Columns], Iterator[Record]]] = {
    ".json": read_json_file,
    ".jsonl": read_json_file,
    ".csv": read_csv_file,
    ".tsv": read_csv_file,
    ".txt": read_text_file,
    ".parquet": read_parquet_file,
}
KNOWN = f"{', '.join(READERS)}; all but .parquet also compressed, {' or '.join(COMPRESSED)}"


def read_records(
    path: str | list[str],
    revision: str | None = None,
    *,
    columns: Sequence[str] | Columns | None,
    hub_config: str | None = None,
    hub_splits: tuple[str, ...] | None = None,
    streaming: bool = False,
) -> Iterator[Record]:
    """The rows of a file, of a folder's files, of those that fit a pattern, of a list of these, or
    of a set of the hub, in this order. columns: those that have to be there; None: all that are.
    streaming: a set of the hub is fetched as it is read.

    Raises ValueError where the path cannot be read or a column is nowhere in it.
    """
    columns = columns if isinstance(columns, Columns) else Columns(columns)
    files = find_files(path)
    if files is None:
        assert isinstance(path, str)
        return _hub_records(path, revision, columns, hub_config, hub_splits, streaming)
    if revision is not None:
        raise ValueError(f"{path} is local, so the revision {revision!r} means nothing; remove it")
    return _file_records(files, columns, hub_splits)


def find_files(path: str | list[str]) -> list[Path] | None:
    """What a path stands for: files, and folders of save_to_disk; None for a name of the hub.

    A folder stands for all files below it that can be read, in the order of their names. Raises
    ValueError for what does not exist or is of no known kind.
    """
    if isinstance(path, list):
        found: list[Path] = []
        for part in path:
            files = find_files(part)
            if files is None:
                raise ValueError(f"{part} does not exist (a hub set is a source of its own)")
            found += files
        if not found:
            raise ValueError("the list of paths is empty: name a file")
        return found
    file = Path(path).expanduser()
    if file.is_dir():
        if is_saved(file):
            return [file]
        inside = sorted(one for one in file.rglob("*") if one.is_file() and _reader(one))
        if not inside:
            raise ValueError(f"{path} is a folder without a file that can be read ({KNOWN})")
        return inside
    if file.exists():
        if _reader(file) is None:
            raise ValueError(f"{path} is of an unknown type; known are {KNOWN}")
        open_regular(file).close()
        return [file]
    if glob.has_magic(path):
        matches = sorted(glob.glob(str(file), recursive=True))
        if not matches:
            raise ValueError(f"{path} fits no file; a relative path starts at {Path.cwd()}")
        return find_files(matches)
    if _reader(file) is not None:
        raise ValueError(f"{path} does not exist; a relative path starts at {Path.cwd()}")
    return None


def _reader(file: Path) -> Callable[[Path, Columns], Iterator[Record]] | None:
    name = plain_name(file)
    packed = name != file.name.lower()
    found = next((read for end, read in READERS.items() if name.endswith(end)), None)
    return None if packed and found is read_parquet_file else found


def _file_records(
    files: list[Path], columns: Columns, splits: tuple[str, ...] | None
) -> Iterator[Record]:
    for file in files:
        reader = _reader(file)
        if reader is None:
            yield from read_saved_folder(file, columns, splits)
        else:
            yield from reader(file, columns)


def _hub_records(
    name: str,
    revision: str | None,
    columns: Columns,
    config: str | None,
    splits: tuple[str, ...] | None,
    streaming: bool,
) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        tables: Any = load_dataset(name, config, revision=revision, streaming=streaming)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name!r} is no local file, and the hub's set of that name (revision "
            f"{revision or 'main'}) cannot be loaded: {error}. Check the name and the network, or "
            f"give the path of a local file ({KNOWN})"
        ) from error
    if splits is None:
        # A set's own validation and test rows are nobody's training data.
        splits = ("train",) if "train" in tables else tuple(tables)
        if len(splits) > 1:
            raise ValueError(f"{name!r} has no split train, but {', '.join(splits)}: set hub_split")
    if not any(split in tables for split in splits):
        raise ValueError(f"{name!r} has no split {' or '.join(splits)}, but {', '.join(tables)}")
    for split in splits:
        if split in tables:
            table = tables[split]
            yield from table_records(f"{name}/{split}", table, columns)
