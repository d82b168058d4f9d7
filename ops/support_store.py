"""The support store of meta-learned towers: the last rows of each task, beyond a model version."""

from __future__ import annotations

import os
from typing import NamedTuple

import tensorflow as tf

from qianmo.ops.library import library

# Bits of a row's status; a row with any of them is not stored.
STORED = 0
BAD_TIME = 1  # the event time is not positive
BAD_VECTOR = 2  # h is not finite
BAD_LABEL = 4  # a label or weight is not finite, or a weight is negative
TOO_OLD = 8  # the task is full of rows of later events
NO_MEMORY = 16
UNREACHABLE = 32  # the Redis did not store it

# The columns of `SupportStore.stats`; -1 where a Redis cannot tell.
METRICS = (
    "tasks",  # now
    "rows",  # now
    "bytes",  # now, of rows and index
    "hits",  # tasks that a read found rows of
    "misses",  # tasks that it found none of
    "refused",  # rows that it left out, being of another version
    "evicted",  # tasks, by time or capacity
    "damaged_bytes",  # of the files, when they were opened
    "write_errors",  # of the files since then; rows that a Redis did not store
    "read_errors",  # tasks whose rows a Redis did not let read
)


class SupportRows(NamedTuple):
    """Support rows of U tasks by (time, event id), the newest last, padded with zeros to S rows."""

    h: tf.Tensor  # [U, S, dim] float32
    labels: tf.Tensor  # [U, S, num_labels] float32
    weights: tf.Tensor  # [U, S, num_labels] float32; 0: the label is undefined
    time: tf.Tensor  # [U, S] int64, of the event
    event_id: tf.Tensor  # [U, S] int64, which tells events of one time apart
    count: tf.Tensor  # [U] int32


