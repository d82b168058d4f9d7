"""First vectors for ids that training has not seen: Meta-Embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.seeding import pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class MetaEmbedding(tf_keras.layers.Layer):
    """A vector for a new id, from what else is known of the item.

        phi = gamma tanh(W x + b)

    Args:
      dim: width of phi.
      scale: gamma, the largest value that phi can have.
      seed: of W. None draws one.

    Inputs: x, the vectors of the item's other features side by side, [B, N].
    Outputs: phi, [B, dim].

    Raises:
      ValueError: a dim below 1, or a scale that is not positive.

    References: Pan et al. 2019, Warm Up Cold-start Advertisements: Improving CTR Predictions via
    Learning to Learn ID Embeddings.
    """

    def __init__(
        self, dim: int, scale: float = 0.2, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if dim < 1:
            raise ValueError(f"`dim` should be >= 1. Received: {dim}")
        if not scale > 0:
            raise ValueError(f"`scale` should be > 0. Received: {scale}")
        self.dim = dim
        self.scale = scale
        self.seed = pick_seed(seed)
        glorot = tf_keras.initializers.GlorotUniform(self.seed)
        self.dense = tf_keras.layers.Dense(
            dim, "tanh", kernel_initializer=glorot, dtype=self.dtype_policy, name="dense"
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Makes phi."""
        return self.scale * self.dense(x)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        arguments = {"dim": self.dim, "scale": self.scale, "seed": self.seed}
        return {**super().get_config(), **arguments}


def warm_up_loss(
    phi: tf.Tensor,
    cold: Callable[[tf.Tensor], tf.Tensor],
    warm: Callable[[tf.Tensor], tf.Tensor],
    *,
    step_size: float,
    cold_share: float,
) -> tf.Tensor:
    """How good first vectors are before and after a step: the loss that `MetaEmbedding` learns by.

        L_t = alpha l_a(phi_t) + (1 - alpha) l_b(phi_t - eta grad l_a(phi_t))

    Args:
      phi: first vectors of T ids, [T, D].
      cold: l_a: vectors [T, D] -> the mean loss of each id's rows in a first batch, [T].
      warm: l_b: the same of a second batch.
      step_size: eta.
      cold_share: alpha.

    Returns:
      [T].
    """
    with tf.GradientTape() as tape:
        tape.watch(phi)
        before = cold(phi)
        total = tf.reduce_sum(before)
    after = warm(phi - step_size * tape.gradient(total, phi))
    return cold_share * before + (1 - cold_share) * after
