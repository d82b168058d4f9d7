"""Fuzzes Parquet files: rows come back as they were written; of a damaged file, as DuckDB has them.

Files hold checksums of their pages, so damage there is refused. In the footer and in the pages'
headers there are none: what is read in spite of it should be what an independent reader finds.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import io
import math
import pathlib
import re
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fuzz import oracle
from fuzz.choices import Choices, damaged
from fuzz.oracle import COLUMNS, LAX, STRICT, WrongError

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers

_PLACE = re.compile(r"column `(\w+)`, row (\d+) \(counted from 0\)")
_INTEGERS = (pa.int64(), pa.int32(), pa.int8(), pa.uint8(), pa.uint64(), pa.bool_())
_STRINGS = (
    pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()),
    pa.string_view(),
)  # fmt: skip
_NUMBERS = (
    pa.float32(), pa.float64(), pa.float16(), pa.int64(), pa.int8(), pa.decimal128(12, 3),
    pa.bool_(),
)  # fmt: skip
_TIMES = (
    pa.int64(), pa.timestamp("us"), pa.timestamp("ms", "Europe/Paris"), pa.timestamp("ns"),
    pa.date32(), pa.string(),
)  # fmt: skip
_TYPES = {
    "i": _INTEGERS, "e": _INTEGERS, "s": _STRINGS, "k": _STRINGS, "g": (*_STRINGS, pa.int64()),
    "d": _NUMBERS, "y": _NUMBERS, "r": _NUMBERS, "q": _NUMBERS, "t": _TIMES,
    "l": (pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint64())),
    "w": (pa.list_(pa.string()), pa.large_list(pa.binary()),
          pa.list_(pa.dictionary(pa.int8(), pa.string()))),
}  # fmt: skip
_OF_INTEGERS = (1, 0, 5, -1, 2**63 - 1, -(2**63), 2**63, 2**24 + 1, 255)
_OF_STRINGS = (b"a", b"", b"abc", "京".encode(), b"\xff", b"x" * 40)
_OF_NUMBERS = (1.0, 0.0, 0.5, -2.0, math.nan, math.inf, 16777217.0, 1e39, 1e-46)
_OF_TIMES = (b"2024-05-01", b"2024-05-01T12:30:00.5+02:00", b"noon")


def _of_type(choices: Choices, name: str, dtype: pa.DataType) -> Any:
    """A value that the type can hold, as Python's; one that fits the column, mostly."""
    types = pa.types
    if types.is_list(dtype) or types.is_large_list(dtype):
        return [_or_null(choices, name, dtype.value_type) for _ in range(choices.number(6))]
    if types.is_dictionary(dtype):
        return _of_type(choices, name, dtype.value_type)
    if name in ("y", "q", "d", "r") and choices.number(32) < 31:
        if types.is_decimal(dtype):
            return decimal.Decimal(choices.number(9)) / 8
        whole = types.is_integer(dtype) or types.is_boolean(dtype)
        value = choices.pick((1, 0)) if whole else choices.pick((0.5, 0.0, 1.0, 0.125))
        return bool(value) if types.is_boolean(dtype) else value
    if types.is_boolean(dtype):
        return choices.number(2) == 1
    if types.is_integer(dtype):
        value = choices.pick(_OF_INTEGERS)
        info = np.iinfo(dtype.to_pandas_dtype())
        return value if info.min <= value <= info.max else 1
    if types.is_floating(dtype):
        with np.errstate(over="ignore"):
            return float(dtype.to_pandas_dtype()(choices.pick(_OF_NUMBERS)))
    if types.is_decimal(dtype):
        return decimal.Decimal(choices.number(10**6) - 500) / 8
    if types.is_timestamp(dtype):
        return choices.pick((0, 1_714_566_600_123_456, -1, 7))
    if types.is_date(dtype):
        return choices.pick((0, 19_844, -1))
    text = choices.pick(_OF_STRINGS)
    if text == b"\xff" and choices.number(8) < 7:
        text = b"abc"
    if types.is_binary(dtype):
        return text
    return text.decode("utf-8", "ignore")


