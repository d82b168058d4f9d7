"""Episodes out of an ordinary batch: rows grouped by task, each split into support and query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf


class Episodes(NamedTuple):
    """Numbers of a batch's rows, by task.

    Places from `support_count` or `query_count` on are padding and name row 0.

    Attributes:
      support: [T, S] int32, rows that a task adapts on, in order.
      support_count: [T] int32, from 1 on.
      query: [T, Q] int32, rows that its adapted tower is judged by.
      query_count: [T] int32, from 1 on.
    """

    support: tf.Tensor
    support_count: tf.Tensor
    query: tf.Tensor
    query_count: tf.Tensor


def check_split(support_share: float, support_sizes: Sequence[int]) -> None:
    """Raises a ValueError for a share outside (0, 1) or a size below 1."""
    if not 0 < support_share < 1:
        raise ValueError(f"`support_share` should be in (0, 1). Received: {support_share}")
    if any(size < 1 for size in support_sizes):
        raise ValueError(f"`support_sizes` should be >= 1. Received: {tuple(support_sizes)}")


def episodes(
    task_id: tf.Tensor,
    order: tf.Tensor,
    *,
    support_share: float = 0.5,
    support_sizes: Sequence[int] = (),
    max_support: int = 20,
    max_query: int = 40,
    seed: tf.Tensor | None = None,
) -> Episodes:
    """Groups rows by task id and splits each task's rows in two.

    A task with n >= 2 rows, in rising `order`, gives its first s rows as support, and as query the
    first max_query of the rows whose order is above that of all support rows, with

        s = min(max_support, n - 1, max(1, floor(support_share * n)))
        s = min(max_support, n - 1, a size drawn from support_sizes)      where sizes are given

    So no row is judged by a tower that has seen a label of the same time. A task without query
    rows, such as one of a single row or time, gives nothing: it takes part in the original loss
    alone.

    Args:
      task_id: [B], integers; equal ids are one task.
      order: [B], what rows are sorted by within a task: event times, or random numbers. Rows of one
        order keep the batch's order.
      support_share: share of a task's rows that are support, in (0, 1).
      support_sizes: sizes to draw from, equally likely, for each task and call.
      max_support: S, most support rows of a task.
      max_query: Q, most query rows of a task.
      seed: [2] int64, for `support_sizes`.

    Returns:
      `Episodes`, tasks by their first row in the batch. S and Q are the largest counts found.

    Raises:
      ValueError: a share outside (0, 1), a size or maximum below 1, sizes without a seed.

    Example:
    >>> found = episodes(tf.constant([7, 5, 7, 7]), tf.constant([3, 0, 1, 2]))
    >>> found.support.numpy().tolist(), found.query.numpy().tolist()
    ([[2]], [[3, 0]])
    """
    check_split(support_share, support_sizes)
    for name, value in (("max_support", max_support), ("max_query", max_query)):
        if value < 1:
            raise ValueError(f"`{name}` should be >= 1. Received: {value}")
    if support_sizes and seed is None:
        raise ValueError("`support_sizes` need a `seed` to draw from.")
    _, task, size = tf.unique_with_counts(task_id)
    rows = tf.argsort(order, stable=True)
    rows = tf.gather(rows, tf.argsort(tf.gather(task, rows), stable=True))
    start = tf.cumsum(size, exclusive=True)
    if support_sizes:
        drawn = tf.random.stateless_uniform(
            tf.shape(size), seed, 0, len(support_sizes), tf.int32, alg="philox"
        )
        count = tf.gather(tf.constant(support_sizes, tf.int32), drawn)
    else:
        count = tf.maximum(1, tf.cast(support_share * tf.cast(size, tf.float32), tf.int32))
    support_count = tf.minimum(tf.minimum(count, max_support), size - 1)
    ordered, of_rows = tf.gather(order, rows), tf.gather(task, rows)
    last = tf.gather(ordered, start + tf.maximum(support_count, 1) - 1)
    is_later = tf.cast(ordered > tf.gather(last, of_rows), tf.int32)
    later = tf.math.unsorted_segment_sum(is_later, of_rows, tf.size(size))
    has_query = later > 0
    first_query = start + size - later
    start, support_count, first_query, later = (
        tf.boolean_mask(part, has_query) for part in (start, support_count, first_query, later)
    )
    query_count = tf.minimum(later, max_query)

    def pick(first: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        places = tf.range(tf.reduce_max(tf.concat([count, [0]], 0)))[None]
        inside = places < count[:, None]
        return tf.where(inside, tf.gather(rows, tf.where(inside, first[:, None] + places, 0)), 0)

    return Episodes(
        pick(start, support_count),
        support_count,
        pick(first_query, query_count),
        query_count,
    )
