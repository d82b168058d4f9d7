"""Batches of chunks: consecutive rows of one task, to learn from a task's earlier rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers

_Rows = npt.NDArray[np.int64]


class ChunkReader:
    """Cuts each task's rows, in order of time, into chunks, and draws batches of chunks.

    Without `schema.timestamp` a task's rows stay in the order of the files, as a model whose
    support is drawn at random may have them.

    A task with n rows gives ceil(n / rows) chunks, which hold each of its rows once. Where they lie
    is drawn anew for each epoch: the first and the last chunk take what `n` leaves over, and those
    between have `rows` rows. The chunks of one task are spread evenly over the epoch, so that two
    of them seldom meet in a batch, where they would be one longer episode.

    Args:
      schema: the columns to read; it declares `task_id`.
      path: a file, a folder or a glob, as for `readers.blocks`. Rows of equal time keep its order.
      rows: of a chunk; a task with fewer gives what it has.
      tasks: chunks a batch.

    Raises:
      ValueError: a schema without task, or a size that is not positive.
      DataError: the data do not fit the schema or cannot be read.

    Cost: holds all rows in memory, 8 bytes a value, a list as `max_length` values: 78 MB for
    590,000 rows of MovieLens-1M, or for 150,000 of KuaiRand with its lists.
    """

    def __init__(self, schema: Schema, path: readers.PathLike, *, rows: int, tasks: int) -> None:
        for name, size in (("rows", rows), ("tasks", tasks)):
            if size < 1:
                raise ValueError(f"`{name}` of chunks should be >= 1. Received: {size}")
        if not schema.task_id:
            raise ValueError("Chunks need `schema.task_id`, the column they are cut by.")
        self.schema = schema
        self.rows = rows
        self.tasks = tasks
        blocks = list(readers.blocks(schema, path))
        # A column at a time, so that the rows are not held twice.
        held = {name: np.concatenate([b.pop(name) for b in blocks]) for name in [*blocks[0]]}
        tasks_of_rows = readers.task_ids(schema, held)
        by_time = [held[schema.timestamp]] if schema.timestamp else []
        order = np.lexsort((*by_time, tasks_of_rows))  # stable
        for name in held:
            held[name] = held[name][order]
        self._held: readers.Block = held
        _, self._starts, self._lengths = np.unique(
            tasks_of_rows[order], return_index=True, return_counts=True
        )
        self._chunks = -(-self._lengths // rows)

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return int(self._lengths.sum())

    def num_batches(self, shuffled_rows: int = 0) -> int:
        """Batches an epoch."""
        if shuffled_rows:
            return math.ceil(self.num_rows / shuffled_rows)
        return math.ceil(self._chunks.sum() / self.tasks)

    def dataset(
        self, *, seed: int, epoch: int = 0, skip_batches: int = 0, shuffled_rows: int = 0
    ) -> tf.data.Dataset:
        """Draws an epoch's batches; they depend on `(seed, epoch)` and the data alone.

        Args:
          seed: of the draw.
          epoch: another epoch is another draw.
          skip_batches: leaves out that many batches from the start, and changes nothing in others.
          shuffled_rows: 0 lets the chunks' rows take part in the original loss as well. Else each
            batch begins with so many shuffled rows, which alone take part in it; an epoch is then
            one pass over the shuffled rows, with as many passes over the chunks as it takes.

        Returns:
          A dataset of `(features, targets)` as of `readers.dataset`, with two targets more, float32
          `[B]`: `original` is 1 for rows of the original loss and `episode` 1 for rows of chunks,
          else 0. A chunk's rows stand together, in their task's order.
        """

        def generate() -> Iterator[tuple[readers.Block, readers.Block]]:
            chunks = self._batches(seed, epoch, skip_batches)
            order = np.random.default_rng([seed, epoch]).permutation(self.num_rows)
            for number in range(skip_batches, self.num_batches(shuffled_rows)):
                here = next(chunks)
                beside = order[number * shuffled_rows : (number + 1) * shuffled_rows]
                rows = np.concatenate([beside, here])
                block = {name: values[rows] for name, values in self._held.items()}
                features, targets = readers.batch(self.schema, block)
                is_chunk = np.arange(len(rows)) >= len(beside)
                targets["episode"] = is_chunk.astype(np.float32)
                targets["original"] = (~is_chunk | (not shuffled_rows)).astype(np.float32)
                yield features, targets

        features, targets = readers.signature(self.schema)
        row = tf.TensorSpec([None], tf.float32)
        signature = (features, {**targets, "original": row, "episode": row})
        made = tf.data.Dataset.from_generator(generate, output_signature=signature)
        return made.prefetch(tf.data.AUTOTUNE)

    def _batches(self, seed: int, epoch: int, skip: int) -> Iterator[_Rows]:
        """Row numbers of batch after batch, one pass over the chunks after another."""
        turn, skip = divmod(skip, self.num_batches())
        while True:
            starts, stops = self._drawn(np.random.default_rng([seed, epoch, 1 + turn]))
            for first in range(skip * self.tasks, len(starts), self.tasks):
                batch = slice(first, first + self.tasks)
                yield np.concatenate(
                    [np.arange(*span) for span in zip(starts[batch], stops[batch], strict=True)]
                )
            turn, skip = turn + 1, 0

    def _drawn(self, random: np.random.Generator) -> tuple[Any, Any]:
        """Starts and stops of all chunks, in the order of a pass."""
        counts, lengths = self._chunks, self._lengths
        # The last chunk has as much room as the first: n - (c - 1) rows <= first <= rows.
        first = random.integers(lengths - (counts - 1) * self.rows, self.rows, endpoint=True)
        task = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(task)) - np.repeat(np.cumsum(counts) - counts, counts)
        stops = np.minimum(first[task] + place * self.rows, lengths[task])
        starts = np.maximum(first[task] + (place - 1) * self.rows, 0)
        # A task's chunks, in random order, are spread evenly over the pass.
        shuffled = np.lexsort((random.random(len(task)), task))
        when = np.empty(len(task))
        when[shuffled] = (place + random.random(len(counts))[task]) / counts[task]
        order = np.argsort(when, kind="stable")
        offset = self._starts[task]
        return (starts + offset)[order], (stops + offset)[order]
