"""A verified checkpoint."""

from pathlib import Path
from typing import Any

from dylora.storage.manifest import verify
from dylora.storage.safe_io import read_json
from dylora.storage.schema import check_description


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
