"""CSV files: what of RFC 4180 is read, byte for byte, and what of other dialects is refused."""

from __future__ import annotations

import csv
import gzip
import io
import pathlib
from typing import Any

import numpy as np
import pytest

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import csv_files, csv_quotes, readers
from qianmo.pipelines.data.files import DataFile

SCHEMA = Schema.from_config(
    {"features": [{"name": "s", "dtype": "string", "default": "none"}], "labels": ["y"]}
)


def read(path: pathlib.Path, name: str = "s") -> list[bytes]:
    return [v for block in readers.blocks(SCHEMA, path) for v in block[name].tolist()]


def write(folder: pathlib.Path, text: str | bytes, name: str = "a.csv") -> pathlib.Path:
    data = text if isinstance(text, bytes) else text.encode()
    file = folder / name
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


TEXTS = [
    "plain",
    'a "quoted" word',
    "a,b",
    "two\nlines",
    "two\r\nlines",
    '"',
    '""',
    ",",
    "\n",
    " spaces ",
    "back\\slash",
    'back\\"slash',
    "京",
    "'single'",
    "a|b",
    '"\n"',
    "x" * 3000,
]


@pytest.mark.parametrize(
    ("end", "quoting"),
    [
        ("\r\n", csv.QUOTE_MINIMAL),
        ("\r\n", csv.QUOTE_ALL),
        ("\n", csv.QUOTE_ALL),
        ("\r", csv.QUOTE_ALL),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_every_text_comes_back_byte_for_byte(
    tmp_path: pathlib.Path, end: str, quoting: Any, name: str
) -> None:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator=end, quoting=quoting)
    writer.writerow(["s", "y"])
    writer.writerows([text, 0] for text in TEXTS)
    file = write(tmp_path, stream.getvalue(), name)
    assert [value.decode() for value in read(file)] == TEXTS


def test_random_texts_in_blocks_of_any_size(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quotes, commas and line ends on all sides of the borders between blocks."""
    random = np.random.default_rng(0)
    texts = ["".join(random.choice([*'"",\n\rab'], random.integers(6))) for _ in range(400)]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(["s", "y"])
    writer.writerows([text, 0] for text in texts)
    file = write(tmp_path, stream.getvalue())
    for size in (64, 65, 67, 97, 4096):
        monkeypatch.setattr(csv_files, "_BLOCK_BYTES", size)
        found = [value.decode() for value in read(file)]
        assert found == [text or "none" for text in texts]


FAULTS = {
    "text after a closing quote": ('s,y\na,0\n"b"c,1\n', 1, "text follows a closing quote"),
    "a space after it": ('s,y\n"b" ,1\n', 0, "text follows a closing quote"),
    "a quote within a cell": ('s,y\na,0\nb"c,1\n', 1, "a quote stands in a cell that is not in"),
    "a space before one": ('s,y\n "b",1\n', 0, "a quote stands in a cell that is not in quotes"),
    "a doubled one": ('s,y\na""b,1\n', 0, "a quote stands in a cell that is not in quotes"),
    "a backslash": ('s,y\nx,0\n"say \\"hi\\"",1\n', 1, "text follows a closing quote"),
    "one before a comma": ('s,y\n"a\\",b",1\n', 0, "a quote stands in a cell that is not in"),
    "one at the end": ('s,y\n"a\\"",1\n"b",1\n', 0, "text follows a closing quote"),
    "an open quote": ('s,y\na,0\n"b,1\nc,0\n', 1, "its quote is never closed"),
    "an open quote in the last cell": ('s,y\na,"0\nb,1\nc,0\n', 0, "its quote is never closed"),
    "a lone quote": ('s,y\n",1\n', 0, "its quote is never closed"),
    "after blank lines and lines in quotes": (
        's,y\r\n\r\n"a\r\n\r\nb",0\r\n\r\n\n"c"d,1\r\n',
        1,
        "text follows a closing quote",
    ),
}


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("size", [64, 4096])
def test_other_dialects_are_refused_with_the_row(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, case: str, size: int, name: str
) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", size)
    text, row, fault = FAULTS[case]
    file = write(tmp_path, text, name)
    with pytest.raises(readers.DataError) as error:
        read(file)
    assert str(error.value).startswith(f"{file}, row {row} (counted from 0): {fault}")
    assert str(error.value).endswith("the quote in it is doubled. Write it so, or as Parquet.")


def test_a_fault_far_behind_the_first_block_is_counted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csv_files, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(csv_quotes, "_CHUNK", 777)
    rows = [f'"row ""{i}""\n",0' for i in range(2000)]
    rows[1234] = '"row" 1234,0'
    with pytest.raises(readers.DataError, match=r"row 1234 \(counted from 0\): text follows"):
        read(write(tmp_path, "s,y\n" + "\n".join(rows)))


def test_every_cut_of_a_file_is_checked_alike(tmp_path: pathlib.Path) -> None:
    """The stream sees the same faults however the bytes are cut."""
    good = b'\xef\xbb\xbf"s",y\r\n"a""b",1\r\n"",2\r\n"c\r\nd",3\r\n'
    for at in range(3, len(good)):
        for text in (good, good[:at] + b'"' + good[at:], good[:at] + b"x" + good[at:]):
            file = write(tmp_path, text)
            seen = set()
            for size in (4, 5, 6, 7, 1000):
                stream = csv_quotes.CheckedStream(DataFile(file))
                try:
                    while stream.read(size):
                        pass
                    seen.add("")
                except readers.DataError as error:
                    seen.add(str(error))
            assert len(seen) == 1, (text, seen)
            assert text != good or seen == {""}


def test_the_header_is_checked_too(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, 's,y,"z"z\na,1,2\n')
    with pytest.raises(readers.DataError, match=r"a\.csv, in the header: text follows a closing"):
        read(file)


def test_a_row_beyond_a_block_is_named_as_such(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 's,y\na,0\n"' + "x" * (2**23) + '",0\n'
    with pytest.raises(readers.DataError, match="a row is longer than 4 MiB, or its quote is nev"):
        read(write(tmp_path, text))


def test_a_blank_line_is_an_empty_cell_where_rows_have_one(tmp_path: pathlib.Path) -> None:
    file = write(tmp_path, "s\na\n\nb\n")
    (block,) = readers.blocks(SCHEMA, file, targets=False)
    assert block["s"].tolist() == [b"a", b"none", b"b"]
    assert read(write(tmp_path, "s,y\na,0\n\nb,1\n")) == [b"a", b"b"]


def test_files_zipped_one_behind_the_other_are_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"s,y\na,0\n") + gzip.compress(b"b,1\n"))
    assert read(tmp_path / "a.csv.gz") == [b"a", b"b"]


def test_a_row_of_too_many_cells_is_named_whatever_its_bytes(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """pyarrow hands a row to Python as UTF-8, and prints a traceback where it is none."""
    with pytest.raises(readers.DataError, match=r"row 1 \(counted from 0\): should have 2 cells"):
        read(write(tmp_path, b"s,y\na,0\n\xff,1,2\n"))
    assert capfd.readouterr().err == ""


def test_a_header_that_csv_cannot_read_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(readers.DataError, match=r"a\.csv: its header line cannot be read: field"):
        read(write(tmp_path, "s," + "x" * 200_000 + "\na,0\n"))


@pytest.mark.parametrize("text", ["0x1F", "0X1f", "0xFFFFFFFFFFFFFFFF"])
def test_hexadecimal_numbers_are_no_integers(tmp_path: pathlib.Path, text: str) -> None:
    """pyarrow reads them as int64, the last as -1."""
    config = {"features": [{"name": "i"}, {"name": "l", "max_length": 2}], "labels": ["y"]}
    for row, column in ((f"{text},1,0,5", "i"), (f"1,3|{text},0,5", "l"), (f"1,1,0,{text}", "t")):
        file = write(tmp_path, f"i,l,y,t\n1,1,0,5\n{row}\n")
        fault = rf"column `{column}`, row 1 \(counted from 0\): should be .*Received: '{text}'"
        with pytest.raises(readers.DataError, match=fault):
            list(readers.blocks(Schema.from_config({**config, "timestamp": "t"}), file))


def test_the_error_of_a_time_names_the_row_that_is_wrong(tmp_path: pathlib.Path) -> None:
    config = {"features": [{"name": "i"}], "labels": ["y"], "timestamp": "t"}
    schema = Schema.from_config(config)
    fine = "2024-05-01T12:30:00.123456789"
    for before in (("5", "6"), ("2024-05-01", fine), (fine, "2024-05-01T12:30Z")):
        times = "".join(f"1,1,{time}\n" for time in (*before, "noon"))
        fault = r"column `t`, row 2 \(counted from 0\): should be int64 or a time .*'noon'"
        with pytest.raises(readers.DataError, match=fault):
            list(readers.blocks(schema, write(tmp_path, "i,y,t\n" + times)))
    # Beside one of nanoseconds, times of any year are read.
    file = write(tmp_path, f"i,y,t\n1,1,{fine}\n1,1,9999-12-31\n")
    (block,) = readers.blocks(schema, file)
    assert block["t"].tolist() == [1714566600123456, 253402214400000000]
