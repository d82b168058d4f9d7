"""One tower for each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.mlp import Correction, Layer
from qianmo.layers.own_weights import Own
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.tower import DenseShape, Tower, TowerOutput


@tf_keras.utils.register_keras_serializable(package="qianmo")
class LabelTowers(tf_keras.layers.Layer):
    """K towers of one label each, on one hidden state or on K side by side.

        z_k = tower_k(h)   or   z_k = tower_k(h_k),  h = [h_1 ; ... ; h_K]

    Args:
      num_labels: K.
      units: widths of each tower's hidden layers.
      dropout: rate after each hidden layer, in training.
      split: whether h holds a hidden state for each tower.
      seed: of the towers. None draws one.

    Inputs: h, [..., H].
    Outputs: `TowerOutput`; its hidden layers are those of the towers side by side.

    Raises:
      ValueError: K hidden states asked for, and a width that K does not divide.
    """

    def __init__(
        self,
        num_labels: int,
        units: Sequence[int] = (),
        dropout: float = 0.0,
        split: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"`num_labels` should be >= 1. Received: {num_labels}")
        self.num_labels = num_labels
        self.units = list(units)
        self.dropout = dropout
        self.split = split
        self.seed = pick_seed(seed)
        self.towers = [
            Tower(
                1,
                units,
                dropout,
                seed=derive_seed(self.seed, k),
                dtype=self.dtype_policy,
                name=f"tower_{k}",
            )
            for k in range(num_labels)
        ]

    @property
    def own_weights(self) -> list[Own]:
        """The towers' weights."""
        return [Own(v) for v in self.trainable_weights]

    @property
    def num_states(self) -> int:
        """Hidden states that it takes h for."""
        return self.num_labels if self.split else 1

    def _width(self, h_dim: int) -> int:
        if not self.split:
            return h_dim
        if h_dim % self.num_labels:
            raise ValueError(
                f"h should hold {self.num_labels} hidden states of one width. Received: {h_dim} "
                "columns"
            )
        return h_dim // self.num_labels

    def dense_shapes(self, h_dim: int) -> list[DenseShape]:
        """The dense layers of one tower after the other, as a correction counts them."""
        width = self._width(h_dim)
        return [shape for tower in self.towers for shape in tower.dense_shapes(width)]

    def call(
        self, h: tf.Tensor, training: bool = False, correction: Correction | None = None
    ) -> TowerOutput:
        """Computes logits; see `Tower`."""
        self._width(h.shape[-1])
        states = tf.split(h, self.num_labels, -1) if self.split else [h] * self.num_labels
        found = []
        for k, (tower, state) in enumerate(zip(self.towers, states, strict=True)):
            own: Correction | None = None
            if correction is not None:
                first = k * (len(self.units) + 1)

                def own(number: int, a: tf.Tensor, layer: Layer, first: int = first) -> tf.Tensor:
                    return correction(first + number, a, layer)

            found.append(tower(state, training=training, correction=own))
        hidden = [
            tf.concat(layers, -1) for layers in zip(*(one.hidden for one in found), strict=True)
        ]
        return TowerOutput(tf.concat([one.logits for one in found], -1), hidden, h)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = ("num_labels", "units", "dropout", "split", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
