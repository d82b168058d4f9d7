"""Fuzzes rows that come one by one as text, the entries of a Redis stream."""

from __future__ import annotations

import pathlib
import re

from fuzz import oracle
from fuzz.choices import Choices
from fuzz.oracle import COLUMNS, FITTING, GOOD, LAX, STRICT, TOKENS

from qianmo.pipelines.data import readers

_PLACE = re.compile(r"^stream, entry (\d+)-0, column `(\w+)`: ")


def _row(choices: Choices) -> dict[bytes, bytes]:
    row = {name.encode(): value for name, value in GOOD.items()}
    for _ in range(max(0, choices.number(8) - 4)):
        name = choices.pick(COLUMNS).encode()
        kind = choices.number(16)
        if kind == 0:
            row.pop(name, None)
        elif kind < 3:
            row[name] = choices.take(1 + choices.number(24))
        elif kind < 6:
            row[name] = choices.pick(TOKENS)
        else:
            row[name] = choices.pick(FITTING[name.decode()])
    return row


def check(data: bytes, folder: pathlib.Path) -> str:
    """Reads the rows that an input stands for; fails where they or the refusal are wrong."""
    del folder
    choices = Choices(data)
    schema = choices.pick((STRICT, LAX))
    rows = [_row(choices) for _ in range(1 + choices.number(6))]
    ids = [f"{number}-0" for number in range(len(rows))]
    table = [{name: row.get(name.encode()) for name in COLUMNS} for row in rows]
    expected, faults = oracle.rows(schema, table)
    refusal = ""
    try:
        block = readers.text_block(schema, "stream", ids, rows)
    except readers.DataError as error:
        refusal = str(error)
    if refusal:
        place = _PLACE.match(refusal)
        assert place, f"the error names no entry: {refusal}"
        assert (place[2], int(place[1])) in faults, f"names a value that is right: {refusal}"
        return "refused"
    assert not faults, f"read, and should be refused: {sorted(faults)[:3]}"
    oracle.assert_same(oracle.of_blocks(schema, [block]), expected)
    return "read"


def seeds() -> list[bytes]:
    """Rows with a value of each kind."""
    right = [bytes([schema, rows, *[0] * rows]) for schema in (0, 1) for rows in (0, 2)]
    values = range(len(TOKENS))
    fitting = [
        bytes([schema, 0, 5, column, 7, value])
        for schema in (0, 1) for column, name in enumerate(COLUMNS)
        for value in range(len(FITTING[name]))
    ]  # fmt: skip
    return right + fitting + [bytes([i % 2, 0, 5, i % len(COLUMNS), 4, i]) for i in values] + [
        bytes([schema, 0, 5, column, 1, 3]) + b"1|2|3"[: column % 4 + 1]
        for schema in (0, 1) for column in range(len(COLUMNS))
    ]  # fmt: skip