class SupportStore(tf.saved_model.experimental.TrackableResource):
    """The last rows of each task: tower inputs h with labels, event and the bottom's version.

    It lives in the process, beside the sessions: every model version and thread that names the
    same store shares it, and it closes with the last of them. With a `path` it also lives in
    files. What was put is handed to the system twice a second, so that a killed process loses less
    than its last second; a torn or damaged record is skipped at the next opening. One process at a
    time has a path open. With the URL of a Redis as its path it lives there: all processes that
    name the URL share it, and what was put outlives them. A task whose rows the Redis does not let
    read counts as unknown.

    Assigned to an attribute of a module, it is saved with the module and opened wherever the
    SavedModel is loaded, provided that `qianmo.ops.library.library` was called or that the ops are
    linked in.

    Args:
      name: of the store in the process.
      dim: width of h.
      num_labels: labels, and label weights, of a row.
      max_rows: rows kept of a task, the last ones by event time and id.
      path: folder of its files, made if need be; or URL of a Redis, `redis://HOST:PORT/PREFIX` and
        what else docs/embedding_store.md names. Empty: in memory only.
      ttl_seconds: rows that were written longer ago are not returned, and their memory is freed.
        0: for ever.
      max_tasks: beyond it the task goes that was not written for longest. 0: no bound; not for a
        Redis, which has a `maxmemory` of its own.
      max_bytes: the same for the bytes of rows and index. 0: no bound; not for a Redis.

    Raises:
      tf.errors.FailedPreconditionError: the store is open with other sizes or another path, its
        files hold rows of other sizes or an older format, or they cannot be read or written; the
        Redis does not answer.
      RuntimeError: the ops were not compiled.

    Cost: a row takes 32 + 4 * (dim + 2 * num_labels) bytes, a task 128 more. Memory is that of the
      rows kept: it comes and goes in pages of 512 KiB. A log that outgrows its snapshot is followed
      by a new snapshot, so the files take up to thrice the rows.

    Example:
      >>> store = SupportStore("clicks", dim=2, num_labels=1, max_rows=3)
      >>> h, labels, weights = tf.ones([2, 2]), tf.ones([2, 1]), tf.ones([2, 1])
      >>> status = store.put(
      ...     [7, 7], h, labels, weights, time=[20, 10], event_id=[0, 0], version=[1, 1]
      ... )
      >>> rows = store.get([7, 8], version=1)
      >>> rows.count.numpy(), rows.time.numpy()
      (array([2, 0], dtype=int32), array([[10, 20,  0],
             [ 0,  0,  0]]))
      >>> store.close()
    """

    def __init__(
        self,
        name: str,
        dim: int,
        num_labels: int,
        max_rows: int,
        *,
        path: str | os.PathLike[str] = "",
        ttl_seconds: float = 0.0,
        max_tasks: int = 0,
        max_bytes: int = 0,
    ) -> None:
        super().__init__(device="CPU")
        self.name = name
        self.dim = dim
        self.num_labels = num_labels
        self.max_rows = max_rows
        self.path = os.fspath(path)
        self.ttl_seconds = ttl_seconds
        self.max_tasks = max_tasks
        self.max_bytes = max_bytes
        # Of this object: two holders in one eager process open and close on their own.
        self._shared_name = f"qianmo_support_store_{os.urandom(8).hex()}"
        with tf.init_scope():
            self._initialize()

    def _create_resource(self) -> tf.Tensor:
        return library().qianmo_support_store(shared_name=self._shared_name)

    def _initialize(self) -> None:
        library().qianmo_support_open(
            self.resource_handle,
            store=self.name,
            path=self.path,
            dim=self.dim,
            num_labels=self.num_labels,
            max_rows=self.max_rows,
            ttl_seconds=self.ttl_seconds,
            max_tasks=self.max_tasks,
            max_bytes=self.max_bytes,
        )

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
        """Stores rows; one of the same task, event time and event id is replaced.

        A row that cannot be stored leaves its neighbours alone. A full task gives up its row of the
        earliest event. A warm-up record of a signature that puts should have time 0, which stores
        nothing.

        Args:
          task_id: int64 [N], any value.
          h: float32 [N, dim], the tower inputs.
          labels: float32 [N, num_labels].
          weights: float32 [N, num_labels], at least 0; where one is 0 the label is undefined.
          time: int64 [N], of the event, positive, in any unit.
          event_id: int64 [N], any value, which tells events of one task and time apart.
          version: int64 [N], of the bottom that made h.

        Returns:
          int32 [N]: `STORED`, or bits of `BAD_TIME`, `BAD_VECTOR`, `BAD_LABEL`, `TOO_OLD`,
          `NO_MEMORY` and `UNREACHABLE`.
        """
        return library().qianmo_support_put(
            self.resource_handle, task_id, h, labels, weights, time, event_id, version
        )

    def get(self, task_id: tf.Tensor, version: tf.Tensor, max_rows: int = 0) -> SupportRows:
        """Returns the last rows of tasks.

        Args:
          task_id: int64 [U].
          version: int64 scalar; rows of another version are left out, and counted.
          max_rows: rows to return of a task at most. 0: as many as are kept.
        """
        found = library().qianmo_support_get(
            self.resource_handle,
            task_id,
            version,
            dim=self.dim,
            num_labels=self.num_labels,
            max_rows=max_rows or self.max_rows,
        )
        return SupportRows(*found)

    def stats(self, task_id: tf.Tensor) -> tf.Tensor:
        """Returns int64 [B, len(METRICS)], every row the same, for any int64 [B]."""
        return library().qianmo_support_stats(self.resource_handle, task_id)

    def export_rows(self, filename: str | os.PathLike[str]) -> None:
        """Writes all rows to a file, which has its name when it is complete.

        Raises:
          tf.errors.FailedPreconditionError: the file cannot be written, or a Redis not be read.
        """
        library().qianmo_support_export(self.resource_handle, os.fspath(filename))

    def import_rows(self, filename: str | os.PathLike[str]) -> None:
        """Adds the rows of an exported file, with their times of writing.

        Raises:
          tf.errors.FailedPreconditionError: the file cannot be read, holds rows of other sizes, or
            a part of it is damaged; the rows of the other parts were added. Or a Redis did not
            store all of them.
        """
        library().qianmo_support_import(self.resource_handle, os.fspath(filename))

    def close(self) -> None:
        """Lets the store go, before the process ends; this object is of no use then."""
        tf.raw_ops.DestroyResourceOp(resource=self.resource_handle)
