"""CSV files of the dialect of RFC 4180, with a header line."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Mapping

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from qianmo.pipelines.data.columns import Column, Part, check_names
from qianmo.pipelines.data.csv_quotes import CheckedStream
from qianmo.pipelines.data.errors import DataError, readable
from qianmo.pipelines.data.files import DataFile

_BLOCK_BYTES = 2**22
_WRONG_CELLS = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


def parts(file: DataFile, columns: Mapping[str, Column]) -> list[Part]:
    """The file as one part, its columns' names checked."""
    check_names(file, header(file), columns)
    return [Part(file)]


def header(file: DataFile) -> list[str]:
    """The names of the columns.

    Raises:
      DataError: there is no header line.
    """
    with readable(file, "CSV"), pa.input_stream(str(file.path)) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        try:
            names = next(csv.reader(text), None)
        except csv.Error as error:
            raise DataError(
                f"{file}: its header line cannot be read: {error}. Name the columns in it."
            ) from None
    if names is None:
        raise DataError(f"{file}: empty, without even the header line that names the columns.")
    return names


def read(
    part: Part, columns: Mapping[str, Column], decoded_rows: int
) -> Iterator[dict[str, pa.Array]]:
    """Yields the bytes of consecutive rows' cells, as many as there are in a block of bytes."""
    del decoded_rows
    present = header(part.file)
    names = [name for name in columns if name in present]
    with (
        readable(part.file, "CSV"),
        _whole_rows(part.file),
        contextlib.closing(CheckedStream(part.file)) as stream,
    ):
        reader = pa_csv.open_csv(
            stream,
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pa_csv.ParseOptions(
                newlines_in_values=True,
                # In a file of one column it is an empty cell.
                ignore_empty_lines=len(present) > 1,
            ),
            # An empty cell is a null; "" in quotes is an empty string.
            convert_options=pa_csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.binary()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        for batch in reader:
            absent = dict.fromkeys(columns, pa.nulls(len(batch), pa.binary()))
            arrays = absent | {name: batch.column(name) for name in names}
            for name, column in columns.items():
                if column.max_length:
                    arrays[name] = split(arrays[name])
            yield arrays | part.constants(len(batch))


@contextlib.contextmanager
def _whole_rows(file: DataFile) -> Iterator[None]:
    """Raises the error that names a row with too few or too many cells, or a row too long.

    pyarrow tells them by its message alone: a handler of invalid rows is not called for rows that
    are no UTF-8.
    """
    try:
        yield
    except pa.ArrowInvalid as error:
        if wrong := _WRONG_CELLS.search(str(error)):
            number, expected, found = map(int, wrong.groups())
            raise DataError(
                f"{file}, row {number - 2} (counted from 0): should have {expected} cells, as the "
                f"header has. Received: {found}. Correct the row."
            ) from None
        if "straddling" in str(error):
            raise DataError(
                f"{file}: a row is longer than {_BLOCK_BYTES // 2**20} MiB, or its quote is never "
                "closed. Correct it, or write the rows as Parquet."
            ) from None
        raise


def split(cells: pa.Array) -> pa.Array:
    """Lists of the items between vertical bars; of none when a cell is empty."""
    cells = pc.fill_null(cells, b"")
    none = pa.scalar([], pa.list_(pa.binary()))
    return pc.if_else(pc.equal(cells, b""), none, pc.split_pattern(cells, pattern="|"))
