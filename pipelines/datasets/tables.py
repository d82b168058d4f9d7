"""Tables of public data sets: reading, joining and writing them as a folder of parts."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from qianmo.export import publishing
from qianmo.pipelines.data import readers

_ROW_GROUP = 2**16  # rows; the unit in which readers shuffle and share files


Tables = Mapping[str, pa.Table]


def read_table(file: pathlib.Path) -> pa.Table:
    """Reads a Parquet file.

    Raises:
      DataError: there is no such file, or it cannot be read.
    """
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        raise readers.DataError(
            f"{file}: no such file. `source` should be the folder that holds it."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise readers.DataError(f"{file}: cannot be read as Parquet: {error}") from error


def narrowed(table: pa.Table) -> pa.Table:
    """Stores whole numbers, also those kept as float for the sake of nulls, in the least type."""

    def narrow(values: pa.ChunkedArray) -> pa.ChunkedArray:
        if pa.types.is_list(values.type):
            return values.cast(pa.list_(pa.int16()))
        if pa.types.is_large_string(values.type):
            return values.cast(pa.string())
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64()):
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                return values.cast(kind) if not pa.types.is_string(values.type) else values
        return values

    return pa.table({name: narrow(table[name]) for name in table.column_names})


def filled(values: pa.ChunkedArray, none: str | int | None = None) -> pa.ChunkedArray:
    """Gives the publisher's nulls a value of their own, by default "unknown" or -1.

    Raises:
      DataError: the publisher uses that value too.
    """
    if none is None:
        none = "unknown" if pa.types.is_string(values.type) else -1
    value = pa.scalar(none, values.type)
    if values.null_count and pc.index(values, value).as_py() >= 0:
        raise readers.DataError(
            f"nulls should become {value.as_py()!r}, which a column of the source already holds. "
            "Take another value for them."
        )
    return pc.fill_null(values, value)


def rows_of(table: pa.Table, key: str, wanted: pa.ChunkedArray) -> pa.Table:
    """For each wanted key, the row of `table` that has it.

    Raises:
      DataError: a key that the table lacks.
    """
    keys = table[key].to_numpy()
    order = np.argsort(keys, kind="stable")
    asked = wanted.to_numpy()
    place = np.searchsorted(keys, asked, sorter=order)
    rows = order[np.minimum(place, len(keys) - 1)]
    lacking = keys[rows] != asked
    if lacking.any():
        raise readers.DataError(
            f"`{key}` {asked[lacking][0]} is used, but its table has no such row. Complete the "
            "source."
        )
    return table.take(rows)


def check_new(output: readers.PathLike, overwrite: bool) -> None:
    """Asks whether an output may be made.

    Raises:
      ValueError: it exists and is not to be replaced.
    """
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"{output} exists. Give another output, or --overwrite to replace it.")


@contextlib.contextmanager
def new_folder(output: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """A folder beside `output` that takes its name when it is whole.

    Raises:
      ValueError: see `check_new`.
    """
    check_new(output, overwrite)
    try:
        with publishing.writing_folder(output, overwrite=overwrite) as folder:
            yield folder
    except OSError as error:
        error.filename = str(output)  # what pyarrow cannot write it does not name
        raise


def write(
    output: readers.PathLike,
    dataset: str,
    tables: Tables,
    overwrite: bool,
    notices: Iterable[pathlib.Path] = (),
    compression_level: int = 3,
    left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Writes the tables, what they are, and the notices that must travel with them.

    Args:
      output: folder to make.
      dataset: its name, and how it was split.
      tables: name -> rows.
      overwrite: whether an existing output is replaced.
      notices: files to copy beside the tables.
      compression_level: of Parquet's zstd.
      left_out: reason -> rows of the source that are in no table.

    Returns:
      What data.json holds.
    """
    target = pathlib.Path(os.path.abspath(output))
    with new_folder(target, overwrite) as folder:
        for name, table in tqdm(tables.items(), "files", unit="file"):
            pq.write_table(
                table,
                folder / f"{name}.parquet",
                compression="zstd",
                compression_level=compression_level,
                row_group_size=_ROW_GROUP,
                write_page_checksum=True,
            )
        about = {
            "dataset": dataset,
            "rows": {name: len(table) for name, table in tables.items()},
            "left_out": {reason: rows for reason, rows in (left_out or {}).items() if rows},
            "sha256": {name: readers.sha256(folder / f"{name}.parquet") for name in tables},
        }
        (folder / "data.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for notice in notices:
            shutil.copyfile(notice, folder / notice.name)
    return about
