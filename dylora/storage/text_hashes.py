"""text_hashes.bin: of each question and answer that a mixture was trained on, 6 bytes of a hash.

They have a file of their own, sorted and each once, as there is one or two for every row: JSON of
them would soon be larger than what is read of it.
"""

import re
from pathlib import Path
from typing import Any

from dylora.storage.safe_io import check_link, read_bytes

HASHES_FILE = "text_hashes.bin"
MAX_HASHES = 1 << 30  # bytes of the file: 179 million hashes
_BYTES = 6  # of one, as `dylora.data.splits.text_hash` makes it
_HASH = re.compile(rf"\b[0-9a-f]{{{2 * _BYTES}}}\b")


def hashes_in(record: dict[str, Any]) -> set[str]:
    """The hashes in a training record and in those that it continues.

    They stand under `text_hashes`: of a record that was read, and of each source of others.
    """
    sources = record.get("data", {}).get("sources", [])
    texts = (one.get("text_hashes", "") for one in (record, *sources))
    found = {one for text in texts for one in _HASH.findall(text)}
    return found.union(*map(hashes_in, record.get("earlier", [])))


def without_hashes(record: dict[str, Any]) -> dict[str, Any]:
    """A copy of a training record that has none of them, nor have those that it continues."""
    record = {key: value for key, value in record.items() if key != "text_hashes"}
    if "sources" in record.get("data", {}):
        sources = [
            {key: value for key, value in source.items() if key != "text_hashes"}
            for source in record["data"]["sources"]
        ]
        record["data"] = record["data"] | {"sources": sources}
    if "earlier" in record:
        record["earlier"] = [without_hashes(one) for one in record["earlier"]]
    return record


def write_hashes(folder: Path, record: dict[str, Any]) -> None:
    """All of a training record's hashes; no file where it has none.

    Raises ValueError for more than are read.
    """
    found = hashes_in(record)
    if len(found) * _BYTES > MAX_HASHES:
        raise ValueError(
            f"{len(found):,} questions and answers were trained on, and a checkpoint records at "
            f"most {MAX_HASHES // _BYTES:,}: set stream_rows for the largest source"
        )
    if found:
        (folder / HASHES_FILE).write_bytes(bytes.fromhex("".join(sorted(found))))


def read_hashes(folder: Path) -> str:
    """The hashes, 12 hex digits each with spaces between; "" where there is no file.

    Raises ValueError naming the file for one that is too large or holds half a hash.
    """
    file = folder / HASHES_FILE
    if not file.exists():
        return ""
    check_link(file, folder)
    content = read_bytes(file, MAX_HASHES)
    if len(content) % _BYTES:
        raise ValueError(f"{file} has {len(content):,} bytes, but must have {_BYTES} a hash")
    return content.hex(" ", _BYTES)
