"""A small network beside the main one, whose output is added to the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.mlp import MLP
from qianmo.layers.own_weights import Own
from qianmo.layers.seam import AUXILIARY, Columns
from qianmo.layers.seeding import derive_seed, pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class AuxiliaryNetwork(tf_keras.layers.Layer):
    """Gives the domain, and what else it reads, a direct way to the logits.

        s = W MLP(x) + b

    with x all vectors, that of the domain among them, and dense features. On the domain alone it
    would be one constant for each domain.

    Args:
      num_labels: K.
      units: widths of the MLP.
      seed: of the weights. None draws one.

    Inputs: `Embedded`.
    Outputs: s, [B, K], which `StarTower` adds to its logits.

    References: Sheng et al. 2021, STAR.
    """

    def __init__(
        self, num_labels: int, units: Sequence[int] = (16,), seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_labels < 1:
            raise ValueError(f"`num_labels` should be >= 1. Received: {num_labels}")
        self.num_labels = num_labels
        self.seed = pick_seed(seed)
        self.mlp = MLP(units, seed=derive_seed(self.seed, 0), dtype=self.dtype_policy, name="mlp")
        self.dense = tf_keras.layers.Dense(
            num_labels,
            kernel_initializer=tf_keras.initializers.GlorotUniform(derive_seed(self.seed, 1)),
            dtype=self.dtype_policy,
            name="dense",
        )

    @property
    def columns(self) -> Columns:
        """What it puts into h."""
        return Columns(AUXILIARY, self.num_labels)

    @property
    def own_weights(self) -> list[Own]:
        """The labels' columns of the layer that makes s."""
        return [
            Own(self.dense.kernel, (1, self.num_labels)),
            Own(self.dense.bias, (self.num_labels,)),
        ]

    def call(self, embedded: Embedded) -> tf.Tensor:
        """Computes s."""
        return self.dense(self.mlp(embedded.flat))

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        arguments = {"num_labels": self.num_labels, "units": list(self.mlp.units)}
        return {**super().get_config(), **arguments, "seed": self.seed}
