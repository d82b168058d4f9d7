"""Files of rows in each format, for tests of what reads them."""

from __future__ import annotations

import csv
import gzip
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

Row = dict[str, Any]


def write_parquet(file: pathlib.Path, rows: Sequence[Row], row_group_size: int = 64) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, file, row_group_size=row_group_size)


def write_csv(file: pathlib.Path, rows: Sequence[Row]) -> None:
    opened = gzip.open if file.name.endswith(".gz") else open
    names = list(dict.fromkeys(name for row in rows for name in row))
    with opened(file, "wt", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in rows:
            values = [row.get(name) for name in names]
            writer.writerow(["|".join(map(str, v)) if isinstance(v, list) else v for v in values])


def example(row: Row) -> bytes:
    features = {}
    for name, value in row.items():
        values = value if isinstance(value, list) else [value]
        if not values or values == [None]:
            continue
        if isinstance(values[0], str):
            encoded = tf.train.BytesList(value=[v.encode() for v in values])
            features[name] = tf.train.Feature(bytes_list=encoded)
        elif isinstance(values[0], float):
            features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=values))
        else:
            features[name] = tf.train.Feature(int64_list=tf.train.Int64List(value=values))
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_tfrecord(file: pathlib.Path, rows: Sequence[Row]) -> None:
    with tf.io.TFRecordWriter(str(file)) as writer:
        for row in rows:
            writer.write(example(row))


WRITERS: dict[str, Callable[[pathlib.Path, Sequence[Row]], None]] = {
    "parquet": write_parquet,
    "csv": write_csv,
    "csv.gz": write_csv,
    "tfrecord": write_tfrecord,
}
