"""Hides the domain of some rows, so that what stands for an unknown domain learns too."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.seeding import derive_seed, pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class HideDomain(tf_keras.layers.Layer):
    """Sets the domain of a share of the rows to 0, the unknown one, in training.

    Where tasks are domains and share nothing, as towers of their own do, rows of an unknown domain
    need a tower too; these rows train it.

    Args:
      rate: share of the rows.
      seed: of the draw, which also depends on the number of training calls, as in `MLP`. None draws
        one.

    Inputs: `Embedded`.
    Outputs: `Embedded`.

    Raises:
      ValueError: a rate outside [0, 1).
    """

    reads_domain = True

    def __init__(self, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` should be in [0, 1). Received: {rate}")
        self.rate = rate
        self.seed = pick_seed(seed)

    def build(self, input_shape: Any) -> None:
        """Makes the counter of training calls."""
        self.calls = self.add_weight("calls", (), tf.int64, initializer="zeros", trainable=False)
        super().build(input_shape)

    def call(self, embedded: Embedded, training: bool = False) -> Embedded:
        """Hides in training; otherwise gives back what it got."""
        if not (training and self.rate):
            return embedded
        seed = tf.stack([tf.constant(derive_seed(self.seed, 0), tf.int64), self.calls.read_value()])
        self.calls.assign_add(1)
        uniform = tf.random.stateless_uniform(tf.shape(embedded.domain), seed, alg="philox")
        hidden = tf.where(uniform < self.rate, tf.zeros_like(embedded.domain), embedded.domain)
        return embedded._replace(domain=hidden)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}
