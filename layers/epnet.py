"""A gate on the embedding, by what is known of the scene."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.seeding import derive_seed, pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class EPNet(tf_keras.layers.Layer):
    """Scales every entry of the embedded row by a gate of the row.

        x <- x * g,   g = 2 sigmoid(W_2 relu(W_1 [s ; sg(x)] + b_1) + b_2)

    with x all vectors and dense features, s those that the gate is for, such as the domain's, and
    sg the stopped gradient: the gate does not teach the embeddings that it scales, except those
    in s.

    Args:
      gate_input: layer `Embedded` -> `Embedded` that gives s, such as `Select`.
      units: width of the gate's hidden layer.
      seed: of the weights. None draws one.

    Inputs: `Embedded`.
    Outputs: `Embedded`; first-order terms and domain as they were.

    References: Chang et al. 2023, PEPNet, whose x has no dense features.
    """

    def __init__(
        self,
        gate_input: tf_keras.layers.Layer,
        units: int = 64,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if units < 1:
            raise ValueError(f"`units` should be >= 1. Received: {units}")
        self.gate_input = gate_input
        self.units = units
        self.seed = pick_seed(seed)

    def build(self, input_shape: Any) -> None:
        """Makes the gate."""
        fields, _, dense, _ = input_shape
        self._sizes = [*(f[1] * f[2] for f in fields), dense[1]]
        self.hidden, self.scale = (
            tf_keras.layers.Dense(
                width,
                activation,
                kernel_initializer=tf_keras.initializers.GlorotUniform(
                    derive_seed(self.seed, place)
                ),
                dtype=self.dtype_policy,
                name=name,
            )
            for place, (name, width, activation) in enumerate(
                (("hidden", self.units, "relu"), ("scale", sum(self._sizes), "sigmoid"))
            )
        )
        super().build(input_shape)

    def call(self, embedded: Embedded) -> Embedded:
        """Scales the row."""
        x = tf.stop_gradient(embedded.flat)
        s = self.gate_input(embedded).flat
        g = 2 * self.scale(self.hidden(tf.concat([s, x], 1)))
        *gates, dense_gate = tf.split(g, self._sizes, 1)
        fields = tuple(
            field * tf.reshape(gate, tf.shape(field))
            for field, gate in zip(embedded.fields, gates, strict=True)
        )
        dense = embedded.dense * tf.cast(dense_gate, embedded.dense.dtype)
        return Embedded(fields, embedded.linear, dense, embedded.domain)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        gate_input = tf_keras.layers.serialize(self.gate_input)
        arguments = {"gate_input": gate_input, "units": self.units, "seed": self.seed}
        return {**super().get_config(), **arguments}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EPNet:
        """Builds the layer and what gives s."""
        gate_input = tf_keras.layers.deserialize(config["gate_input"])
        return cls(**{**config, "gate_input": gate_input})
