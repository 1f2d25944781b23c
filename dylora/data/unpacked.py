"""Files of lines, compressed or not, within bounds of what their content expands to."""

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dylora.storage.safe_io import expansion_bound, open_regular

COMPRESSED = (".gz", ".zst")
MAX_LINE = 16 << 20  # bytes of a line or a row, longer ones are malformed
MAX_UNPACKED = 4 << 30  # bytes of a compressed file once decompressed


def plain_name(file: Path) -> str:
    """A file's name in lower case, without the ending of a compression."""
    name = file.name.lower()
    return next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)


@contextmanager
def open_unpacked(file: Path) -> Iterator[BinaryIO]:
    """The content of an ordinary file, decompressed where its name says so.

    Raises ValueError, also from reads, where it has holes, cannot be decompressed or expands to
    more than MAX_UNPACKED; as `open_regular` otherwise.
    """
    with open_regular(file) as stream:
        if os.fstat(stream.fileno()).st_size > expansion_bound(file):
            raise ValueError(
                f"{file} has holes: more than {expansion_bound(file):,} bytes of content"
            )
        if not file.name.lower().endswith(COMPRESSED):
            yield stream
            return
        with io.BufferedReader(_Unpacked(file, stream)) as unpacked:
            yield unpacked


class _Unpacked(io.RawIOBase):
    """What a compressed stream decompresses to, counted."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self.size = file, 0
        self.source: Any
        if file.name.lower().endswith(".gz"):
            self.source = gzip.GzipFile(fileobj=stream)
        else:
            import pyarrow as pa

            self.source = pa.CompressedInputStream(stream, "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self.source.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{self.file} cannot be decompressed: {error}") from error
        self.size += len(data)
        if self.size > MAX_UNPACKED:
            raise ValueError(f"{self.file} has more than {MAX_UNPACKED:,} bytes once decompressed")
        buffer[: len(data)] = data
        return len(data)
