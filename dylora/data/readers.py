"""Records of a source, each with its location: a local file by its ending, or the hub.

Raises ValueError only where a source cannot be used at all; a bad record comes out as a problem.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dylora.data.json_file import read_json_file
from dylora.data.parquet_file import read_parquet_file
from dylora.data.record import Record, table_records
from dylora.storage.safe_io import open_regular

# By the ending of a file: (file, columns that are wanted) -> its records.
READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".json": read_json_file,
    ".jsonl": read_json_file,
    ".jsonl.gz": read_json_file,
    ".parquet": read_parquet_file,
}


def read_records(
    path: str,
    revision: str | None,
    *,
    columns: list[str],
    hub_config: str | None = None,
    hub_splits: tuple[str, ...] | None = None,
) -> Iterator[Record]:
    """Raises ValueError where the path cannot be read or a column is nowhere in it."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{path} is a folder; name one of its files ({', '.join(READERS)})")
    reader = next((read for end, read in READERS.items() if file.name.lower().endswith(end)), None)
    if not file.exists() and reader is None:
        return _hub_records(path, revision, columns, hub_config, hub_splits)
    if not file.exists():
        raise ValueError(f"{path} does not exist; a relative path starts at {Path.cwd()}")
    if reader is None:
        raise ValueError(f"{path} is of an unknown type; known are {', '.join(READERS)}")
    if revision is not None:
        raise ValueError(f"{path} is a file, so the revision {revision!r} means nothing; remove it")
    open_regular(file).close()
    return reader(file, columns)


def _hub_records(
    name: str,
    revision: str | None,
    columns: list[str],
    config: str | None,
    splits: tuple[str, ...] | None,
) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        tables: Any = load_dataset(name, config, revision=revision)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name!r} is no local file, and the hub's set of that name (revision "
            f"{revision or 'main'}) cannot be loaded: {error}. Check the name and the network, or "
            f"give the path of a local file ({', '.join(READERS)})"
        ) from error
    if splits is None:
        # A set's own validation and test rows are nobody's training data.
        splits = ("train",) if "train" in tables else tuple(tables)
        if len(splits) > 1:
            raise ValueError(f"{name!r} has no split train, but {', '.join(splits)}")
    for split in splits:
        if split in tables:
            yield from table_records(f"{name}/{split}", tables[split], columns)
