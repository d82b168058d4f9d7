"""Fuzzes TFRecord files against a reader of their frames and protobuf's own parser."""

from __future__ import annotations

import pathlib
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from fuzz import oracle
from fuzz.choices import Choices, damaged
from fuzz.oracle import COLUMNS, LAX, STRICT, WrongError
from google.protobuf.message import DecodeError

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers

_ROW = re.compile(r"column `(\w+)`, row (\d+) \(counted from 0\)")
_GOOD = {
    "i": [3], "s": [b"x"], "l": [1, 2], "w": [b"a", b"b"], "d": [0.25], "y": [1.0], "r": [4.5],
    "q": [1.0], "t": [1700000000], "k": [b"user"], "e": [9], "g": [b"a"],
}  # fmt: skip
_OTHERS = (
    [], [0], [-1], [2**63 - 1], [-(2**63)], [1, 2, 3, 4], [0.5], [float("nan")], [float("inf")],
    [-0.0], [1e-45], [2.0], [b""], [b"\xff"], [b"a", b"b", b"c", b"d"], ["京".encode()],
    [b"2024-05-01"], [b"12"], [0.5, 0.5], None,
)  # fmt: skip
_INTEGERS = ([0], [2**63 - 1], [-(2**63)])
_STRINGS = ([b""], ["京".encode()], [b"\0"])
_FITTING = {
    "i": _INTEGERS, "e": _INTEGERS, "t": _INTEGERS, "s": _STRINGS, "k": _STRINGS, "g": _STRINGS,
    "l": ([], [5], [1, 2, 3, 4, 5]), "w": ([], [b""], [b"a", b"b", b"c", b"d"]),
    "d": ([-0.0], [1e-45], [-3e38]), "r": ([1e-45], [-0.5]), "y": ([0.0], [0.25]),
    "q": ([0.0], [1e9]),
}  # fmt: skip
# How a column may be stored, also where all of its lists are empty.
_KINDS = {
    name: set(kinds)
    for names, kinds in (
        ("iel", ("int64_list",)),
        ("skw", ("bytes_list",)),
        ("tg", ("int64_list", "bytes_list")),
        ("dyrq", ("int64_list", "float_list")),
    )
    for name in names
}
_TABLE = [0] * 256
for _byte in range(256):
    _crc = _byte
    for _ in range(8):
        _crc = _crc >> 1 ^ (0x82F63B78 if _crc & 1 else 0)
    _TABLE[_byte] = _crc


def _masked(data: bytes) -> int:
    """The masked CRC-32C of a TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def frame(payload: bytes) -> bytes:
    """A record."""
    length = struct.pack("<Q", len(payload))
    sums = struct.pack("<I", _masked(length)), struct.pack("<I", _masked(payload))
    return length + sums[0] + payload + sums[1]


def payloads(data: bytes) -> Iterator[bytes]:
    """The records of a file.

    Raises:
      WrongError: one is damaged, or cut off.
    """
    at = 0
    while at < len(data):
        head = data[at : at + 12]
        if len(head) < 12 or struct.unpack("<I", head[8:])[0] != _masked(head[:8]):
            raise WrongError
        (size,) = struct.unpack("<Q", head[:8])
        payload, foot = data[at + 12 : at + 12 + size], data[at + 12 + size : at + 16 + size]
        if len(payload) < size or len(foot) < 4 or struct.unpack("<I", foot)[0] != _masked(payload):
            raise WrongError
        yield payload
        at += 16 + size


def _scalar(schema: Schema, name: str, values: Sequence[Any]) -> Any:
    """The value of a column that has one a row."""
    lax = schema is LAX
    if not values:
        if not lax or name == "t":
            raise WrongError
        return {"i": -1, "s": b"none"}.get(name, float("nan"))
    if len(values) > 1:
        raise WrongError
    value = values[0]
    if name in ("i", "e", "t") and isinstance(value, int):
        return value
    if name == "g" and isinstance(value, int):
        return str(value).encode()
    if name in ("s", "k", "g") and isinstance(value, bytes):
        return oracle.string(value)
    if name in ("d", "y", "r", "q") and not isinstance(value, bytes):
        number = oracle.number(repr(value).encode(), 0 if name in ("y", "q") else -float("inf"),
                               1 if name == "y" else float("inf"))  # fmt: skip
        if number != number and not lax:
            raise WrongError
        return number
    raise WrongError


def _value(schema: Schema, name: str, values: Sequence[Any]) -> Any:
    if name not in ("l", "w"):
        return _scalar(schema, name, values)
    feature = next(f for f in schema.categorical if f.name == name)
    if any(isinstance(value, bytes) != (name == "w") or type(value) is float for value in values):
        raise WrongError
    items = [oracle.string(v) if name == "w" else v for v in values]
    size = feature.max_length
    return items[:size] if feature.keep == "first" else items[-size:]


def _expected(schema: Schema, data: bytes) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
      WrongError: it should be refused.
    """
    names = [name for name in COLUMNS if schema is STRICT or name in oracle._OF_LAX]
    kinds: dict[str, set[str]] = {name: set() for name in names}
    table = []
    for payload in payloads(data):
        try:
            features = tf.train.Example.FromString(payload).features.feature
        except DecodeError:
            raise WrongError from None
        row: dict[str, Sequence[Any]] = {}
        for name in names:
            kind = features[name].WhichOneof("kind") if name in features else None
            row[name] = [*getattr(features[name], kind).value] if kind else []
            kinds[name] |= {kind} if kind else set()
        table.append(row)
    if not table or any(len(kinds[name]) > 1 or not kinds[name] <= _KINDS[name] for name in names):
        raise WrongError
    times = [row["t"] for row in table]
    found = []
    for number, row in enumerate(table):
        if kinds["t"] == {"bytes_list"}:
            if any(len(values) != 1 for values in times):
                raise WrongError
            time = oracle.times(schema, [values[0] for values in times], True)[number]
            if time is None:
                raise WrongError
            row["t"] = [time]
        found.append({name: _value(schema, name, row[name]) for name in names})
    return found


