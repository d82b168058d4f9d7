"""A row's domain as a column of h, for towers that need it."""

from __future__ import annotations

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.seam import DOMAIN, Columns

_MOST_IN_BFLOAT16 = 256  # larger whole numbers are not exact in it


@tf_keras.utils.register_keras_serializable(package="qianmo")
class DomainColumn(tf_keras.layers.Layer):
    """Gives the place of each row's domain as a number, which `read_domain` reads back.

    Inputs: `Embedded`.
    Outputs: [B, 1], 0 to P.
    """

    reads_domain = True
    columns = Columns(DOMAIN, 1)

    def call(self, embedded: Embedded) -> tf.Tensor:
        """Makes the column."""
        return tf.cast(embedded.domain, embedded.linear.dtype)[:, None]


def read_domain(column: tf.Tensor, num_domains: int) -> tf.Tensor:
    """Places of domains, int64 [...], from what `DomainColumn` made, [...].

    Raises:
      ValueError: more domains than the column's dtype tells apart.
    """
    if column.dtype in (tf.bfloat16, tf.float16) and num_domains > _MOST_IN_BFLOAT16:
        raise ValueError(
            f"{num_domains} domains cannot cross the tower seam as {column.dtype.name}; train "
            "with `train.dtype_policy` float32."
        )
    domain = tf.cast(tf.round(column), tf.int64)
    return tf.clip_by_value(domain, 0, num_domains)
