"""Parquet files."""

from collections.abc import Iterator
from pathlib import Path

from dylora.data.record import Record, table_records

MAX_TABLE = 64 << 30  # bytes of a parquet file once decompressed


def read_parquet_file(file: Path, columns: list[str]) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow.parquet import read_metadata

    try:
        groups = read_metadata(file)
        size = sum(groups.row_group(i).total_byte_size for i in range(groups.num_row_groups))
        if size > MAX_TABLE:
            raise ValueError(f"it has {size:,} bytes once decompressed")
        table = load_dataset("parquet", data_files=str(file), split="train")
    except (DatasetsError, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error
    yield from table_records(str(file), table, columns)
