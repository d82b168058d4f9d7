"""Second-order factorisation machine."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.bi_interaction import pairwise_products
from qianmo.layers.shapes import field_shape


@tf_keras.utils.register_keras_serializable(package="qianmo")
class FM(tf_keras.layers.Layer):
    """Sum of the inner products of all pairs of fields.

        z = sum_{i<j} <v_i, v_j> = 1/2 sum_d [ (sum_i v_id)^2 - sum_i v_id^2 ]

    The right-hand form costs F * D a row and not F^2 * D.

    Inputs: field vectors v, [B, F, D].
    Outputs: z, a logit, [B, 1].

    Raises:
      ValueError: inputs of another shape.

    References:
      Rendle. Factorization Machines. ICDM 2010. The first-order terms are not part of this layer.

    Example:
    >>> FM()(tf.constant([[[1.0, 2.0], [3.0, 4.0]]])).numpy()
    array([[11.]], dtype=float32)
    """

    def build(self, input_shape: Any) -> None:
        """Checks the shape."""
        field_shape("FM", input_shape)
        super().build(input_shape)

    def call(self, v: tf.Tensor) -> tf.Tensor:
        """Computes the logit."""
        return tf.reduce_sum(pairwise_products(v), 1, keepdims=True)
