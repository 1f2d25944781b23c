"""Parquet files, read in batches whose texts stay shared until their size is known.

A page of two kilobytes may name one long text for each of a million rows. Arrow's dictionary type
keeps it once, so that the size can be told before there are a million copies.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora.data.record import Columns, Record
from dylora.data.unpacked import MAX_LINE
from dylora.storage.safe_io import expansion_bound

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1024
"""In a batch."""
ROW_BYTES = 64
"""What a row counts beside its values: null may be written for any number of rows at once."""
MAX_BATCH = 64 << 20  # bytes of a batch that is converted at once


def read_parquet_file(file: Path, columns: Columns) -> Iterator[Record]:
    """Raises ValueError where the file cannot be read, lacks a column or expands beyond measure."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    bound = expansion_bound(file)
    try:
        schema = ParquetFile(file).schema
        leaves = [schema.column(index) for index in range(len(schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        opened = ParquetFile(file, read_dictionary=texts)
        names = columns.choose(str(file), opened.schema_arrow.names)
        groups = [opened.metadata.row_group(index) for index in range(opened.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        told = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
        if max(told, ROW_BYTES * opened.metadata.num_rows) > bound:
            raise ValueError(f"it expands to more than {bound:,} bytes")
        batches = (opened.iter_batches(ROWS, [group], names) for group in range(len(groups)))
        yield from batch_records(str(file), chain.from_iterable(batches), names, bound)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def batch_records(
    location: str, batches: "Iterable[pa.RecordBatch]", columns: list[str], bound: int
) -> Iterator[Record]:
    """The rows of Arrow's batches, numbered from 1. Raises ValueError once they come to more bytes
    than `bound`."""
    size = row = 0
    for batch in batches:
        bytes_here = _content_bytes(batch.columns)
        size += bytes_here + ROW_BYTES * len(batch)
        if size > bound:
            raise ValueError(f"it expands to more than {bound:,} bytes")
        step = ROWS if bytes_here <= MAX_BATCH else 1
        for start in range(0, len(batch), step):
            part = batch.slice(start, step)
            if _content_bytes(part.columns) > (MAX_BATCH if step > 1 else MAX_LINE):
                row += 1
                yield Record(f"{location}:{row}", {}, f"longer than {MAX_LINE:,} bytes")
                continue
            for fields in part.select(columns).to_pylist():
                row += 1
                yield Record(f"{location}:{row}", fields)


def _content_bytes(arrays: "list[pa.Array]") -> int:
    """What arrays take once each of their values is a copy of its own."""
    import pyarrow as pa
    from pyarrow import compute

    functions: Any = compute  # made at import, which type checkers do not see
    total = 0
    for array in arrays:
        kind: Any = array.type
        if pa.types.is_dictionary(kind):
            lengths = functions.binary_length(array.dictionary)
            total += functions.sum(lengths.cast(pa.int64()).take(array.indices)).as_py() or 0
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind):
            parts = array.flatten()
            total += array.nbytes + _content_bytes(
                [parts] if isinstance(parts, pa.Array) else parts
            )
        else:
            total += array.nbytes
    return total
