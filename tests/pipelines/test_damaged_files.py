"""Files with bytes that no writer writes, as the harnesses in tests/fuzz found them."""

from __future__ import annotations

import pathlib
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz.fuzz_tfrecord import frame
from row_files import example

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, tfrecord
from qianmo.pipelines.data.files import DataFile

SCHEMA = Schema.from_config({"features": [{"name": "id"}], "labels": ["y"]})


@pytest.mark.parametrize("length", [2**31, 2**40, 2**62, 2**64 - 1])
def test_a_record_longer_than_its_file_is_refused(tmp_path: pathlib.Path, length: int) -> None:
    """Its checksum may be right. TensorFlow allocates 2^31 bytes, and dies of 2^62."""
    file = tmp_path / "a.tfrecord"
    head = frame(struct.pack("<Q", length))  # whose bytes are the length, a checksum behind them
    fields = {"id": 1, "y": 1}
    whole = frame(example(fields))
    file.write_bytes(whole + head[12:24] + bytes(20))
    with pytest.raises(readers.DataError, match=rf"{file}: row 1 .* cannot be read as TFRecord"):
        list(readers.blocks(SCHEMA, file))
    file.write_bytes(head[12:24] + whole)
    for read in (
        lambda: list(readers.blocks(SCHEMA, file)),
        lambda: tfrecord.names(DataFile(file)),
    ):
        with pytest.raises(readers.DataError, match=r"row 0 .* cannot be read as TFRecord"):
            read()


def test_a_record_that_is_no_example_is_named_whatever_its_bytes(tmp_path: pathlib.Path) -> None:
    """TensorFlow's message quotes the record, and was no Python string."""
    file = tmp_path / "a.tfrecord"
    row = example({"id": 1, "y": 1})
    for wrong in (b"\xff\xfe\xfd", row[:-1] + b"\x80", b"\n\xff" + row):
        file.write_bytes(frame(row) + frame(row) + frame(wrong))
        with pytest.raises(readers.DataError, match=rf"{file}, row 2 .*should be a tf\.train\.Exa"):
            list(readers.blocks(SCHEMA, file))


def test_a_parquet_column_whose_name_is_no_text_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.parquet"
    table = pa.table({"id": [1], "y": [1], "another": [1]})
    pq.write_table(table, file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"another", b"anoth\xe9r"))
    with pytest.raises(readers.DataError, match=rf"{file}: cannot be read as Parquet: 'utf-8' cod"):
        list(readers.blocks(SCHEMA, file))


def test_integers_beyond_2_53_are_numbers_beside_nulls_too(tmp_path: pathlib.Path) -> None:
    config = {"features": [{"kind": "dense", "name": "x", "indicator": True}], "labels": ["y"]}
    values = [2**53 + 1, None, -(2**63)]
    pq.write_table(pa.table({"x": values, "y": [0, 1, 1]}), tmp_path / "a.parquet")
    (block,) = readers.blocks(Schema.from_config(config), tmp_path)
    np.testing.assert_array_equal(block["x"], np.float32([2**53 + 1, np.nan, -(2**63)]))
