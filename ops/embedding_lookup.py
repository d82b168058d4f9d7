"""Vectors from an embedding store: the op `Qianmo>EmbeddingLookup`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import tensorflow as tf

from qianmo.ops.library import library

tf.no_gradient("Qianmo>EmbeddingLookup")


class Read(NamedTuple):
    """What to read of one table.

    Attributes:
      table: its name.
      dim: D of its vectors.
      ids: int64, of any shape; [B, L] to be pooled.
      lengths: how many ids of each row to pool, from the left, int64 [B].
      pooling: how a row of ids becomes one vector, as `qianmo.layers.embed.pool` does it.
      weights: of the ids that are pooled by "mean", "sum" or "sqrtn", float [B, L]: their sum is
        then of weight * vector, over the sum of weights, nothing, or the root of the sum of their
        squares. Where that is 0 the vector is zeros.
    """

    table: str
    dim: int
    ids: tf.Tensor
    lengths: tf.Tensor | None = None
    pooling: Literal["none", "mean", "sum", "sqrtn", "max"] = "none"
    weights: tf.Tensor | None = None


class EmbeddingStore(tf.saved_model.experimental.TrackableResource):
    """Embedding tables that are read from memory-mapped files or a Redis, not held by the graph.

    All graphs of a process that open the same folder share one mapping. The store follows the
    version that is published there, within a tenth of a second and without a reload of the graph;
    each lookup reads one version.

    In a SavedModel the store opens when the model is loaded, so a server without the op refuses it.

    Args:
      path: the store's folder, the URL of a Redis (see docs/embedding_store.md), or a
        `tf.saved_model.Asset`: a file whose only line names one of them, a folder from the file's
        own folder on.
      space: accepts embedding versions of this space, whose vectors fit the graph; 0 for all.
      on_mismatch: when a version of another space is published, "fall_back" reads the
        newest one there that is of this space, and "refuse" makes lookups fail until one is
        published. When the store opens and there is none, both fail.
      verify: compare the checksums of all rows before a version is used. Without it those of the
        manifest and of the shards' headers are compared, and the files' sizes. Not of a Redis.

    Raises:
      tf.errors.FailedPreconditionError: the store cannot be opened; it names file and fault.
    """

    def __init__(
        self,
        path: str | tf.saved_model.Asset,
        *,
        space: int = 0,
        on_mismatch: Literal["fall_back", "refuse"] = "fall_back",
        verify: bool = False,
    ) -> None:
        super().__init__()
        self._path = path
        if isinstance(path, tf.saved_model.Asset):
            self._track_trackable(path, "path")
        self._open: dict[str, Any] = {
            "space": space,
            "on_mismatch": on_mismatch,
            "verify": verify,
        }
        self._shared_name = f"qianmo_store_{uuid.uuid4()}"
        self._initialize()

    def _create_resource(self) -> tf.Tensor:
        return library().qianmo_embedding_store_handle(shared_name=self._shared_name)

    def _initialize(self) -> None:
        path = self._path
        where = path.asset_path if isinstance(path, tf.saved_model.Asset) else path
        library().qianmo_embedding_store_open(self.resource_handle, where, **self._open)

    def _destroy_resource(self) -> None:
        tf.raw_ops.DestroyResourceOp(resource=self.resource_handle, ignore_lookup_error=True)

    def close(self) -> None:
        """Stops following what is published; lookups fail from now on."""
        self._destroy_resource()

    def rows_lost(self) -> int:
        """Rows that could not be had from a Redis since this process has it open.

        Their requests failed, or got default vectors where the URL says so.
        """
        return int(library().qianmo_embedding_store_rows_lost(self.resource_handle))

    def lookup(
        self,
        reads: Sequence[Read],
        *,
        missing: Literal["default", "zero", "error"] = "default",
        timeout_ms: int = 0,
    ) -> list[tf.Tensor]:
        """Reads all of them in one round, from one embedding version.

        Args:
          reads: what to read.
          missing: what an id without a row gives: the vector of the table's default id, zeros, or
            an error.
          timeout_ms: when to give up; 0 for never.

        Returns:
          For each read its vectors, float32: [..., D] for ids of shape [...], [B, D] when pooled.

        Raises:
          tf.errors.NotFoundError: an id has no row, where `missing` is "error".
          tf.errors.DeadlineExceededError: the time was up.
          tf.errors.FailedPreconditionError: there is no accepted version, or it has not that table.
          tf.errors.AbortedError: a node of the Redis is down, or has lost rows.
        """
        found: list[tf.Tensor] = library().qianmo_embedding_lookup(
            self.resource_handle,
            [tf.cast(r.ids, tf.int64) for r in reads],
            [tf.cast(r.lengths, tf.int64) for r in reads if r.lengths is not None],
            [tf.cast(r.weights, tf.float32) for r in reads if r.weights is not None],
            tables=[r.table for r in reads],
            dims=[r.dim for r in reads],
            pooling=[r.pooling for r in reads],
            weighted=[r.weights is not None for r in reads],
            missing=missing,
            timeout_ms=timeout_ms,
        )
        return found
