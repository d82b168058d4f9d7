"""Support in the request: one row of a task brings it, and the task's other rows share it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from qianmo.export.widths import fitted

REQUEST_ID = "request_id"
COUNT = "support_count"
# Status of a row.
BAD_SUPPORT = 32  # its support could not be read in part, which was left out
MIXED_SUPPORT = 512  # rows of its request and task bring different support


def support_name(name: str) -> str:
    """Input for a column of the support rows."""
    return f"support_{name}"


class RequestSupport(NamedTuple):
    """Support of a request's T tasks that have any, and which of its B rows use it.

    Attributes:
      columns: of the support rows, [T * S, ...] each.
      inside: which of the rows are there, bool [T, S].
      index: each row's task; T for rows without support, [B].
      status: 0, or bits of `BAD_SUPPORT` for a count outside [0, S] and `MIXED_SUPPORT`, [B].
    """

    columns: dict[str, tf.Tensor]
    inside: tf.Tensor
    index: tf.Tensor
    status: tf.Tensor

    def of_rows(self, part: tf.Tensor) -> tf.Tensor:
        """What is known of tasks [T, ...] for each row [B, ...]; zeros for those without one."""
        return tf.gather(with_empty(part), self.index)


def with_empty(part: tf.Tensor) -> tf.Tensor:
    """Tasks [T, ...] and one more of zeros, which rows without support use."""
    return tf.pad(part, [[0, 1], *[[0, 0]] * (part.shape.rank - 1)])


class _Groups(NamedTuple):
    first: tf.Tensor  # [T], the row that brings each group's support
    index: tf.Tensor  # [B], each row's group; T where none brings support
    mixed: tf.Tensor  # [B] bool, whether rows of its group bring different support


def _groups(
    request_id: tf.Tensor, task: tf.Tensor, count: tf.Tensor, columns: Sequence[tf.Tensor]
) -> _Groups:
    """Groups rows of equal (request id, task), and finds the row that brings each group's support.

    Where several do, it is one of those with the least fingerprint, so that neither their order nor
    other rows decide. What lies behind a row's count is not part of its support.
    """
    brings = count > 0
    pairs, group = tf.raw_ops.UniqueV2(x=tf.stack([request_id, task], 1), axis=[0])[:2]
    num_groups = tf.shape(pairs)[0]
    rows = tf.where(brings)[:, 0]
    counts = tf.gather(count, rows)
    prints = [tf.fingerprint(counts)]
    for column in columns:
        inside = tf.sequence_mask(counts, column.shape[1])
        inside = tf.reshape(inside, [-1, column.shape[1]] + [1] * (column.shape.rank - 2))
        brought = tf.gather(column, rows)
        prints.append(tf.fingerprint(tf.where(inside, brought, tf.zeros_like(brought))))
    content = tf.bitcast(tf.fingerprint(tf.concat(prints, 1)), tf.int64)
    owner = tf.gather(group, rows)
    least = tf.math.unsorted_segment_min(content, owner, num_groups)
    most = tf.math.unsorted_segment_max(content, owner, num_groups)
    end = tf.size(brings, tf.int64)
    rows = tf.where(content == tf.gather(least, owner), rows, end)
    first = tf.math.unsorted_segment_min(rows, owner, num_groups)
    has_support = first < end
    number = tf.cumsum(tf.cast(has_support, tf.int32), exclusive=True)
    number = tf.where(has_support, number, tf.math.count_nonzero(has_support, dtype=tf.int32))
    return _Groups(
        tf.boolean_mask(first, has_support),
        tf.gather(number, group),
        tf.gather(has_support & (least != most), group),
    )


def in_request(
    inputs: Mapping[str, tf.Tensor], task: tf.Tensor, names: Sequence[str], max_support: int
) -> RequestSupport:
    """Reads the support that a request's rows bring; each task's once.

    Args:
      inputs: of the signature: `request_id`, `support_count` int64 [B], and `support_<column>`
        [B, S, ...] for each of `names`.
      task: int64 [B].
      names: columns of the support rows.
      max_support: S.
    """
    columns = {name: inputs[support_name(name)] for name in names}
    count = tf.clip_by_value(inputs[COUNT], 0, max_support)
    outside = count != inputs[COUNT]
    found = _groups(inputs[REQUEST_ID], task, count, [*columns.values()])
    own = {name: tf.gather(column, found.first) for name, column in columns.items()}
    bad = outside | tf.gather(with_empty(tf.gather(outside, found.first)), found.index)
    return RequestSupport(
        {name: tf.reshape(column, [-1, *column.shape[2:]]) for name, column in own.items()},
        tf.range(max_support, dtype=tf.int64) < tf.gather(count, found.first)[:, None],
        found.index,
        tf.where(bad, BAD_SUPPORT, 0) | tf.where(found.mixed, MIXED_SUPPORT, 0),
    )


def of_tasks(
    specs: Mapping[str, tf.TensorSpec],
    tasks: np.ndarray,
    support: Mapping[Any, Mapping[str, np.ndarray]],
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The support of a request's tasks, each once.

    Args:
      specs: of the signature that takes it.
      tasks: of the request's rows, [B].
      support: task -> columns of its support rows, oldest first. The newest that the signature has
        room for are taken; a task that is not there has none.

    Returns:
      The first row of each of the T tasks with support, rising [T]; and `support_count` and the
      columns as `support_<column>`, [T, S, ...].

    Raises:
      ValueError: a column that is missing, or of another length or width than it should be.
    """
    # Of a feature whose own name begins so, the input for its support does twice.
    names = [
        name
        for name in specs
        if name.startswith("support_") and name != COUNT and support_name(name) not in specs
    ]
    by_key = {_key(task): columns for task, columns in support.items()}
    values, rows = np.unique(tasks, return_index=True)
    order = np.argsort(rows)
    held = [
        (row, task, by_key[_key(task)])
        for row, task in zip(rows[order].tolist(), values[order].tolist(), strict=True)
        if _key(task) in by_key
    ]
    most = specs[names[0]].shape[1]
    counts = []
    for _, task, columns in held:
        sizes = {name: len(columns.get(name.removeprefix("support_"), ())) for name in names}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"the support of task {task} should have columns of one length for {names}, "
                f"without the prefix. Received lengths: {sizes}"
            )
        counts.append(min(most, sizes[names[0]]))
    found = {COUNT: np.array(counts, np.int64)}
    inside = np.arange(most) < found[COUNT][:, None]
    for name in names:
        found[name] = zeros(specs[name], len(held))
        width = [None, *specs[name].shape[2:]]
        column = name.removeprefix("support_")
        newest = [fitted(name, np.asarray(of[column])[-most:], width) for _, _, of in held]
        if newest:
            found[name][inside] = np.concatenate(newest)
    return np.array([row for row, _, _ in held], np.int64), found


def zeros(spec: tf.TensorSpec, rows: int) -> np.ndarray:
    """So many rows of an input, of 0 or b""."""
    found = np.zeros([rows, *spec.shape[1:]], spec.dtype.as_numpy_dtype)
    if spec.dtype == tf.string:
        found[...] = b""
    return found


def new_request_id(rows: int) -> np.ndarray:
    """`request_id` of a new request, int64 [rows]."""
    return np.repeat(np.frombuffer(os.urandom(8), np.int64), rows)


def brought(
    specs: Mapping[str, tf.TensorSpec],
    tasks: np.ndarray,
    support: Mapping[Any, Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
    """Inputs [B, ...] by which the first row of each task brings its support, in a new request.

    Args and errors are those of `of_tasks`.
    """
    rows, columns = of_tasks(specs, tasks, support)
    found = {REQUEST_ID: new_request_id(len(tasks))}
    for name, column in columns.items():
        found[name] = zeros(specs[name], len(tasks))
        found[name][rows] = column
    return found


def _key(task: Any) -> Any:
    """A task as requests and tables hold it: strings are bytes."""
    return task.encode() if isinstance(task, str) else task
