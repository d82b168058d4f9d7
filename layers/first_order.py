"""First-order terms: the linear part of a factorisation machine, the wide part beside a network."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.own_weights import Own
from qianmo.layers.seam import AUXILIARY, Columns


@tf_keras.utils.register_keras_serializable(package="qianmo")
class FirstOrder(tf_keras.layers.Layer):
    """A logit for each label, linear in the features.

        s_k = sum_f w_fk + sum_n w_nk x_n

    with w_f the first-order columns of the row's ids, pooled as vectors are, and x the dense
    features. All w start at 0.

    Args:
      num_labels: K. `Embed` should have made as many first-order columns.
      dense: whether dense features take part.

    Inputs: `Embedded`.
    Outputs: s, [B, K], which a `Tower` adds to its logits.

    Raises:
      ValueError: another number of first-order columns.

    Example:
    >>> e = Embedded((), tf.constant([[[0.5], [1.0]]]), tf.zeros([1, 0]), tf.constant([0]))
    >>> FirstOrder(1)(e).numpy()
    array([[1.5]], dtype=float32)
    """

    def __init__(self, num_labels: int, dense: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"`num_labels` should be >= 1. Received: {num_labels}")
        self.num_labels = num_labels
        self.dense = dense

    def build(self, input_shape: Any) -> None:
        """Makes the dense features' weights."""
        _, linear, dense, _ = input_shape
        if linear[2] != self.num_labels:
            raise ValueError(
                f"`FirstOrder` needs {self.num_labels} first-order columns, the labels'. "
                f"Received: {linear[2]}; `linear_dim` of the model says how many there are."
            )
        self.kernel = None
        if self.dense and dense[1]:
            shape = (dense[1], self.num_labels)
            self.kernel = self.add_weight("kernel", shape, initializer="zeros")
        super().build(input_shape)

    @property
    def columns(self) -> Columns:
        """What it puts into h."""
        return Columns(AUXILIARY, self.num_labels)

    @property
    def own_weights(self) -> list[Own]:
        """The labels' columns of the dense features' weights."""
        return [] if self.kernel is None else [Own(self.kernel, (1, self.num_labels))]

    def call(self, embedded: Embedded) -> tf.Tensor:
        """Computes s."""
        s = tf.reduce_sum(embedded.linear, 1)
        if self.kernel is not None:
            dense = tf.cast(embedded.dense, s.dtype)
            s += tf.matmul(dense, tf.cast(self.kernel, s.dtype))
        return s

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {**super().get_config(), "num_labels": self.num_labels, "dense": self.dense}
