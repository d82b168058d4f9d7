"""A catalogue of items, checked against the rows whose items it should hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qianmo.layers.features import Categorical
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers


def check(
    schema: Schema, item: Categorical, items_path: readers.PathLike, paths: Iterable[str]
) -> None:
    """Checks that a catalogue has one row for each item that rows with a label above 0 have.

    Args:
      schema: of the rows.
      item: their feature that tells the item.
      items_path: the catalogue.
      paths: the rows.

    Raises:
      DataError: an item stands in the catalogue twice, or is missing.
    """
    alone = Schema(features=(dataclasses.replace(item, domains=()),), labels=schema.labels)
    blocks = readers.blocks(alone, items_path, targets=False)
    items = pa.concat_arrays([_arrow(block[item.name]) for block in blocks])
    counts = pc.value_counts(items)
    if len(counts) < len(items):
        twice = next(one["values"] for one in counts.to_pylist() if one["counts"] > 1)
        raise readers.DataError(
            f"{items_path}, column `{item.name}`: item {_shown(twice)} stands there twice. Give "
            "one row for each."
        )
    # Rows are counted as in the files, so those of other domains are read too.
    rows_schema = dataclasses.replace(schema.narrowed(item.name), only_domains=())
    for path in paths:
        rows = lacking = 0
        first = ""
        for block in readers.blocks(rows_schema, path):
            values = _arrow(block[item.name])
            is_known = pc.is_valid(pc.index_in(values, value_set=items)).to_numpy(
                zero_copy_only=False
            )
            wanted = np.any([block[label] > 0 for label in schema.labels], axis=0)
            if schema.only_domains:
                wanted &= readers.is_of(block[schema.domain], schema.only_domains)
            missing = np.flatnonzero(wanted & ~is_known)
            if len(missing) and not first:
                row = int(missing[0])
                first = f"row {rows + row} (counted from 0): item {_shown(values[row].as_py())}"
            lacking += len(missing)
            rows += len(values)
        if first:
            raise readers.DataError(
                f"{path}, column `{item.name}`, {first} is not in the catalogue {items_path}, nor "
                f"are those of {lacking - 1:,} other rows. Add them there, or leave the rows out."
            )


def _arrow(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.binary() if values.dtype == object else pa.int64())


def _shown(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
