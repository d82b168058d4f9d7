"""The last station of the road, right of the tower seam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf
import tf_keras

from qianmo.layers.mlp import MLP, Correction, corrected
from qianmo.layers.own_weights import Own
from qianmo.layers.seam import AUXILIARY, Columns
from qianmo.layers.seeding import derive_seed, pick_seed


class TowerOutput(NamedTuple):
    """A tower's logits [B, K], the outputs of its hidden layers, each [B, units], and its input."""

    logits: tf.Tensor
    hidden: list[tf.Tensor]
    h: tf.Tensor


class DenseShape(NamedTuple):
    """One dense layer of a tower: its widths, whether it reads h, whether it makes logits."""

    num_inputs: int
    num_outputs: int
    is_first: bool
    is_last: bool


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Tower(tf_keras.layers.Layer):
    """Hidden state to logits: dense layers, then one linear output for each label.

        a^l = relu(W^l a^{l-1} + b^l),   z = W a^L + b + s

    with s logits that stand ready in the last K columns of h, if any, such as first-order terms,
    and a^0 the others.

    Args:
      num_labels: K.
      units: widths of the hidden layers; none makes the tower linear.
      dropout: rate after each hidden layer, in training.
      activation: of the hidden layers.
      seed: of first weights and dropout, as for `MLP`. None draws one.
      auxiliary: whether h holds s.

    Inputs: h, [..., H].
    Outputs: `TowerOutput`; logits are float32 under every dtype policy but float64.
    """

    def __init__(
        self,
        num_labels: int,
        units: Sequence[int] = (),
        dropout: float = 0.0,
        activation: str = "relu",
        seed: int | None = None,
        auxiliary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"`num_labels` should be >= 1. Received: {num_labels}")
        self.num_labels = num_labels
        self.auxiliary = auxiliary
        self.seed = pick_seed(seed)
        self.mlp = MLP(
            units,
            activation,
            dropout,
            seed=derive_seed(self.seed, 0),
            dtype=self.dtype_policy,
            name="mlp",
        )
        glorot = tf_keras.initializers.GlorotUniform(derive_seed(self.seed, 1))
        wide = "float64" if self.compute_dtype == "float64" else "float32"
        self.head = tf_keras.layers.Dense(
            num_labels, kernel_initializer=glorot, dtype=wide, name="head"
        )

    @property
    def own_weights(self) -> list[Own]:
        """The labels' columns of the layer that makes logits."""
        return [
            Own(self.head.kernel, (1, self.num_labels)),
            Own(self.head.bias, (self.num_labels,)),
        ]

    @property
    def read_columns(self) -> tuple[Columns, ...]:
        """What it takes from the end of h."""
        return (Columns(AUXILIARY, self.num_labels),) if self.auxiliary else ()

    def _num_read(self) -> int:
        return sum(columns.width for columns in self.read_columns)

    def dense_shapes(self, h_dim: int) -> list[DenseShape]:
        """Its dense layers, in the order in which a correction counts them."""
        widths = [h_dim - self._num_read(), *self.mlp.units, self.num_labels]
        last = len(widths) - 2
        return [DenseShape(widths[i], widths[i + 1], i == 0, i == last) for i in range(last + 1)]

    def call(
        self, h: tf.Tensor, training: bool = False, correction: Correction | None = None
    ) -> TowerOutput:
        """Computes logits.

        Args:
          h: what crosses the tower seam.
          training: whether dropout acts.
          correction: what a task makes of each dense layer, see `InnerLoop`.
        """
        x, s = h, None
        if self.auxiliary:
            x, s = tf.split(h, [h.shape[-1] - self.num_labels, self.num_labels], -1)
        return self._output(x, s, h, training, correction)

    def _output(
        self,
        x: tf.Tensor,
        s: tf.Tensor | None,
        h: tf.Tensor,
        training: bool,
        correction: Correction | None,
    ) -> TowerOutput:
        hidden = self.mlp.hidden(x, training=training, correction=correction)
        logits = corrected(correction, len(hidden), self.head, hidden[-1] if hidden else x)
        if s is not None:
            logits += tf.cast(s, logits.dtype)
        return TowerOutput(logits, hidden, h)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "num_labels": self.num_labels,
            "units": list(self.mlp.units),
            "dropout": self.mlp.dropout,
            "activation": self.mlp.activation,
            "seed": self.seed,
            "auxiliary": self.auxiliary,
        }
