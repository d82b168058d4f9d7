"""Columns of Arrow arrays, checked and made blocks of NumPy arrays."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qianmo.layers.schema import Domain
from qianmo.pipelines.data import keys
from qianmo.pipelines.data.columns import Block, Column, Part, check_type, is_string, is_time
from qianmo.pipelines.data.errors import DataError
from qianmo.pipelines.data.tally import Tally

_Array = npt.NDArray[Any]
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_HAS_ZONE = r"[T ].*(Z|[+-]\d{2}(:?\d{2})?)$"  # of an ISO 8601 time


def is_of(values: _Array, domains: Iterable[Domain]) -> npt.NDArray[np.bool_]:
    """Which rows are of these domains, given the column of all rows' domains."""
    if values.dtype != object:
        return np.isin(values, [*domains])
    named = pa.array([str(domain).encode() for domain in domains], pa.binary())
    found = pc.is_in(pa.array(values, pa.binary()), value_set=named)
    return np.asarray(found.to_numpy(zero_copy_only=False))


def block_of(
    part: Part,
    columns: Sequence[Column],
    arrays: Mapping[str, pa.Array],
    text: Container[str],
    tally: Tally,
) -> Block:
    """Checks consecutive rows' columns and makes them a block.

    Args:
      part: where they come from; its `first_row` is that of the arrays' first values.
      columns: what they should be, the domain first: it says which rows have the others.
      arrays: the values.
      text: the columns that come as text, still to be parsed.
      tally: counts what is cut off.

    Raises:
      DataError: a value does not fit.
    """
    block: Block = {}
    domain: _Array | None = None
    for column in columns:
        array = arrays[column.name]
        is_text = column.name in text
        if not is_text:
            check_type(part, column, array.type)
        if pa.types.is_null(array.type):
            array = _nulls(column, len(array))
        values = _Values(part, column, is_text, np.arange(len(array)), tally)
        block |= _converted(values, array, domain)
        if column.tells_domain:
            domain = block[column.name]
    return block


def _nulls(column: Column, count: int) -> pa.Array:
    kind = {"int64": pa.int64(), "string": pa.string(), "float32": pa.float64()}[column.dtype]
    return pa.nulls(count, pa.list_(kind) if column.max_length else kind)


def _converted(values: _Values, array: pa.Array, domain: _Array | None) -> Block:
    """Checks a column's values, those of the domains that own it alone."""
    part, column = values.part, values.column
    if not column.owners or domain is None:  # what has owners has a column of domains beside it
        return values.arrays(array)
    own = is_of(domain, column.owners)
    is_given = pc.is_valid(array).to_numpy(zero_copy_only=False)
    if column.max_length:
        is_given &= pc.fill_null(pc.list_value_length(array), 0).to_numpy() > 0
    elif pa.types.is_floating(array.type):
        is_given &= ~np.isnan(array.to_numpy(zero_copy_only=False))  # NaN is no value
    foreign = is_given & ~own
    if foreign.any() and not column.is_label:
        row = int(np.argmax(foreign))
        raise part.error(
            column.name,
            part.first_row + row,
            f"belongs to domains {column.owners} and should be absent from a row of domain "
            f"{_shown(domain[row])}. Received: {array[row].as_py()!r}. Leave it empty, or let the "
            "feature's `domains` name that domain.",
        )
    of_owners = dataclasses.replace(values, rows=values.rows[own])
    block = {}
    for name, found in of_owners.arrays(array.filter(pa.array(own))).items():
        fill = math.nan if column.is_label else b"" if found.dtype == object else 0
        block[name] = np.full((len(array), *found.shape[1:]), fill, found.dtype)
        block[name][own] = found
    return block


def _shown(domain: Any) -> str:
    return domain.decode() if isinstance(domain, bytes) else str(domain)


