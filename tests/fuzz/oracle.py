"""What files of text mean, written apart from the readers: slow, cell by cell, in plain Python.

It follows docs/data.md. A cell is bytes, or None where there is nothing.
"""

from __future__ import annotations

import collections
import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qianmo.layers.schema import Schema

Cell = bytes | None
Row = dict[str, Any]

STRICT = Schema.from_config(
    {
        "features": [
            {"name": "i"},
            {"name": "s", "dtype": "string"},
            {"name": "l", "max_length": 3},
            {"name": "w", "dtype": "string", "max_length": 2, "keep": "first"},
            {"kind": "dense", "name": "d"},
        ],
        "labels": ["y", "r"],
        "label_kinds": {"r": "rating"},
        "weight": "q",
        "timestamp": "t",
        "task_id": "k",
        "task_dtype": "string",
        "event_id": "e",
        "group": "g",
    }
)
LAX = Schema.from_config(
    {
        "features": [
            {"name": "i", "default": -1},
            {"name": "s", "dtype": "string", "default": "none"},
            {"name": "l", "max_length": 2, "keep": "first", "default": ()},
            {"name": "w", "dtype": "string", "max_length": 3, "default": ()},
            {"kind": "dense", "name": "d", "indicator": True},
        ],
        "labels": ["y", "r"],
        "label_kinds": {"r": "rating"},
        "optional_labels": ["y", "r"],
        "timestamp": "t",
        "timestamp_unit": "s",
    }
)
COLUMNS = ("i", "s", "l", "w", "d", "y", "r", "q", "t", "k", "e", "g")
_OF_LAX = {"i", "s", "l", "w", "d", "y", "r", "t"}

