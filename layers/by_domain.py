"""Rows computed apart by their domains, at a cost that grows with the rows alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


def by_domain(
    compute: Callable[[int, Any], tf.Tensor], inputs: Any, domain: tf.Tensor, num_domains: int
) -> tf.Tensor:
    """Computes each row by what belongs to its own domain.

        y_i = f_{d_i}(x_i),   y_i = 0 where d_i = 0

    Args:
      compute: f, called once for each p of 0 to P - 1 with the rows of domain p + 1, perhaps none:
        (p, inputs of n rows) -> [n, H].
      inputs: x, a tensor or any nesting of tensors, with the rows on their first axes.
      domain: d, int64 [B]: 1 to P, 0 for an unknown domain.
      num_domains: P.

    Returns:
      y, [B, H].

    Example:
    >>> double = lambda p, x: (p + 1) * x
    >>> by_domain(double, tf.ones([3, 1]), tf.constant([2, 0, 1]), 2)[:, 0].numpy()
    array([2., 0., 1.], dtype=float32)
    """
    domain = tf.cast(domain, tf.int32)
    places = tf.dynamic_partition(tf.range(tf.size(domain)), domain, num_domains + 1)
    leaves = [
        tf.dynamic_partition(leaf, domain, num_domains + 1) for leaf in tf.nest.flatten(inputs)
    ]
    parts = [
        compute(p, tf.nest.pack_sequence_as(inputs, [leaf[p + 1] for leaf in leaves]))
        for p in range(num_domains)
    ]
    width = parts[0].shape[-1]
    unknown = tf.zeros([tf.size(places[0]), width], parts[0].dtype)
    y = tf.dynamic_stitch(places, [unknown, *parts])
    return tf.ensure_shape(y, [domain.shape[0], width])
