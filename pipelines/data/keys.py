"""Integers that stand for a task, or for a group of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import tensorflow as tf

from qianmo.layers.hashing import mix64
from qianmo.layers.schema import DAY, UNITS, Schema
from qianmo.layers.task_key import task_key
from qianmo.pipelines.data.columns import Block

_Keys = npt.NDArray[np.int64]
_DAY_SECONDS = 24 * 60 * 60


def of_strings(strings: pa.Array) -> _Keys:
    """`task_key` of strings, each distinct one hashed once."""
    encoded = strings.cast(pa.binary()).dictionary_encode()
    with tf.device("CPU:0"):
        names = tf.constant(encoded.dictionary.to_pylist(), tf.string)
        distinct = task_key(names).numpy()
    return np.asarray(distinct[encoded.indices.to_numpy()])


def task_ids(schema: Schema, block: Block) -> _Keys:
    """The rows' tasks: int64 ids as they are, names as their `task_key`."""
    values = block[schema.task_id]
    return values if schema.task_dtype == "int64" else of_strings(pa.array(values, pa.binary()))


def groups(schema: Schema, block: Block) -> _Keys:
    """A key for each row, equal for rows that are equal in all columns of `schema.gauc_by`.

    Strings count as their `task_key`, and "day" as days since 1970, UTC. One column is its own key.
    Several, v_1 to v_n, are mixed by M = `mix64`, a bijection of 64 bits:

        key = k_n,   k_i = M(k_(i-1) + v_i),   k_0 = 0

    So two groups share a key with a probability of 2^-64, as two names do.
    """
    columns = [_days(schema, block) if n == DAY else of_values(block[n]) for n in schema.gauc_by]
    return columns[0] if len(columns) == 1 else _mixed(columns)


def _days(schema: Schema, block: Block) -> _Keys:
    ticks: _Keys = block[schema.timestamp]
    return ticks // (_DAY_SECONDS * UNITS[schema.timestamp_unit])


def of_values(values: npt.NDArray[Any]) -> _Keys:
    """An integer for each value, equal where values are: int64, bytes or floats."""
    if values.dtype == object:
        return of_strings(pa.array(values, pa.binary()))
    if values.dtype == np.int64:
        return values
    return (values.astype(np.float64) + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0


def _mixed(columns: Sequence[_Keys]) -> _Keys:
    key = np.zeros(len(columns[0]), np.uint64)
    for values in columns:
        key = mix64((key + values.view(np.uint64)).view(np.int64))
    return key.view(np.int64)
