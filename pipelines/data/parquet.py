"""Parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from qianmo.pipelines.data.columns import Column, Part, check_names, check_type
from qianmo.pipelines.data.errors import readable
from qianmo.pipelines.data.files import DataFile


def parts(file: DataFile, columns: Mapping[str, Column]) -> list[Part]:
    """The file's row groups, its columns' names and types checked."""
    with readable(file, "Parquet"):
        opened = pq.ParquetFile(file.path)
        schema = opened.schema_arrow
        names = schema.names
    check_names(file, names, columns)
    # The types of a shard without rows mean nothing, and writers get them wrong.
    present = [c for c in columns.values() if c.name in names]
    for column in present if opened.metadata.num_rows else ():
        check_type(Part(file), column, schema.field(column.name).type)
    found = []
    row = 0
    for group in range(opened.num_row_groups):
        found.append(Part(file, row, group, opened.metadata))
        row += opened.metadata.row_group(group).num_rows
    return found


def read(
    part: Part, columns: Mapping[str, Column], decoded_rows: int
) -> Iterator[dict[str, pa.Array]]:
    """Yields the columns of consecutive rows, `decoded_rows` of them at most."""
    # Without pre_buffer and with a buffer size, a row group of any size streams page by page.
    with readable(part.file, "Parquet"):
        file = pq.ParquetFile(
            part.file.path,
            metadata=part.metadata,
            buffer_size=2**18,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        names = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(
            decoded_rows, row_groups=[part.row_group], columns=names, use_threads=False
        ):
            absent = dict.fromkeys(columns, pa.nulls(len(batch)))
            own = {name: batch.column(name) for name in names}
            yield absent | own | part.constants(len(batch))
