"""Field-weighted factorisation machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qianmo.layers.shapes import field_shape


@tf_keras.utils.register_keras_serializable(package="qianmo")
class FwFM(tf_keras.layers.Layer):
    """A factorisation machine with a learned strength for each pair of fields.

        z = sum_{i<j} r_ij <v_i, v_j>

    All r start at 1, where the layer is `FM`.

    Args:
      per_dim: whether to leave out the sum over D, which gives the vector
        sum_{i<j} r_ij (v_i * v_j) that a neural field-weighted FM feeds to its dense layers.

    Inputs: field vectors v, [B, F, D].
    Outputs: z, a logit, [B, 1]; with `per_dim` a vector, [B, D].

    Raises:
      ValueError: inputs of another shape, or fewer than two fields.

    References:
      Pan et al. Field-weighted Factorization Machines for Click-Through Rate Prediction in Display
      Advertising. WWW 2018. The first-order terms are not part of this layer.

    Example:
    >>> FwFM()(tf.constant([[[1.0, 2.0], [3.0, 4.0]]])).numpy()
    array([[11.]], dtype=float32)
    """

    def __init__(self, per_dim: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.per_dim = per_dim

    def build(self, input_shape: Any) -> None:
        """Makes r, one weight for each pair i < j, in the order (0, 1), (0, 2), ..."""
        num_fields, _ = field_shape("FwFM", input_shape)
        if num_fields < 2:
            raise ValueError(f"`FwFM` needs at least two fields. Received: {num_fields}")
        self._pairs = np.stack(np.triu_indices(num_fields, 1), 1).astype(np.int32)
        self.r = self.add_weight(name="r", shape=(len(self._pairs),), initializer="ones")
        super().build(input_shape)

    def call(self, v: tf.Tensor) -> tf.Tensor:
        """Computes the logit, or the vector."""
        num_fields = v.shape[1]
        upper = tf.scatter_nd(self._pairs, tf.cast(self.r, v.dtype), [num_fields, num_fields])
        # sum_i v_i * (sum_{j>i} r_ij v_j): one product [F, F] x [F, D] a row.
        products = v * tf.einsum("ij,bjd->bid", upper, v)
        if self.per_dim:
            return tf.reduce_sum(products, 1)
        return tf.reduce_sum(products, [1, 2])[:, None]

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {**super().get_config(), "per_dim": self.per_dim}
