"""Bi-interaction pooling of the neural factorisation machine."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.shapes import field_shape


@tf.custom_gradient
def pairwise_products(v: tf.Tensor) -> tuple[tf.Tensor, Any]:
    """Sum of the elementwise products of all pairs: [B, F, D] -> [B, D].

    h = 1/2 [ (sum_i v_i)^2 - sum_i v_i^2 ],   dh/dv_i = sum_j v_j - v_i

    The gradient is written out because the automatic one copies three tensors of v's size.
    """
    total = tf.reduce_sum(v, 1)
    h = 0.5 * (tf.square(total) - tf.reduce_sum(tf.square(v), 1))

    def gradient(upstream: tf.Tensor) -> tf.Tensor:
        return upstream[:, None, :] * (total[:, None, :] - v)

    return h, gradient


@tf_keras.utils.register_keras_serializable(package="qianmo")
class BiInteraction(tf_keras.layers.Layer):
    """Sum of the elementwise products of all pairs of fields.

        h = sum_{i<j} v_i * v_j = 1/2 [ (sum_i v_i)^2 - sum_i v_i^2 ]

    The right-hand form costs F * D a row and not F^2 * D. The sum of h over D is `FM`.

    Inputs: field vectors v, [B, F, D].
    Outputs: h, [B, D].

    Raises:
      ValueError: inputs of another shape.

    References:
      He, Chua. Neural Factorization Machines for Sparse Predictive Analytics. SIGIR 2017.

    Example:
    >>> BiInteraction()(tf.constant([[[1.0, 2.0], [3.0, 4.0]]])).numpy()
    array([[3., 8.]], dtype=float32)
    """

    def build(self, input_shape: Any) -> None:
        """Checks the shape."""
        field_shape("BiInteraction", input_shape)
        super().build(input_shape)

    def call(self, v: tf.Tensor) -> tf.Tensor:
        """Computes the pooled interactions."""
        return pairwise_products(v)