def _example(choices: Choices) -> bytes:
    row: dict[str, Any] = dict(_GOOD)
    for _ in range(max(0, choices.number(8) - 4)):
        name = choices.pick(COLUMNS)
        row[name] = choices.pick(_OTHERS if choices.number(4) == 0 else _FITTING[name])
    example = tf.train.Example()
    for name, values in row.items():
        if values is None:
            continue
        feature = example.features.feature[name]
        if not values:
            choices.pick((feature.int64_list, feature.bytes_list, feature.float_list)).SetInParent()
        elif isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return example.SerializeToString()


def _file(choices: Choices) -> bytes:
    form = choices.number(8)
    records = []
    for _ in range(1 + choices.number(4)):
        payload = _example(choices)
        records.append(frame(damaged(choices, payload) if form >= 6 else payload))
    data = b"".join(records)
    if form == 5:
        data = damaged(choices, data)
    if form == 4:  # of a length that the file has not, its checksum right
        length = struct.pack("<Q", choices.pick((0, 1, 2**16, 2**31, 2**40, 2**62, 2**64 - 1)))
        data += length + struct.pack("<I", _masked(length)) + choices.take(20)
    return data


def check(data: bytes, folder: pathlib.Path) -> str:
    """Reads what an input stands for; fails where rows or the refusal are wrong."""
    choices = Choices(data)
    schema = choices.pick((STRICT, LAX))
    written = _file(choices)
    file = folder / "a.tfrecord"
    file.write_bytes(written)
    refusal = ""
    read: list[Any] = []
    try:
        read = list(readers.blocks(schema, file))
    except readers.DataError as error:
        refusal = str(error)
        assert str(file) in refusal, f"the error names no file: {refusal}"
    try:
        rows = _expected(schema, written)
    except WrongError:
        rows = []
    if not rows:
        assert refusal, "read, and should be refused"
        return "refused"
    assert not refusal, f"refused, and should be read: {refusal}"
    oracle.assert_same(oracle.of_blocks(schema, read), rows)
    return "read"


def seeds() -> list[bytes]:
    """Files of each form."""
    return [
        bytes([schema, form, rows, *change, 0, 0, 0, 0, 9, 9, 9])
        for schema in (0, 1) for form in (0, 4, 5, 6) for rows in (0, 2)
        for change in ([0], [5, 3, 0, 9], [5, 2, 1, 2], [6, 1, 0, 14, 2, 0, 5], [5, 0, 0, 18])
    ]  # fmt: skip