@dataclasses.dataclass(frozen=True)
class _Values:
    """Values of a column, the i-th of row `rows[i]` of a part."""

    part: Part
    column: Column
    is_text: bool
    rows: npt.NDArray[np.int64]
    tally: Tally

    def arrays(self, array: pa.Array) -> Block:
        """The column as NumPy arrays, a list as two.

        Raises:
          DataError: a value does not fit.
        """
        name, width = self.column.name, self.column.max_length
        array = _decoded(array)
        if array.null_count and self.column.default is None:
            row = int(self.rows[pc.index(pc.is_null(array), True).as_py()])
            raise self._error(row, f"is null or absent. {self.column.null_remedy}")
        if not width:
            return {name: self._flat(self._filled(array))}
        lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
        flat = _decoded(pc.list_flatten(array))
        rows = np.repeat(self.rows, lengths)
        if flat.null_count:
            if self.column.default is None:
                row = int(rows[pc.index(pc.is_null(flat), True).as_py()])
                raise self._error(
                    row, "its list holds a null. Leave it out, or give the feature `default` []."
                )
            is_value = pc.is_valid(flat).to_numpy(zero_copy_only=False)
            before = np.append(0, np.cumsum(is_value))
            ends = np.cumsum(lengths)
            lengths = before[ends] - before[ends - lengths]
            flat, rows = flat.filter(pa.array(is_value)), rows[is_value]
        values = dataclasses.replace(self, rows=rows)._flat(flat)
        kept = np.minimum(lengths, width)
        self.tally.lists[name] += len(lengths)
        self.tally.cut_lists[name] += int((lengths > width).sum())
        self.tally.cut_values[name] += int((lengths - kept).sum())
        starts = np.cumsum(lengths) - (kept if self.column.keep == "last" else lengths)
        empty = b"" if self.column.dtype == "string" else 0
        padded = np.full((len(array), width), empty, values.dtype)
        slot = np.arange(width)
        is_value = slot < kept[:, None]
        padded[is_value] = values[(starts[:, None] + slot)[is_value]]
        return {name: padded, f"{name}_length": kept}

    def _error(self, row: int, fault: str) -> DataError:
        return self.part.error(self.column.name, self.part.first_row + row, fault)

    def _wrong(self, i: int, value: Any, expected: str = "") -> DataError:
        expected = expected or self.column.expected
        fault = f"should be {expected}. Received: {value!r}. Correct the value or leave the row out"
        return self._error(int(self.rows[i]), f"{fault}.")

    def _filled(self, array: pa.Array) -> pa.Array:
        """The values with the default for nulls; those of float32 stay null."""
        if not array.null_count or self.column.dtype == "float32":
            return array
        if self.is_text:
            return pc.fill_null(array, str(self.column.default).encode())
        kind = pa.string() if self.column.dtype == "string" else pa.int64()
        return pc.fill_null(self._cast(array, kind), self.column.default)

    def _flat(self, array: pa.Array) -> _Array:
        if self.is_text:
            array = self._cast(array, pa.string())
        kind = self.column.kind
        if kind in ("string", "name"):
            return self._strings(array)
        if kind == "float32":
            return self._numbers(array)
        if kind == "time":
            return self._times(array)
        if kind == "key":
            return self._keys(array)
        return self._integers(array)

    def _integers(self, array: pa.Array) -> _Array:
        if is_string(array.type):
            # pyarrow reads hexadecimal numbers too, 0xFFFFFFFFFFFFFFFF as -1.
            is_hex = pc.or_(pc.starts_with(array, "0x"), pc.starts_with(array, "0X"))
            if (i := pc.index(is_hex, True).as_py()) >= 0:
                raise self._wrong(i, array[i].as_py())
        return np.asarray(self._cast(array, pa.int64()).to_numpy(zero_copy_only=False))

    def _cast(self, array: pa.Array, dtype: pa.DataType) -> pa.Array:
        try:
            return array.cast(dtype)
        except pa.ArrowInvalid:
            i = _first_uncastable(array, dtype)
            raise self._wrong(i, array[i].as_py()) from None

    def _strings(self, array: pa.Array) -> _Array:
        # A batch has few distinct strings: each becomes one Python object.
        encoded = self._cast(array, pa.string()).dictionary_encode()
        distinct = encoded.dictionary.cast(pa.binary()).to_numpy(zero_copy_only=False)
        return np.asarray(distinct[encoded.indices.to_numpy()])

    def _numbers(self, array: pa.Array) -> _Array:
        if is_string(array.type) or pa.types.is_decimal(array.type):
            array = self._cast(array, pa.float64())
        floats = array.cast(pa.float32(), safe=False)
        values = np.asarray(floats.to_numpy(zero_copy_only=False))  # nulls are NaN
        low, high = self.column.low, self.column.high
        with np.errstate(invalid="ignore"):
            fits = np.isfinite(values) & (values >= low) & (values <= high)
        if self.column.default is not None:
            fits |= np.isnan(values)
        if not fits.all():
            expected = "a finite number"
            if high < math.inf:
                expected = f"in [{low:g}, {high:g}]"
            elif low > -math.inf:
                expected = f"finite and >= {low:g}"
            i = int(np.argmin(fits))
            if np.isnan(values[i]):
                fault = f"should be {expected}. Received: nan. {self.column.null_remedy}"
                raise self._error(int(self.rows[i]), fault)
            raise self._wrong(i, array[i].as_py(), expected)
        return values

    def _times(self, array: pa.Array) -> _Array:
        """Integers as they are, datetimes and dates in the column's unit, rounded down.

        Of text the first value tells which it is.
        """
        if is_string(array.type):
            texts = self._cast(array, pa.string())
            if len(texts) and re.fullmatch(r"-?[0-9]+", texts[0].as_py()):
                return self._integers(texts)
            return self._parsed_times(texts)
        if not is_time(array.type):
            return self._integers(array)
        if pa.types.is_date(array.type):
            array = array.cast(pa.timestamp("s"))
        ticks = array.cast(pa.int64()).to_numpy(zero_copy_only=False)
        return self._in_unit(ticks, _TICKS[array.type.unit])

    def _in_unit(self, ticks: _Array, per_second: int) -> _Array:
        unit = self.column.unit
        if unit <= per_second:
            return np.asarray(ticks // (per_second // unit))
        factor = unit // per_second
        most = np.iinfo(np.int64).max // factor
        fits = (ticks >= -most) & (ticks <= most)
        if not fits.all():
            i = int(np.argmin(fits))
            seconds = int(ticks[i] // per_second)
            raise self._wrong(i, seconds, "seconds since 1970 that fit in `timestamp_unit`")
        return np.asarray(ticks * factor)

    def _parsed_times(self, array: pa.Array) -> _Array:
        """Times of ISO 8601; without a zone they are in UTC."""
        has_zone = pc.match_substring_regex(array, _HAS_ZONE).to_numpy(zero_copy_only=False)
        # More than six digits after the point need nanoseconds, whose years are fewer.
        is_fine = pc.match_substring_regex(array, r"\.\d{7}").to_numpy(zero_copy_only=False)
        times = np.empty(len(array), np.int64)
        for own, unit, zone in (
            (has_zone & ~is_fine, "us", "UTC"),
            (~has_zone & ~is_fine, "us", None),
            (has_zone & is_fine, "ns", "UTC"),
            (~has_zone & is_fine, "ns", None),
        ):
            if own.any():
                values = dataclasses.replace(self, rows=self.rows[own])
                parsed = values._cast(array.filter(pa.array(own)), pa.timestamp(unit, zone))
                times[own] = values._in_unit(parsed.cast(pa.int64()).to_numpy(), _TICKS[unit])
        return times

    def _keys(self, array: pa.Array) -> _Array:
        """An integer for each value, equal where values are; see `keys.groups`."""
        if is_string(array.type):
            return keys.of_strings(self._cast(array, pa.string()))
        if pa.types.is_floating(array.type):
            return keys.of_values(array.to_numpy(zero_copy_only=False))
        if pa.types.is_date(array.type):
            array = array.cast(pa.timestamp("ms"))
        return np.asarray(array.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


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
