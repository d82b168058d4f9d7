"""TFRecord files of `tf.train.Example`."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import tensorflow as tf
from google.protobuf.message import DecodeError

from qianmo.pipelines.data.columns import Column, Part, check_names
from qianmo.pipelines.data.errors import DataError
from qianmo.pipelines.data.files import DataFile

_DTYPES = {"int64_list": tf.int64, "bytes_list": tf.string, "float_list": tf.float32}
_LOOKED_AT = 1000  # records
# A record is its length, a checksum of that, its bytes and a checksum of these.
_LENGTH = struct.Struct("<Q")
_FRAME_BYTES = _LENGTH.size + 4 + 4
_KINDS = {
    "int64": "int64_list",
    "string": "bytes_list",
    "float32": "float_list",
    "time": "int64_list",
    "name": "bytes_list",
    "key": "bytes_list",
}


def parts(file: DataFile, columns: Mapping[str, Column]) -> list[Part]:
    """The file as one part, the names of its first record's features checked."""
    _kinds(file, columns)
    return [Part(file)]


def names(file: DataFile) -> list[str]:
    """The features that the first records have."""
    found: dict[str, None] = {}
    _check_lengths(file, _LOOKED_AT)
    try:
        for record in tf.data.TFRecordDataset(str(file.path)).take(_LOOKED_AT):
            found |= dict.fromkeys(tf.train.Example.FromString(record.numpy()).features.feature)
    except tf.errors.DataLossError as error:
        raise _loss(file) from error
    except DecodeError as error:
        raise DataError(f"{file}: should hold tf.train.Example; write it again.") from error
    return sorted(found)


def read(
    part: Part, columns: Mapping[str, Column], decoded_rows: int
) -> Iterator[dict[str, pa.Array]]:
    """Yields the columns of consecutive rows, `decoded_rows` of them at most."""
    columns = {name: c for name, c in columns.items() if name not in part.file.partitions}
    kinds = _kinds(part.file, columns)
    features = {
        name: tf.io.RaggedFeature(_DTYPES[kind], row_splits_dtype=tf.int64)
        for name, kind in kinds.items()
    }
    _check_lengths(part.file)
    row = 0
    with tf.device("CPU:0"):
        records = iter(tf.data.TFRecordDataset(str(part.file.path)).batch(decoded_rows))
    while True:
        batch: Any = None
        try:
            batch = next(records, None)
            if batch is None:
                return
            parsed = tf.io.parse_example(batch, features) if features else {}
        except tf.errors.DataLossError as error:
            raise _loss(part.file) from error
        except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
            # TensorFlow's message holds the record, whose bytes may not make a Python string.
            raise _mismatch(part.file, batch.numpy(), row, kinds, columns) from error
        arrays = {}
        for name, column in columns.items():
            splits = parsed[name].row_splits.numpy()
            values = parsed[name].flat_values.numpy()
            values = pa.array(values, pa.binary() if values.dtype == object else None)
            if column.max_length:
                values = pa.LargeListArray.from_arrays(splits, values)
            else:
                lengths = np.diff(splits)
                if (lengths > 1).any():
                    i = int(np.argmax(lengths > 1))
                    fault = f"holds {lengths[i]} values. Write one value."
                    raise part.error(name, row + i, fault)
                if len(values) < len(lengths):
                    values = values.take(pa.array(splits[:-1], mask=lengths == 0))
            arrays[name] = values
        yield arrays | part.constants(len(batch))
        row += len(batch)


def _kinds(file: DataFile, columns: Mapping[str, Column]) -> dict[str, str]:
    """How the first record that has a column stores it; the others should do likewise."""
    kinds: dict[str, str] = {}
    in_file = {name for name in columns if name not in file.partitions}
    count = _LOOKED_AT if any(c.may_be_absent for c in columns.values()) else 1
    _check_lengths(file, count)
    try:
        for row, record in enumerate(tf.data.TFRecordDataset(str(file.path)).take(count)):
            found = tf.train.Example.FromString(record.numpy()).features.feature
            if not row:
                # A list that is empty in the first row need not be there.
                required = {
                    n: c for n, c in columns.items() if not (c.max_length or c.may_be_absent)
                }
                check_names(file, [*found], required)
            for name in in_file - kinds.keys():
                if name in found and (kind := found[name].WhichOneof("kind")):
                    kinds[name] = kind
            if len(kinds) == len(in_file):
                break
    except tf.errors.DataLossError as error:
        raise _loss(file) from error
    except DecodeError as error:
        raise DataError(
            f"{file}, row {row} (counted from 0): should be a tf.train.Example; write it again."
        ) from error
    return {name: kinds.get(name, _KINDS[columns[name].kind]) for name in in_file}


def _check_lengths(file: DataFile, count: int = -1) -> None:
    """Checks that the file, or its first `count` records, end where their lengths say.

    TensorFlow allocates as many bytes as a record's length says, and dies of very long ones.

    Raises:
      DataError: one ends behind the file's end.
    """
    with file.path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:
            return
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = row = 0
            while at + _LENGTH.size <= size and row != count:
                at += _LENGTH.unpack_from(data, at)[0] + _FRAME_BYTES
                if at > size:
                    raise _unreadable(file, row)
                row += 1


def _loss(file: DataFile) -> DataError:
    """Names the first record that cannot be read, whose length fits."""
    row = 0
    with contextlib.suppress(tf.errors.DataLossError):
        for _ in tf.data.TFRecordDataset(str(file.path)):
            row += 1
    return _unreadable(file, row)


def _unreadable(file: DataFile, row: int) -> DataError:
    return DataError(
        f"{file}: row {row} (counted from 0) cannot be read as TFRecord: it is truncated or "
        "corrupt; write it again."
    )


def _mismatch(
    file: DataFile,
    records: Iterable[bytes],
    first_row: int,
    kinds: Mapping[str, str],
    columns: Mapping[str, Column],
) -> DataError:
    """Names the first record that is no Example, or stores a column unlike the first one does."""
    part = Part(file)
    for row, record in enumerate(records, first_row):
        try:
            found = tf.train.Example.FromString(record).features.feature
        except DecodeError:
            return DataError(
                f"{file}, row {row} (counted from 0): should be a tf.train.Example; write it again."
            )
        for name, kind in kinds.items():
            stored = found[name].WhichOneof("kind") if name in found else None
            if stored not in (kind, None):
                fault = f"should be {columns[name].expected}, stored as {kind}. Found: {stored}."
                return part.error(name, row, f"{fault} Write it as in the other rows.")
    return DataError(f"{file}: cannot be parsed as tf.train.Example; write it again.")
