"""Fuzzes CSV files against a parser of RFC 4180 of its own, and that against Python's."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import pathlib
import re
import zlib

from fuzz import oracle
from fuzz.choices import Choices, damaged
from fuzz.oracle import FITTING, GOOD, LAX, STRICT, TOKENS

from qianmo.pipelines.data import csv_files, readers

_BLOCKS = (csv_files._BLOCK_BYTES, csv_files._BLOCK_BYTES, 64, 129)
_SMALL = 1024  # below this a block is one of a test
_ROW = re.compile(r"column `(\w+)`, row (\d+) \(counted from 0\)")


class RefusedError(Exception):
    """A file that RFC 4180 does not allow."""


def records(data: bytes) -> list[list[tuple[bytes, bool]]]:
    """The cells of each record, and whether they stand in quotes."""
    found = []
    at = 0
    while at < len(data):
        record = []
        while True:
            if data[at : at + 1] == b'"':
                text = b""
                while True:
                    end = data.find(b'"', at + 1)
                    if end < 0:
                        raise RefusedError("never closed")
                    text += data[at + 1 : end]
                    at = end + 1
                    if data[at : at + 1] != b'"':
                        break
                    text += b'"'
                record.append((text, True))
            else:
                match = re.compile(b"[^,\r\n]*").match(data, at)
                assert match is not None
                if b'"' in match[0]:
                    raise RefusedError("a quote in a cell without quotes")
                record.append((match[0], False))
                at = match.end()
            if data[at : at + 1] != b",":
                break
            at += 1
        if at < len(data) and data[at] not in b"\r\n":
            raise RefusedError("text after a closing quote")
        at += 2 if data[at : at + 2] == b"\r\n" else 1
        found.append(record)
    return found


def _assert_python_agrees(data: bytes, found: list[list[tuple[bytes, bool]]]) -> None:
    """Python's parser knows bytes as Latin-1, and blank lines as records without cells."""
    text = io.StringIO(data.decode("latin-1"), newline="")
    own = [[] if r == [(b"", False)] else [cell.decode("latin-1") for cell, _ in r] for r in found]
    assert [*csv.reader(text, strict=True)] == own, "Python's csv module reads other cells"


def expected(data: bytes) -> list[dict[str, bytes | None]]:
    """The table of a file's cells.

    Raises:
      RefusedError: there is none.
    """
    data = data.removeprefix(b"\xef\xbb\xbf")
    found = records(data)
    _assert_python_agrees(data, found)
    if not found:
        raise RefusedError("empty")
    header = [name for name, _ in found[0]]
    blank = [(b"", False)]
    table = []
    for record in found[1:]:
        if record == blank and len(header) > 1:
            continue
        if len(record) != len(header):
            raise RefusedError("cells")
        cells = [None if cell == blank[0] else cell[0] for cell in record]
        table.append(dict(zip([n.decode("latin-1") for n in header], cells, strict=True)))
    if not table:
        raise RefusedError("no rows")
    return table


def _cell(choices: Choices, name: str, is_good: bool) -> bytes:
    kind = 0 if is_good else choices.number(32)
    text = GOOD[name]
    if kind >= 30:
        text = choices.take(3) if kind == 31 else choices.pick(TOKENS)
    elif kind >= 8:
        text = choices.pick(FITTING[name])
    style = choices.number(16)
    if style == 15 and not is_good:
        return text  # as it is, whatever it holds
    if style < 8 and not set(text) & set(b'",\r\n'):
        return text
    return b'"' + text.replace(b'"', b'""') + b'"'


def written(choices: Choices) -> bytes:
    """A file that is mostly right."""
    end = choices.pick((b"\n", b"\r\n", b"\r"))
    names = list(oracle.COLUMNS)
    for _ in range(choices.number(3)):
        names.append(names.pop(choices.number(len(names))))
    if choices.number(8) == 7:
        names.append(choices.pick(("x", "", "y ", "\xe9", "i")))
    lines = [b",".join(name.encode("latin-1") for name in names)]
    while choices and len(lines) < 40:
        if choices.number(10) == 9:
            lines.append(choices.pick((b"", b" ", b'""', b",", choices.take(2))))
            continue
        is_good = choices.number(2) == 1
        cells = (_cell(choices, n if n in GOOD else "s", is_good) for n in names)
        lines.append(b",".join(cells))
    return (b"\xef\xbb\xbf" if choices.number(8) == 7 else b"") + end.join(lines) + end


def check(data: bytes, folder: pathlib.Path) -> str:
    """Reads what an input stands for; fails where rows or the refusal are wrong."""
    choices = Choices(data)
    schema = choices.pick((STRICT, LAX))
    block = choices.pick(_BLOCKS)
    form = choices.number(8)
    is_zipped = choices.number(8) == 7
    text = choices.rest() if form == 7 else written(choices)
    text = damaged(choices, text) if form >= 5 else text
    file = folder / ("a.csv.gz" if is_zipped else "a.csv")
    if is_zipped:
        packed = damaged(choices, gzip.compress(text, mtime=0))
        file.write_bytes(packed)
        try:
            text = gzip.decompress(packed)
        except (OSError, EOFError, zlib.error):
            text = b""
    else:
        file.write_bytes(text)
    csv_files._BLOCK_BYTES = block
    try:
        read = list(readers.blocks(schema, file))
        count = readers.count_rows(schema, file)
    except readers.DataError as error:
        read, refusal = [], str(error)
        assert str(file) in refusal, f"the error names no file: {refusal}"
    else:
        refusal = ""
    is_small = block < _SMALL
    table = None
    with contextlib.suppress(RefusedError):
        table = expected(text)
    if table is None:
        assert refusal, "read, and should be refused: no rows as RFC 4180 has them"
        return "refused"
    names = {name for name in oracle.COLUMNS if schema is STRICT or name in oracle._OF_LAX}
    header = [cell.decode("latin-1") for cell, _ in records(text.removeprefix(b"\xef\xbb\xbf"))[0]]
    if any(header.count(name) != 1 for name in names):
        assert refusal, "read, and a column is missing or there twice"
        return "refused"
    rows, faults = oracle.rows(schema, table, is_one_block=False)
    are_mixed = len({b"-" in (cells["t"] or b"")[1:] for cells in table}) > 1
    if faults:
        assert refusal, f"read, and should be refused: {sorted(faults)[:3]}"
        place = _ROW.search(refusal)
        if place and not are_mixed:
            assert (place[1], int(place[2])) in faults, f"names a row that is right: {refusal}"
        return "refused"
    if is_small and "a row is longer than" in refusal:
        return "refused for its block"
    if are_mixed and "column `t`" in refusal:
        return "refused for its times"
    assert not refusal, f"refused, and should be read: {refusal}"
    oracle.assert_same(oracle.of_blocks(schema, read), rows)
    assert count == len(rows), "count_rows"
    return "read"


def seeds() -> list[bytes]:
    """A file of each kind."""
    plain = b"i,s,l,w,d,y,r,q,t,k,e,g\n3,x,1|2,a|b,0.25,1,4.5,1,2024-05-01,u,9,a\n"
    quoted = b'"i",s,l,w,d,y,r,q,t,k,e,g\r\n3,"x ""y""\n",,"",1,0,1,1,5,"u",9,"a,b"\r\n'
    return [
        *(bytes([schema, block, 7, 0]) + text for schema in (0, 1) for block in range(4)
          for text in (plain, quoted)),
        *(bytes([schema, 0, form, zipped]) + bytes([1] * 80) for schema in (0, 1)
          for form in (0, 5) for zipped in (0, 7)),
    ]  # fmt: skip
