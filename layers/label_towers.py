"""One tower for each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.mlp import Correction, Layer
from qianmo.layers.own_weights import Own
from qianmo.layers.seam import Columns
from qianmo.layers.tower import DenseShape, TowerOutput


@tf_keras.utils.register_keras_serializable(package="qianmo")
class LabelTowers(tf_keras.layers.Layer):
    """K towers of one label each, on one hidden state or on K side by side.

        z_k = tower_k(h)   or   z_k = tower_k(h_k),  h = [h_1 ; ... ; h_K]

    Args:
      towers: of one label each, equally deep, such as `Tower` or `GatedTower`.
      split: whether h holds a hidden state for each tower.

    Inputs: h, [..., H].
    Outputs: `TowerOutput`; its hidden layers are those of the towers side by side.

    Raises:
      ValueError: no tower; towers that read different columns, or any where h is split; K hidden
        states asked for, and a width that K does not divide.
    """

    def __init__(
        self, towers: Sequence[tf_keras.layers.Layer], split: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not towers:
            raise ValueError("`towers` should hold one for each label. Received: none")
        self.towers = list(towers)
        self.split = split
        read = {tuple(getattr(tower, "read_columns", ())) for tower in self.towers}
        if len(read) > 1 or (split and read != {()}):
            raise ValueError(
                "`towers` should all read the same columns of h, and none where it is split. "
                f"Received: {sorted(read)}"
            )

    @property
    def num_labels(self) -> int:
        """K."""
        return len(self.towers)

    @property
    def own_weights(self) -> list[Own]:
        """The towers' weights."""
        return [Own(v) for v in self.trainable_weights]

    @property
    def num_states(self) -> int:
        """Hidden states that it takes h for."""
        return self.num_labels if self.split else 1

    @property
    def read_columns(self) -> tuple[Columns, ...]:
        """What its towers take from the end of h."""
        return tuple(getattr(self.towers[0], "read_columns", ()))

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
        width = self._width(h.shape[-1])
        states = tf.split(h, self.num_labels, -1) if self.split else [h] * self.num_labels
        outputs, first = [], 0
        for tower, state in zip(self.towers, states, strict=True):
            own: Correction | None = None
            if correction is not None:

                def own(number: int, a: tf.Tensor, layer: Layer, first: int = first) -> tf.Tensor:
                    return correction(first + number, a, layer)

                first += len(tower.dense_shapes(width))
            outputs.append(tower(state, training=training, correction=own))
        layers = zip(*(output.hidden for output in outputs), strict=True)
        hidden = [tf.concat(layer, -1) for layer in layers]
        return TowerOutput(tf.concat([output.logits for output in outputs], -1), hidden, h)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, the towers serialised."""
        towers = [tf_keras.layers.serialize(tower) for tower in self.towers]
        return {**super().get_config(), "towers": towers, "split": self.split}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LabelTowers:
        """Builds the layer and its towers."""
        towers = [tf_keras.layers.deserialize(tower) for tower in config["towers"]]
        return cls(**{**config, "towers": towers})
