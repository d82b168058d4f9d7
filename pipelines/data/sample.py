"""Some rows of a table, with whatever columns it has and the types that these seem to have."""

from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qianmo.pipelines.data import csv_files, parquet, tfrecord
from qianmo.pipelines.data.columns import Column, Part
from qianmo.pipelines.data.errors import DataError, NoRowsError, readable
from qianmo.pipelines.data.files import DataFile, PathLike, extension, files

_DIGITS = r"^[+-]?\d+$"
_LEADING_ZERO = r"^[+-]?0[\dxX]"
_ROWS_AT_ONCE = 2**16


def read(path: PathLike, rows: int) -> pa.Table:
    """Reads about so many rows, of files and row groups drawn from all.

    Columns of text, such as a CSV's, become integers, numbers or times where all of their values
    are such, lists of these where there are vertical bars, and else stay strings.

    Args:
      path: as for `readers.blocks`.
      rows: how many; all where there are no more.

    Raises:
      DataError: there is nothing to read, or files differ in the types of their columns.
    """
    found = files(path)
    parts = [part for file in found for part in _parts(file)]
    tables: list[pa.Table] = []
    for number in np.random.default_rng(0).permutation(len(parts)):
        left = rows - sum(map(len, tables))
        if left > 0:
            tables += _tables(parts[number], left)
    if not sum(map(len, tables)):
        raise NoRowsError(f"{os.fspath(path)}: no rows. Give a path with rows.")
    try:
        whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise DataError(f"{os.fspath(path)}: columns differ between files: {error}") from error
    text = {name for file in found for name in _text(file, whole.column_names)}
    columns = {
        name: _typed(whole[name]) if name in text else whole[name] for name in whole.column_names
    }
    return pa.table(columns)


def _parts(file: DataFile) -> list[Part]:
    return parquet.parts(file, {}) if extension(file.path) == ".parquet" else [Part(file)]


def _text(file: DataFile, names: list[str]) -> list[str]:
    """Columns of a file that come as text."""
    is_csv = extension(file.path) in (".csv", ".csv.gz")
    return names if is_csv else [*file.partitions]


def _tables(part: Part, rows: int) -> list[pa.Table]:
    """The first rows of a part."""
    end = extension(part.file.path)
    if end == ".parquet":
        with readable(part.file, "Parquet"):
            names = pq.ParquetFile(part.file.path).schema_arrow.names
        columns = {name: Column(name=name, kind="key") for name in names}
        batches = parquet.read(part, columns, _ROWS_AT_ONCE)
    elif end == ".tfrecord":
        names = tfrecord.names(part.file)
        columns = {name: Column(name=name, kind="string", max_length=1) for name in names}
        batches = tfrecord.read(part, columns, _ROWS_AT_ONCE)
    else:
        names = csv_files.header(part.file)
        columns = {name: Column(name=name, kind="string", default="") for name in names}
        batches = csv_files.read(part, columns, _ROWS_AT_ONCE)
    tables: list[pa.Table] = []
    for arrays in batches:
        tables.append(pa.table(arrays).slice(0, rows - sum(map(len, tables))))
        if sum(map(len, tables)) >= rows:
            break
    if end == ".tfrecord" and tables:
        table = pa.concat_tables(tables)
        return [pa.table({name: _single(table[name]) for name in table.column_names})]
    return tables


def _single(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """A record's values as one each, where no record has more."""
    if not pa.types.is_large_list(lists.type):
        return lists
    if pc.max(pc.list_value_length(lists)).as_py() > 1:
        return lists
    return pc.list_element(pc.if_else(pc.equal(pc.list_value_length(lists), 0), None, lists), 0)


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text as what all of its values are."""
    try:
        text = column.cast(pa.string()).combine_chunks()
    except pa.ArrowInvalid:
        return column  # bytes that are no UTF-8
    if not pc.any(pc.match_substring(text, "|")).as_py():
        return pa.chunked_array([_typed_values(text)])
    lists = pc.split_pattern(text, "|")
    values = _typed_values(lists.values)
    found = pa.ListArray.from_arrays(lists.offsets, values, mask=lists.is_null())
    return pa.chunked_array([found])


def _typed_values(text: pa.Array) -> pa.Array:
    if pc.any(pc.match_substring_regex(text, _LEADING_ZERO)).as_py():
        return text  # such as a postal code
    for kind in (pa.int64(), pa.float64()):
        try:
            return text.cast(kind)
        except pa.ArrowInvalid:
            if pc.all(pc.match_substring_regex(text, _DIGITS)).as_py():
                return text  # ids beyond int64
    return text
