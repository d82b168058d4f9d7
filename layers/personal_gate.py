"""A gate that says, row by row, how much each expert counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.mlp import MLP
from qianmo.layers.own_weights import Own
from qianmo.layers.seeding import derive_seed, pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class PersonalGate(tf_keras.layers.Layer):
    """Fuses experts by weights of the row.

        h_t = sum_e g_te y_e,   g_t = softmax_e(W_t MLP(x) + b_t)

    Args:
      num_experts: E.
      num_gates: T, gates of different tasks on the same experts.
      units: widths of the MLP; none makes the gate linear.
      seed: of the weights. None draws one.

    Attributes:
      only: the expert that gets all weight, or None, as ever but while scores are compared with
        those of a model that an expert was taken from.

    Inputs: (x [B, N], y [B, E, H]), what the gate reads and what the experts made.
    Outputs: h, [B, T, H]; [B, H] when the call tells each row's gate.

    Raises:
      ValueError: a size below 1.
    """

    def __init__(
        self,
        num_experts: int,
        num_gates: int = 1,
        units: Sequence[int] = (),
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value in (("num_experts", num_experts), ("num_gates", num_gates)):
            if value < 1:
                raise ValueError(f"`{key}` should be >= 1. Received: {value}")
        self.num_experts = num_experts
        self.num_gates = num_gates
        self.only: int | None = None
        self.seed = pick_seed(seed)
        self.mlp = MLP(units, seed=derive_seed(self.seed, 0), dtype=self.dtype_policy, name="mlp")
        self.dense = tf_keras.layers.Dense(
            num_gates * num_experts,
            kernel_initializer=tf_keras.initializers.GlorotUniform(derive_seed(self.seed, 1)),
            dtype=self.dtype_policy,
            name="dense",
        )

    @property
    def own_weights(self) -> list[Own]:
        """The gates, side by side in one layer."""
        return [
            Own(self.dense.kernel, (1, self.num_gates)),
            Own(self.dense.bias, (self.num_gates,)),
        ]

    def call(
        self,
        inputs: tuple[tf.Tensor, tf.Tensor],
        available: tf.Tensor | None = None,
        task: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Computes h.

        Args:
          inputs: x and y.
          available: bool [B, E]; experts that a row does not have get no weight. At least one of
            each row should be available.
          task: the gate of each row, 0 to T - 1, [B]. Default: all of them.
        """
        x, y = inputs
        logits = tf.reshape(self.dense(self.mlp(x)), [-1, self.num_gates, self.num_experts])
        if task is not None:
            logits = tf.gather(logits, task, batch_dims=1)[:, None]
        if available is not None:
            logits = tf.where(available[:, None], logits, logits.dtype.min)
        g = tf.nn.softmax(logits)
        if self.only is not None:  # exactly, which the softmax of a large logit is not
            g = tf.broadcast_to(tf.one_hot(self.only, self.num_experts, dtype=g.dtype), tf.shape(g))
        h = tf.matmul(g, y)
        return h if task is None else h[:, 0]

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "num_gates": self.num_gates,
            "units": list(self.mlp.units),
            "seed": self.seed,
        }