def _or_null(choices: Choices, name: str, dtype: pa.DataType) -> Any:
    return None if choices.number(64) == 63 else _of_type(choices, name, dtype)


def _table(choices: Choices) -> tuple[pa.Table, dict[str, list[Any]]]:
    """A table, and its values; of times the integers that are stored."""
    count = choices.number(10) + 1
    arrays, values = {}, {}
    for name in COLUMNS:
        dtype = choices.pick(_TYPES[name])
        is_plain = choices.number(2) == 1  # all columns of any values would seldom be read
        column: list[Any] = []
        for _ in range(count):
            if is_plain:
                value: Any = _of_type(Choices(b""), name, dtype)
                column.append(value)
            elif name == "t" and pa.types.is_string(dtype):
                column.append(choices.pick(_OF_TIMES).decode())
            else:
                column.append(_or_null(choices, name, dtype))
        if name == "t" and pa.types.is_string(dtype) and is_plain:
            column = [_OF_TIMES[0].decode()] * count
        values[name] = column
        if pa.types.is_timestamp(dtype):
            arrays[name] = pa.array(column, pa.int64()).cast(dtype)
        elif pa.types.is_date(dtype):
            arrays[name] = pa.array(column, pa.int32()).cast(dtype)
        else:
            arrays[name] = pa.array(column, dtype)
    return pa.table(arrays), values


def _convert(schema: Schema, name: str, dtype: Any, value: Any) -> Any:
    """What a value is in a row; `dtype` is None where Python's type alone tells it."""
    lax = schema is LAX
    if name in ("l", "w"):
        feature = next(f for f in schema.categorical if f.name == name)
        if value is None and lax:
            return []
        if value is None or (None in value and not lax):
            raise WrongError
        items = [_convert(schema, "i" if name == "l" else "s", None, v) for v in value
                 if v is not None]  # fmt: skip
        size = feature.max_length
        return items[:size] if feature.keep == "first" else items[-size:]
    if value is None:
        if not lax or name == "t":
            raise WrongError
        return {"i": -1, "s": b"none"}.get(name, math.nan)
    if name == "t":
        return _time(schema, dtype, value)
    if name in ("i", "e"):
        if not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise WrongError
        return int(value)
    if name in ("s", "k", "g"):
        if isinstance(value, int):
            return str(value).encode()
        return oracle.string(value if isinstance(value, bytes) else value.encode())
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    if math.isnan(number) and lax:
        return number
    low, high = (0 if name in ("y", "q") else -math.inf), (1 if name == "y" else math.inf)
    if not math.isfinite(number) or not low <= number <= high:
        raise WrongError
    return number


def _time(schema: Schema, dtype: Any, value: Any) -> int:
    per_second = {"s": 1, "us": 10**6}[schema.timestamp_unit]
    if isinstance(value, str):
        (time,) = oracle.times(schema, [value.encode()], True)
        if time is None:
            raise WrongError
        return int(time)
    if isinstance(value, datetime.date):  # DuckDB's
        zone = datetime.UTC
        if not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day, tzinfo=zone)
        value = value if value.tzinfo else value.replace(tzinfo=zone)
        micros = (value - datetime.datetime(1970, 1, 1, tzinfo=zone)) // datetime.timedelta(0, 0, 1)
        return micros * per_second // 10**6
    if dtype is not None and pa.types.is_date(dtype):
        return int(value) * 86_400 * per_second
    if dtype is not None and pa.types.is_timestamp(dtype):
        ticks = {"ms": 10**3, "us": 10**6, "ns": 10**9}[dtype.unit]
        wide = int(value) * per_second
        if per_second > ticks and not -(2**63) <= wide // ticks < 2**63:
            raise WrongError
        return wide // ticks
    return int(value)


