"""The items that training saw last, as negatives, and how often it saw each item."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras


@tf_keras.utils.register_keras_serializable(package="qianmo")
class ItemQueue(tf_keras.layers.Layer):
    """A first-in-first-out queue of Q item vectors n_j, and what a query makes of them.

        s_j = <q, n_j> + log w_j,   w_j = Q p_j^-1 / sum_k p_k^-1,   p_i = (c_i + 1) / (c + N)

    with c_i how often item i was pushed, c the sum of these and N the number of items. The weights
    make up for popular items standing in the queue more often (log-Q correction): in expectation
    the queue counts as Q items drawn from all alike.

    Until Q items were pushed, those that were stand alone in the softmax and the sum, and what is
    not filled has no weight. An empty queue counts as Q items of score 0.

    Where items belong to domains, likewise, only those of the query's own domain have weights. A
    query of an unknown domain, or of one that has no item in the queue yet, meets all.

    Args:
      size: Q.
      dim: D, width of the vectors.
      num_items: N; ids are from 0 to N - 1.

    Inputs: q, [..., D], and where items belong to domains the rows' domains, int64 [...].
    Outputs: s, [..., Q]; float32 under every dtype policy but float64.

    Raises:
      ValueError: a size, dim or number below 1.

    References: Yi et al. 2019, Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations, which estimates p from the steps between two occurrences; here items are
    counted, since one may stand in a batch many times.
    """

    def __init__(self, size: int, dim: int, num_items: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # scores stay exact under every policy
        for name, value in (("size", size), ("dim", dim), ("num_items", num_items)):
            if value < 1:
                raise ValueError(f"`{name}` should be >= 1. Received: {value}")
        self.size = size
        self.dim = dim
        self.num_items = num_items

    def build(self, input_shape: Any = None) -> None:
        """Makes the queue and the counts, which no gradient reaches."""

        def weight(name: str, shape: tuple[int, ...], dtype: Any) -> tf.Variable:
            return self.add_weight(
                name=name,
                shape=shape,
                dtype=dtype,
                initializer="zeros",
                trainable=False,
                experimental_autocast=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )

        self._vectors = weight("vectors", (self.size, self.dim), self.variable_dtype)
        self._ids = weight("ids", (self.size,), tf.int64)
        self._domains = weight("domains", (self.size,), tf.int64)
        self._counts = weight("counts", (self.num_items,), tf.int64)
        self._total = weight("total", (), tf.int64)
        super().build(input_shape)

    def log_correction(self, ids: tf.Tensor) -> tf.Tensor:
        """What is added to the scores of items that are drawn with their p: -log p, float32."""
        counts = tf.cast(tf.gather(self._counts, ids) + 1, tf.float32)
        return tf.math.log(tf.cast(self._total + self.num_items, tf.float32) / counts)

    def push(self, ids: tf.Tensor, vectors: tf.Tensor, domains: tf.Tensor | None = None) -> None:
        """Counts the items [B] and puts their vectors [B, D] in; the oldest fall out."""
        domains = tf.zeros_like(ids) if domains is None else domains
        self._counts.scatter_add(tf.IndexedSlices(tf.ones_like(ids), ids))
        self._total.assign_add(tf.size(ids, tf.int64))
        vectors = tf.cast(tf.stop_gradient(vectors), self._vectors.dtype)
        self._vectors.assign(tf.concat([self._vectors, vectors], 0)[-self.size :])
        self._ids.assign(tf.concat([self._ids, ids], 0)[-self.size :])
        self._domains.assign(tf.concat([self._domains, domains], 0)[-self.size :])

    def call(self, q: tf.Tensor, domain: tf.Tensor | None = None) -> tf.Tensor:
        """Scores the queue."""
        inverse = self.log_correction(self._ids)
        # The newest stand last.
        is_filled = tf.range(self.size - 1, -1, -1, tf.int64) < self._total
        takes_part = is_filled | (self._total == 0)
        if domain is not None:
            own = is_filled & (self._domains == domain[..., None])
            meets_all = ~tf.reduce_any(own, -1, keepdims=True) | (domain[..., None] == 0)
            takes_part = own | (takes_part & meets_all)
        inverse = tf.where(takes_part, inverse, inverse.dtype.min)
        log_weights = tf.math.log(float(self.size)) + tf.nn.log_softmax(inverse)
        # All queries as one matrix: one product of many rows is much faster than many of few.
        rows = tf.reshape(tf.cast(q, self._vectors.dtype), [-1, self.dim])
        scores = tf.matmul(rows, self._vectors, transpose_b=True)
        scores = tf.reshape(scores, tf.concat([tf.shape(q)[:-1], [self.size]], 0))
        return scores + tf.cast(log_weights, scores.dtype)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        arguments = {"size": self.size, "dim": self.dim, "num_items": self.num_items}
        return {**super().get_config(), **arguments}
