"""Support rows of tasks in a hash table of the graph, made of stock ops alone."""

from __future__ import annotations

import tensorflow as tf

from qianmo.ops.support_store import (
    BAD_LABEL,
    BAD_TIME,
    BAD_VECTOR,
    STORED,
    TOO_OLD,
    SupportRows,
)

# How far a clock may go back and be no clock that was set: threads read it in any order.
_BACK_MS = 1000

# The columns of `SupportTable.stats`.
METRICS = (
    "tasks",  # now
    "hits",  # tasks that a read found rows of
    "misses",  # tasks that it found none of
)


class SupportTable(tf.Module):
    """The last rows of each task, in the graph: the form that stock TensorFlow Serving loads.

    It has the calls of `SupportStore`, and lives in the session of one model version: what Predict
    wrote is lost with the version, so what should last is put in at export. It is not replicated.
    Rows are never of another bottom, since its own graph wrote them: versions are not kept. Two
    calls of `put` that write the same task at the same time may lose one of the rows, and no other.
    It has no bound but `max_rows`, frees nothing, and does not count rows, which would read all.

    Args:
      dim: width of h.
      num_labels: labels, and label weights, of a row.
      max_rows: rows kept of a task, the last ones by event time and id.
      ttl_seconds: tasks that were written longer ago count as unknown. 0: for ever. Where the clock
        went back, what was written while it was ahead counts as older rather than as younger.

    Cost: a task takes `task_bytes`, 4 * max_rows * (dim + 2 * num_labels + 4) + 16, however few
      rows it has.
    """

    def __init__(
        self, dim: int, num_labels: int, max_rows: int, *, ttl_seconds: float = 0.0
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_labels = num_labels
        self.max_rows = max_rows
        self.ttl_seconds = ttl_seconds
        self._width = dim + 2 * num_labels
        # A hash table's values have rank 1. The events: each row's time, 0 where there is no row,
        # each row's id, and when the task was written, by both clocks of `_clocks`.
        table = tf.lookup.experimental.MutableHashTable
        self._rows = table(tf.int64, tf.float32, [0.0] * (max_rows * self._width))
        self._events = table(tf.int64, tf.int64, [0] * (2 * max_rows + 2))
        self._reads = tf.Variable(tf.zeros([2], tf.int64), trainable=False)  # hits and misses
        # The wall clock when it was read last, and by how much it went back in all.
        self._clock = tf.Variable(tf.zeros([2], tf.int64), trainable=False)

    @property
    def task_bytes(self) -> int:
        """Bytes of a task."""
        return 4 * self.max_rows * (self._width + 4) + 16

    def _clocks(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Milliseconds: the wall clock, and one that stands still while that goes back."""
        now = _now()
        last, back = tf.unstack(self._clock.read_value())
        jump = tf.where(last - now > _BACK_MS, last - now, 0)
        latest = tf.where(jump > 0, now, tf.maximum(last, now))
        self._clock.assign([latest, back + jump])
        return now, now + back + jump

    def _read(self, task_id: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Rows [U, S, width], times and ids [U, S]; rows stand at the end, the newest last."""
        events = tf.reshape(self._events.lookup(task_id), [-1, 2 * self.max_rows + 2])
        times, ids, written = tf.split(events, [self.max_rows, self.max_rows, 2], 1)
        if self.ttl_seconds:
            age = tf.stack(self._clocks()) - written
            lives = (age >= -_BACK_MS) & (age <= int(self.ttl_seconds * 1000))
            times = tf.where(tf.reduce_all(lives, 1, keepdims=True), times, 0)
        rows = tf.reshape(self._rows.lookup(task_id), [-1, self.max_rows, self._width])
        return rows, times, ids

    def get(self, task_id: tf.Tensor, version: tf.Tensor, max_rows: int = 0) -> SupportRows:
        """Returns the last rows of tasks, see `SupportStore.get`."""
        rows, time, event_id = self._read(task_id)
        count = tf.reduce_sum(tf.cast(time > 0, tf.int32), 1)
        hits = tf.math.count_nonzero(count)
        self._reads.assign_add([hits, tf.size(count, tf.int64) - hits])
        kept = tf.minimum(count, max_rows or self.max_rows)
        places = tf.range(max_rows or self.max_rows)
        inside = places < kept[:, None]
        index = tf.where(inside, self.max_rows - kept[:, None] + places, 0)
        rows = tf.where(inside[:, :, None], tf.gather(rows, index, batch_dims=1), 0.0)
        h, labels, weights = tf.split(rows, [self.dim, self.num_labels, self.num_labels], 2)
        time, event_id = (
            tf.where(inside, tf.gather(part, index, batch_dims=1), 0) for part in (time, event_id)
        )
        return SupportRows(h, labels, weights, time, event_id, kept)

    def put(
        self,
        task_id: tf.Tensor,
        h: tf.Tensor,
        labels: tf.Tensor,
        weights: tf.Tensor,
        time: tf.Tensor,
        event_id: tf.Tensor,
        version: tf.Tensor,
    ) -> tf.Tensor:
        """Stores rows and returns a status for each, see `SupportStore.put`."""

        def bit(good: tf.Tensor, flag: int) -> tf.Tensor:
            return tf.where(tf.reduce_all(tf.reshape(good, [tf.shape(time)[0], -1]), 1), 0, flag)

        finite = tf.math.is_finite
        labels = tf.where(weights == 0, 0.0, labels)  # undefined there
        status = (
            bit(time > 0, BAD_TIME)
            | bit(finite(h), BAD_VECTOR)
            | bit(finite(labels), BAD_LABEL)
            | bit(tf.logical_and(finite(weights), weights >= 0), BAD_LABEL)
        )
        batch = tf.shape(time)[0]
        tasks, task = tf.unique(task_id)
        known_rows, known_times, known_ids = self._read(tasks)
        size = tf.shape(tasks)[0]
        # All rows in one list, those already there first: a stable sort leaves a row that was put
        # after the one that it replaces, and of two in the batch the later one.
        rows = tf.concat(
            [tf.reshape(known_rows, [-1, self._width]), tf.concat([h, labels, weights], 1)], 0
        )
        times = tf.concat([tf.reshape(known_times, [-1]), tf.where(status == STORED, time, 0)], 0)
        ids = tf.concat([tf.reshape(known_ids, [-1]), event_id], 0)
        owner = tf.concat([tf.repeat(tf.range(size), self.max_rows), task], 0)
        order = tf.range(tf.size(owner))
        for key in (ids, times, owner):
            order = tf.gather(order, tf.argsort(tf.gather(key, order), stable=True))
        times, ids, owner = (tf.gather(part, order) for part in (times, ids, owner))
        replaced = tf.reduce_all([part[:-1] == part[1:] for part in (owner, times, ids)], 0)
        is_row = tf.logical_and(times > 0, tf.logical_not(tf.concat([replaced, [False]], 0)))
        # Rows to come of the same task, this one included, tell how far from the end it stands.
        ones = tf.cast(is_row, tf.int32)
        of_task = tf.math.unsorted_segment_sum(ones, owner, size)
        before = tf.cumsum(ones, exclusive=True) - tf.gather(
            tf.cumsum(of_task, exclusive=True), owner
        )
        from_end = tf.gather(of_task, owner) - before
        kept = tf.logical_and(is_row, from_end <= self.max_rows)
        source = tf.boolean_mask(order, kept)
        where = tf.stack(
            [tf.boolean_mask(owner, kept), self.max_rows - tf.boolean_mask(from_end, kept)], 1
        )
        shape = tf.stack([size, self.max_rows])
        stored = tf.scatter_nd(where, tf.gather(rows, source), [*tf.unstack(shape), self._width])
        stored_times, stored_ids = (
            tf.scatter_nd(where, tf.boolean_mask(part, kept), shape) for part in (times, ids)
        )
        is_kept = tf.scatter_nd(source[:, None], tf.ones_like(source), tf.shape(order))[-batch:]
        # Which is not there is older than the oldest, where the task is full.
        full = tf.gather(stored_times[:, 0] > 0, task)
        oldest, oldest_id = (tf.gather(part[:, 0], task) for part in (stored_times, stored_ids))
        older = (time < oldest) | ((time == oldest) & (event_id < oldest_id))
        status |= tf.where((is_kept == 0) & full & older, TOO_OLD, 0)
        # A task of which nothing was stored keeps the time at which it was written.
        changed = tf.math.unsorted_segment_max(tf.cast(status == STORED, tf.int32), task, size) > 0
        written = tf.boolean_mask(tasks, changed)
        now = tf.repeat(tf.stack(self._clocks())[None], size, 0)
        values = tf.reshape(stored, [size, self.max_rows * self._width])
        events = tf.concat([stored_times, stored_ids, now], 1)
        with tf.control_dependencies(
            [
                self._rows.insert(written, tf.boolean_mask(values, changed)),
                self._events.insert(written, tf.boolean_mask(events, changed)),
            ]
        ):
            return tf.identity(status)

    def stats(self, task_id: tf.Tensor) -> tf.Tensor:
        """Returns int64 [B, len(METRICS)], every row the same, for any int64 [B]."""
        counts = tf.concat([[self._events.size()], self._reads], 0)
        return tf.repeat(counts[None], tf.shape(task_id)[0], 0)


def _now() -> tf.Tensor:
    """Wall clock in milliseconds."""
    return tf.cast(tf.timestamp() * 1000, tf.int64)