def _rows(
    schema: Schema, types: dict[str, Any], values: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], set[tuple[str, int]]]:
    """The rows, and the columns and rows of all faults."""
    names = [name for name in COLUMNS if schema is STRICT or name in oracle._OF_LAX]
    faults = set()
    columns: dict[str, list[Any]] = collections.defaultdict(list)
    for name in names:
        for row, value in enumerate(values[name]):
            try:
                columns[name].append(_convert(schema, name, types.get(name), value))
            except (WrongError, TypeError, AttributeError, ValueError, OverflowError):
                columns[name].append(None)
                faults.add((name, row))
    count = len(values["i"])
    return [{name: columns[name][row] for name in names} for row in range(count)], faults


def _of_duckdb(schema: Schema, file: pathlib.Path) -> list[dict[str, Any]] | None:
    """The rows as DuckDB reads them; None where it does not, or they do not fit the schema."""
    names = [name for name in COLUMNS if schema is STRICT or name in oracle._OF_LAX]
    listed = ", ".join(f'"{name}"' for name in names)
    try:
        with duckdb.connect(config={"threads": 1, "memory_limit": "500MB"}) as connection:
            connection.execute("SET TimeZone='UTC'")
            found = connection.execute(f"SELECT {listed} FROM '{file}'").fetchall()
    except (duckdb.Error, UnicodeDecodeError, ValueError, OverflowError):
        return None
    columns = zip(*found, strict=True) if found else [()] * len(names)
    values = {name: [*column] for name, column in zip(names, columns, strict=True)}
    rows, faults = _rows(schema, {}, values)
    return None if faults else rows


def check(data: bytes, folder: pathlib.Path) -> str:
    """Reads what an input stands for; fails where rows or the refusal are wrong."""
    choices = Choices(data)
    schema = choices.pick((STRICT, LAX))
    is_damaged = choices.number(2) == 1
    options = {
        "row_group_size": choices.pick((64, 3, 1)),
        "compression": choices.pick(("none", "snappy", "zstd", "gzip")),
        "use_dictionary": choices.number(2) == 1,
        "data_page_version": choices.pick(("1.0", "2.0")),
        "store_schema": choices.number(2) == 1,
    }
    table, values = _table(choices)
    types = {field.name: field.type for field in table.schema}
    stream = io.BytesIO()
    pq.write_table(table, stream, write_page_checksum=True, **options)
    written = stream.getvalue()
    if is_damaged:
        start = choices.pick((0, len(written) // 2, len(written) - len(written) // 4))
        written = written[:start] + damaged(choices, written[start:])
    file = folder / "a.parquet"
    file.write_bytes(written)
    refusal = ""
    read: list[Any] = []
    try:
        read = oracle.of_blocks(schema, readers.blocks(schema, file))
        count = readers.count_rows(schema, file)
    except readers.DataError as error:
        refusal = str(error)
        assert str(file) in refusal, f"the error names no file: {refusal}"
    rows, faults = _rows(schema, types, values)
    if not is_damaged:
        assert bool(refusal) == bool(faults or not rows), refusal or f"read: {sorted(faults)[:3]}"
        place = _PLACE.search(refusal)
        assert not place or (place[1], int(place[2])) in faults, f"names a right value: {refusal}"
    if refusal:
        return "refused"
    assert count == len(read), f"count_rows: {count}, and {len(read)} were read"
    if not faults and _is_same(read, rows):
        return "read"
    assert is_damaged, "rows differ from those that were written"
    other = _of_duckdb(schema, file)
    if other is None:
        return "read, and not by DuckDB"
    oracle.assert_same(read, other)
    return "read otherwise, by DuckDB too"


def _is_same(read: list[dict[str, Any]], rows: list[dict[str, Any]]) -> bool:
    try:
        oracle.assert_same(read, rows)
    except AssertionError:
        return False
    return True


def seeds() -> list[bytes]:
    """Files of all types and options, whole and damaged."""
    return [
        bytes([schema, bad, form, form, form, form, form, 3 + form, *([kind, 1] * 12), at, 1, 0, 9])
        for schema in (0, 1) for bad in (0, 1) for form in range(4) for kind in range(4)
        for at in (0, 2)
    ]  # fmt: skip