_INTEGER = re.compile(rb"-?[0-9]+")
_FLOAT = re.compile(rb"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_NAN = re.compile(rb"[+-]?nan(\([A-Za-z0-9_]*\))?", re.IGNORECASE)
_TIME = re.compile(
    rb"(\d{4})-(\d\d)-(\d\d)(?:[ T](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?)?"
    rb"(Z|[+-]\d\d(?::?\d\d)?)?)?"
)
_UNITS = {"s": 10**9, "us": 10**3}  # in nanoseconds


class WrongError(Exception):
    """A value that does not fit its column."""


def integer(text: bytes) -> int:
    """An int64."""
    if not _INTEGER.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        raise WrongError
    return int(text)


def string(text: bytes) -> bytes:
    """A string, which is UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        raise WrongError from None
    return text


def number(text: bytes, low: float = -math.inf, high: float = math.inf) -> float:
    """A float32, or NaN; the nearest one of the nearest float64."""
    if _NAN.fullmatch(text):
        return math.nan
    if not _FLOAT.fullmatch(text):
        raise WrongError
    with np.errstate(over="ignore"):
        value = float(np.float32(float(text)))
    if not math.isfinite(value) or not low <= value <= high:
        raise WrongError
    return value


def nanoseconds(text: bytes) -> int:
    """A time of ISO 8601 since 1970; one finer than microseconds is of the years 1678 to 2261."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise WrongError
    year, *parts = (int(part or 0) for part in match.groups()[:6])
    month, day, hour, minute, second = parts
    try:
        # The calendar repeats every 400 years, of 146,097 days; Python's has no year 0.
        date = datetime.date(2000 + year % 400, month, day)
        datetime.time(hour, minute, second)
    except ValueError:
        raise WrongError from None
    days = (date - datetime.date(1970, 1, 1)).days + (year // 400 - 5) * 146_097
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second
    zone = match[8]
    if zone and zone != b"Z":
        hours, minutes = int(zone[1:3]), int(zone[-2:] if len(zone) > 3 else 0)
        if hours > 23 or minutes > 59:
            raise WrongError
        seconds -= (-1 if zone[:1] == b"-" else 1) * (hours * 60 + minutes) * 60
    fraction = match[7] or b""
    time = seconds * 10**9 + int(fraction.ljust(9, b"0"))
    if len(fraction) > 6 and not -(2**63) <= time < 2**63:
        raise WrongError
    return time


def _item_lists(cell: Cell) -> list[bytes]:
    return cell.split(b"|") if cell else []


def _converted(schema: Schema, name: str, cell: Cell) -> Any:
    """The value of a cell of any column but the time."""
    lax = schema is LAX
    if name in ("l", "w"):
        feature = next(f for f in schema.categorical if f.name == name)
        convert = integer if name == "l" else string
        items = [convert(item) for item in _item_lists(cell)]
        size = feature.max_length
        return items[:size] if feature.keep == "first" else items[-size:]
    if cell is None:
        if not lax:
            raise WrongError
        return {"i": -1, "s": b"none"}.get(name, math.nan)
    if name in ("i", "e"):
        return integer(cell)
    if name in ("s", "k", "g"):
        return string(cell)
    value = number(cell, 0 if name in ("y", "q") else -math.inf, 1 if name == "y" else math.inf)
    if math.isnan(value) and not lax:
        raise WrongError
    return value


def times(schema: Schema, cells: Sequence[Cell], is_one_block: bool) -> list[Any]:
    """The column of times, None where a value does not fit.

    The first value of a block tells whether all are integers or ISO 8601. Where there may be
    several blocks, which row is of which is not known here.
    """
    unit = _UNITS[schema.timestamp_unit]
    texts = [cell or b"" for cell in cells]
    are_integers = _INTEGER.fullmatch(texts[0])
    result: list[Any] = []
    for text in texts:
        if (are_integers or not is_one_block) and _fits(integer, text):
            result.append(integer(text))
        elif (are_integers and is_one_block) or not _fits(nanoseconds, text):
            result.append(None)
        else:
            result.append(nanoseconds(text) // unit)
    return result


def _fits(convert: Any, text: bytes) -> bool:
    try:
        convert(text)
    except WrongError:
        return False
    return True


def rows(
    schema: Schema, table: Iterable[Mapping[str, Cell]], is_one_block: bool = True
) -> tuple[list[Row], set[tuple[str, int]]]:
    """The rows of a table of cells, and the columns and rows of all its faults."""
    table = list(table)
    names = [name for name in COLUMNS if schema is STRICT or name in _OF_LAX]
    columns: dict[str, list[Any]] = collections.defaultdict(list)
    faults = set()
    for row, cells in enumerate(table):
        for name in names:
            if name == "t":
                continue
            try:
                columns[name].append(_converted(schema, name, cells.get(name)))
            except WrongError:
                faults.add((name, row))
                columns[name].append(None)
    columns["t"] = times(schema, [cells.get("t") for cells in table], is_one_block)
    faults |= {("t", row) for row, time in enumerate(columns["t"]) if time is None}
    return [{name: columns[name][row] for name in names} for row in range(len(table))], faults


def same(one: Any, two: Any) -> bool:
    """Whether two values are equal, NaN with itself."""
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two or (one != one and two != two))


def of_blocks(schema: Schema, blocks: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a reader's blocks."""
    result = []
    lists = {f.name for f in schema.categorical if f.is_list}
    names = [name for name in COLUMNS if schema is STRICT or name in _OF_LAX]
    for block in blocks:
        for row in range(len(block["i"])):
            values = {}
            for name in names:
                value = block[name][row]
                if name in lists:
                    length = int(block[f"{name}_length"][row])
                    values[name] = value[:length].tolist()
                    padding = b"" if block[name].dtype == object else 0
                    assert all(item == padding for item in value[length:]), f"padding of {name}"
                else:
                    values[name] = value.item() if isinstance(value, np.generic) else value
            result.append(values)
    return result


def assert_same(read: Sequence[Row], expected: Sequence[Row]) -> None:
    """Fails where rows differ."""
    assert len(read) == len(expected), f"{len(read)} rows, should be {len(expected)}"
    for row, (one, two) in enumerate(zip(read, expected, strict=True)):
        for name, value in two.items():
            assert same(one[name], value), f"row {row}, {name}: {one[name]!r}, not {value!r}"


# Values that are right, at a border, or wrong in some column.
TOKENS = (
    b"0", b"1", b"7", b"-3", b"0.5", b"", b"a", b"abc", b"1|2|3|4", b"a|b|c", b"|", b"1||2",
    b"9223372036854775807", b"-9223372036854775808", b"9223372036854775808", b"007", b"-0",
    b"0x1F", b"0xFFFFFFFFFFFFFFFF", b"+5", b" 5", b"1e3", b"1.5e-3", b"3.4e38", b"3.5e38",
    b"1e400", b"1e-400", b"nan", b"NaN", b"inf", b"-infinity", b"nan(1)", b"16777217", b".5",
    b"1.", b"0.1", b"null", b"NULL", b"N/A", b"\xe4\xba\xac", b"\xff", b"\xed\xa0\x80", b"\0",
    b"\\", b"\\N", b"'", b"2024-05-01", b"2024-05-01T12:30:00.5+02:00", b"2024-05-01 12:30",
    b"2024-05-01T12:30:00.123456789", b"1969-12-31T23:59:59.999999Z", b"9999-12-31",
    b"0000-01-01", b"2024-02-30", b"2024-05-01T24:00", b"2024-05-01T12:30:60", b"true", b"1,5",
    b"a\nb", b"a\r\nb", b"\r", b'"', b'a"b', b'""', b"\xef\xbb\xbf", b"\xc2\xa0", b"x" * 70,
)  # fmt: skip
# A value that fits each column.
GOOD = {
    "i": b"3", "s": b"x", "l": b"1|2", "w": b"a|b", "d": b"0.25", "y": b"1", "r": b"4.5",
    "q": b"1", "t": b"2024-05-01", "k": b"user", "e": b"9", "g": b"a",
}  # fmt: skip
# Values that fit it, at borders.
_INTEGERS = (b"0", b"-3", b"007", b"-0", b"9223372036854775807", b"-9223372036854775808")
_STRINGS = (b"", b"a|b", b" x ", b'a "b" c', b"1,5", b"a\nb", b"a\r\nb", b"\r", b'"', b'""', b"\\",
            b"NULL", b"\xe4\xba\xac", b"\0", b"x" * 70)  # fmt: skip
_TIMES = (
    b"2024-05-01", b"1969-12-31T23:59:59.999999Z", b"9999-12-31", b"0000-01-01",
    b"2024-05-01T12:30:00.5+02:00", b"2024-05-01T12:30:00.123456789", b"1969-12-31 00:01",
)  # fmt: skip
FITTING = {
    "i": _INTEGERS, "e": _INTEGERS, "s": _STRINGS, "k": _STRINGS, "g": _STRINGS, "t": _TIMES,
    "l": (b"", b"1", b"1|2|3|4", b"-1|007|0|5|9", b"1|2|3"),
    "w": (*_STRINGS, b"a|b|c|d", b"|", b"||a|"),
    "d": (b"-0.5", b"+5", b"16777217", b"3.4e38", b"1e-400", b".5", b"0.1"),
    "r": (b"-0.5", b"1e-45", b"1.", b"0.3"), "y": (b"0", b"1", b"0.1"),
    "q": (b"0", b"1e9", b"0.7"),
}  # fmt: skip
