"""Columns of Arrow arrays, checked and made blocks of NumPy arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qianmo.pipelines.data.columns import Block, Column, Part, check_type
from qianmo.pipelines.data.errors import DataError


def convert(
    part: Part,
    column: Column,
    array: pa.Array,
    is_text: bool,
    domain: npt.NDArray[np.int64] | None,
) -> Block:
    """Checks a column's values and makes them NumPy arrays.

    Args:
      part: where they come from; its `first_row` is that of the array's first value.
      column: what they should be.
      array: the values.
      is_text: whether they are a CSV's, still to be parsed.
      domain: of the rows, where it is known.
    """
    if not is_text:
        check_type(part, column, array.type)
    rows = np.arange(len(array))
    if not column.owners or domain is None:  # what has owners has a column of domains beside it
        return _converted(part, column, array, is_text, rows)
    if column.max_length and pa.types.is_null(array.type):
        array = pa.nulls(len(array), pa.list_(pa.null()))
    own = np.isin(domain, column.owners)
    is_given = pc.is_valid(array).to_numpy(zero_copy_only=False)
    if column.max_length:
        is_given &= pc.fill_null(pc.list_value_length(array), 0).to_numpy() > 0
    foreign = is_given & ~own
    if foreign.any() and not column.is_label:
        row = int(np.argmax(foreign))
        raise part.error(
            column.name,
            part.first_row + row,
            f"belongs to domains {column.owners} and should be absent from a row of domain "
            f"{domain[row]}. Received: {array[row].as_py()!r}. Leave it empty, or let the "
            "feature's `domains` name that domain.",
        )
    found = _converted(part, column, array.filter(pa.array(own)), is_text, rows[own])
    block = {}
    for name, values in found.items():
        fill = math.nan if column.is_label else b"" if values.dtype == object else 0
        block[name] = np.full((len(array), *values.shape[1:]), fill, values.dtype)
        block[name][own] = values
    return block


def _converted(
    part: Part, column: Column, array: pa.Array, is_text: bool, rows: npt.NDArray[np.int64]
) -> Block:
    """Checks a column's values, of the part's `rows`, and makes them NumPy arrays."""
    if array.null_count:
        row = part.first_row + int(rows[pc.index(pc.is_null(array), True).as_py()])
        raise part.error(column.name, row, "is null or absent. Give it a value.")
    if not column.max_length:
        return {column.name: _values(part, column, array, is_text, rows)}

    lengths = pc.list_value_length(array).to_numpy().astype(np.int64)
    flat = pc.list_flatten(array)
    ends = np.cumsum(lengths)
    if flat.null_count:
        value = pc.index(pc.is_null(flat), True).as_py()
        row = part.first_row + int(rows[np.searchsorted(ends, value, side="right")])
        raise part.error(column.name, row, "its list holds a null. Leave it out of the list.")
    values = _values(part, column, flat, is_text, np.repeat(rows, lengths))
    kept = np.minimum(lengths, column.max_length)
    starts = ends - (kept if column.keep == "last" else lengths)
    padded = np.full(
        (len(array), column.max_length), b"" if column.dtype == "string" else 0, values.dtype
    )
    place = np.arange(column.max_length)
    is_value = place < kept[:, None]
    padded[is_value] = values[(starts[:, None] + place)[is_value]]
    return {column.name: padded, f"{column.name}_length": kept}


def _values(
    part: Part, column: Column, array: pa.Array, is_text: bool, rows: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Checks flat values, `rows[i]` being the row of value i, and makes them a NumPy array."""

    def cast(values: pa.Array, dtype: pa.DataType) -> pa.Array:
        try:
            return values.cast(dtype)
        except pa.ArrowInvalid:
            i = _first_uncastable(values, dtype)
            raise fault(
                i, f"should be {column.expected}. Received: {values[i].as_py()!r}"
            ) from None

    def fault(i: int, text: str) -> DataError:
        row = part.first_row + int(rows[i])
        return part.error(column.name, row, f"{text}. Correct the value or leave the row out.")

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_text or column.dtype == "string":
        array = cast(array, pa.string())
    if column.dtype == "string":
        # A batch has few distinct strings: each becomes one Python object.
        encoded = array.dictionary_encode()
        distinct = encoded.dictionary.cast(pa.binary()).to_numpy(zero_copy_only=False)
        return np.asarray(distinct[encoded.indices.to_numpy()])
    if column.dtype == "int64":
        return np.asarray(cast(array, pa.int64()).to_numpy(zero_copy_only=False))

    if is_text:
        array = cast(array, pa.float64())
    values = np.asarray(array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False))
    with np.errstate(invalid="ignore"):
        fits = np.isfinite(values) & (values >= column.low) & (values <= column.high)
    if not fits.all():
        i = int(np.argmin(fits))
        expected = "a finite number"
        if column.high < math.inf:
            expected = f"in [{column.low:g}, {column.high:g}]"
        elif column.low > -math.inf:
            expected = f"finite and >= {column.low:g}"
        raise fault(i, f"should be {expected}. Received: {array[i].as_py()}")
    return values


def _first_uncastable(values: pa.Array, dtype: pa.DataType) -> int:
    """Index of the first value that does not cast; there is one."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values.slice(low, middle - low).cast(dtype)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low
