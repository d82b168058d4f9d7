"""The third station of the road: what lies between the vectors and the tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.seeding import pick_seed

Layers = Sequence[tf_keras.layers.Layer]


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Bottom(tf_keras.layers.Layer):
    """Puts views of the embedded row side by side.

        h = [ I_1(V) ; I_2(V) ; ... ; dense ; G_1(x) ; G_2(x) ; ... ; x ]

    with V the field vectors [B, F, D] and x all vectors and dense features, flat. With `seam_dim`
    a centred linear view of them crosses the tower seam, which is what adaptation wants: of vectors
    that are all positive every pair looks alike.

        h <- (u - mean(u)) / sqrt(var(u) + eps),   u = W h + b

    Args:
      interactions: layers I on field vectors, [B, F, D] -> [B, *], such as `FM` or `CIN`.
      networks: layers G on the flat row, [B, N] -> [B, *], such as `MLP` or `CrossNetwork`; those
        that read the domain, such as `DomainMLP`, get (x, domain).
      flat: whether x itself takes part.
      dense: whether the dense features, which x holds too, take part by themselves.
      seam_dim: width of u; 0 for none.
      seed: of W. None draws one.

    Inputs: `Embedded`.
    Outputs: h, [B, H].

    Raises:
      ValueError: nothing takes part; or fields of unequal dims meet an interaction.
    """

    def __init__(
        self,
        interactions: Layers = (),
        networks: Layers = (),
        flat: bool = False,
        dense: bool = False,
        seam_dim: int = 0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.interactions = list(interactions)
        self.networks = list(networks)
        self.flat = flat
        self.dense = dense
        if not (self.interactions or self.networks or flat or dense):
            raise ValueError("A `Bottom` should have at least one part.")
        if seam_dim < 0:
            raise ValueError(f"`seam_dim` should be >= 0. Received: {seam_dim}")
        self.seam_dim = seam_dim
        self.seed = pick_seed(seed) if seam_dim else seed
        if seam_dim:
            glorot = tf_keras.initializers.GlorotUniform(self.seed)
            policy = self.dtype_policy
            self.seam = tf_keras.layers.Dense(
                seam_dim, kernel_initializer=glorot, dtype=policy, name="seam"
            )
            self.centre = tf_keras.layers.LayerNormalization(
                center=False, scale=False, dtype=policy, name="centre"
            )

    def call(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """Computes the hidden state."""
        parts = [layer(embedded.stacked, training=training) for layer in self.interactions]
        if self.dense:
            parts.append(embedded.dense)
        if self.networks or self.flat:
            flat = embedded.flat
            for layer in self.networks:
                reads_domain = getattr(layer, "reads_domain", False)
                x = (flat, embedded.domain) if reads_domain else flat
                parts.append(layer(x, training=training))
            if self.flat:
                parts.append(flat)
        h = tf.concat(parts, 1) if len(parts) > 1 else parts[0]
        return self.centre(self.seam(h)) if self.seam_dim else h

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, its parts serialised."""
        serialize = tf_keras.layers.serialize
        return {
            **super().get_config(),
            "interactions": [serialize(layer) for layer in self.interactions],
            "networks": [serialize(layer) for layer in self.networks],
            "flat": self.flat,
            "dense": self.dense,
            "seam_dim": self.seam_dim,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Bottom:
        """Builds the layer and its parts."""
        deserialize = tf_keras.layers.deserialize
        parts = {
            key: [deserialize(part) for part in config[key]] for key in ("interactions", "networks")
        }
        return cls(**{**config, **parts})
