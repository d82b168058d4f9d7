"""What a support row holds: what crossed the tower seam, or what any bottom makes that from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import tensorflow as tf

from qianmo.layers.encode import Encoded, example
from qianmo.models.ranker import Ranker

Keep = Literal["hidden", "features"]
# Rows are float32, which holds integers below 2**24 exactly: an id is two of them.
ID_BASE = 2**20

Packed = tuple[tf.Tensor, tf.Tensor]


class HiddenRows:
    """Rows of h, [N, H]: the fastest to use, and of no use to another bottom.

    Attributes:
      dim: numbers in a row.
      version: int64, equal for equal schemas and equal weights left of the tower seam.
    """

    def __init__(self, model: Ranker) -> None:
        self._model = model
        self.dim = model.tower_input(example(model.schema), model.serving_head).shape[-1]
        graph = (
            tf.function(lambda x: model.tower_input(x, model.serving_head))
            .get_concrete_function(example(model.schema))
            .graph
        )
        self.version = _version(model, *(v.numpy() for v in graph.variables))

    def pack(self, features: Mapping[str, tf.Tensor]) -> Packed:
        """Rows [B, dim] and what `encode` says of them, int32 [B]."""
        output, status = self._model.one_head(features, self._model.serving_head)
        return output.h, status

    def hidden(self, rows: tf.Tensor) -> tf.Tensor:
        """The tower inputs [U, S, H] of rows [U, S, dim]: the rows as they are."""
        return rows


class FeatureRows:
    """Rows of encoded features: each bottom makes its own h of them, so they outlive retraining.

    Lists are as wide as declared. An id is its quotient and remainder by `ID_BASE`.

    Attributes:
      dim: numbers in a row.
      version: int64, equal for equal schemas; other vocabularies number other values.
    """

    def __init__(self, model: Ranker) -> None:
        self._model = model
        self._widths = {f.name: f.max_length or 1 for f in model.schema.categorical}
        self._lists = [f.name for f in model.schema.categorical if f.is_list]
        self._num_dense = model.schema.dense_width
        self.dim = 2 * sum(self._widths.values()) + len(self._lists) + self._num_dense
        self.version = _version(model)

    def pack(self, features: Mapping[str, tf.Tensor]) -> Packed:
        """Rows [B, dim] and what `encode` says of them, int32 [B]."""
        encoded = self._model.encode({k: features[k] for k in self._model.schema.input_names})
        ids = []
        for name, width in self._widths.items():
            column = tf.reshape(encoded.ids[name], [tf.size(encoded.status), -1])
            ids.append(tf.pad(column, [[0, 0], [0, width - tf.shape(column)[1]]]))
        whole = tf.concat(ids, 1)
        lengths = [encoded.lengths[name][:, None] for name in self._lists]
        parts = [whole // ID_BASE, whole % ID_BASE, *lengths, encoded.dense]
        return tf.concat([tf.cast(part, tf.float32) for part in parts], 1), encoded.status

    def hidden(self, rows: tf.Tensor) -> tf.Tensor:
        """The tower inputs [U, S, H] of rows [U, S, dim], by this bottom."""
        flat = tf.reshape(rows, [-1, self.dim])
        num_ids = sum(self._widths.values())
        high, low, lengths, dense = tf.split(
            flat, [num_ids, num_ids, len(self._lists), self._num_dense], 1
        )
        whole = tf.cast(high, tf.int64) * ID_BASE + tf.cast(low, tf.int64)
        parts = tf.split(whole, list(self._widths.values()), 1)
        ids = dict(zip(self._widths, parts, strict=True))
        ids = {k: v if k in self._lists else v[:, 0] for k, v in ids.items()}
        counts = tf.unstack(tf.cast(lengths, tf.int64), len(self._lists), 1)
        encoded = Encoded(
            ids,
            dict(zip(self._lists, counts, strict=True)),
            tf.cast(dense, self._model.encode.compute_dtype),
            tf.zeros([tf.shape(flat)[0]], tf.int32),
        )
        model = self._model
        h = model.heads(model.embed(encoded), (model.serving_head,))[model.serving_head].h
        return tf.reshape(h, [tf.shape(rows)[0], tf.shape(rows)[1], h.shape[-1]])


def kept(model: Ranker, keep: Keep) -> HiddenRows | FeatureRows:
    """Rows of that kind, for a model."""
    if keep not in get_args(Keep):
        raise ValueError(f"`keep` should be one of {get_args(Keep)}. Received: {keep!r}")
    return HiddenRows(model) if keep == "hidden" else FeatureRows(model)


def _version(model: Ranker, *weights: np.ndarray) -> int:
    digest = hashlib.sha256(json.dumps(model.schema.to_config(), sort_keys=True).encode())
    # Sorted: a graph tells its variables in another order in each process.
    for part in sorted(hashlib.sha256(np.ascontiguousarray(w).data).digest() for w in weights):
        digest.update(part)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)
