"""A tower of star topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.domain_column import read_domain
from qianmo.layers.mlp import Correction, Layer
from qianmo.layers.own_weights import Own
from qianmo.layers.partitioned_norm import PartitionedNorm
from qianmo.layers.seam import DOMAIN, Columns
from qianmo.layers.star import StarLeaves
from qianmo.layers.tower import Tower, TowerOutput


@tf_keras.utils.register_keras_serializable(package="qianmo")
class StarTower(Tower):
    """A tower whose every dense layer is a centre shared by all domains and a leaf of each.

        a^l = relu(a^{l-1} (W^l_p * W^l) + b^l_p + b^l),   z = a^L (W_p * W) + b_p + b + s

    with p the row's domain, a^0 the tower's input, normalised if asked, and s as for `Tower`, such
    as what an `AuxiliaryNetwork` gave. With leaves at their start it equals the plain `Tower` of
    the same seed bit for bit. Rows of an unknown domain are scored by the centre.

    What it reads stands in the columns of h: [a^0 ; s, num_labels columns if asked ; domain].

    Args:
      num_labels: K.
      num_domains: P.
      units: widths of the hidden layers.
      dropout: rate after each hidden layer, in training.
      activation: of the hidden layers.
      seed: as for `Tower`.
      norm: whether a^0 passes a `PartitionedNorm`.
      auxiliary: whether h holds s.

    Inputs: h, [..., H].
    Outputs: `TowerOutput`.

    References: Sheng et al. 2021, STAR. Here logits have no activation, and neither has the
      normalisation a place after a layer.
    """

    reads_domain = True

    def __init__(
        self,
        num_labels: int,
        num_domains: int,
        units: Sequence[int] = (),
        dropout: float = 0.0,
        activation: str = "relu",
        seed: int | None = None,
        norm: bool = False,
        auxiliary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_labels, units, dropout, activation, seed, auxiliary, **kwargs)
        self.num_domains = num_domains
        self.norm = (
            PartitionedNorm(num_domains, dtype=self.dtype_policy, name="norm") if norm else None
        )
        dtypes = [self.dtype_policy] * len(self.mlp.units) + [self.head.dtype_policy]
        self.leaves = [
            StarLeaves(num_domains, dtype=dtype, name=f"leaves_{index}")
            for index, dtype in enumerate(dtypes)
        ]

    @property
    def read_columns(self) -> tuple[Columns, ...]:
        """What it takes from the end of h."""
        return (*super().read_columns, Columns(DOMAIN, 1))

    @property
    def own_weights(self) -> list[Own]:
        """The labels' columns of the layer that makes logits, also in its leaves."""
        leaves, labels = self.leaves[-1], self.num_labels
        own = [Own(leaves.kernels, (1, 1, labels)), Own(leaves.biases, (1, labels))]
        return [*super().own_weights, *own]

    def call(
        self, h: tf.Tensor, training: bool = False, correction: Correction | None = None
    ) -> TowerOutput:
        """Computes logits; see `Tower`."""
        widths = [columns.width for columns in self.read_columns]
        x, *s, column = tf.split(h, [h.shape[-1] - sum(widths), *widths], -1)
        domain = read_domain(column[..., 0], self.num_domains)
        if self.norm is not None:
            x = self.norm((x, domain), training=training)

        def star(number: int, a: tf.Tensor, centre: Layer) -> tf.Tensor:
            def layer(a: tf.Tensor) -> tf.Tensor:
                z = centre(a)
                leaves = self.leaves[number]
                is_last = number == len(self.mlp.units)
                kernel = self.head.kernel if is_last else self.mlp.kernels[number]
                kernel = tf.cast(kernel, leaves.compute_dtype)
                return z + leaves((tf.cast(a, leaves.compute_dtype), kernel, domain))

            return layer(a) if correction is None else correction(number, a, layer)

        return self._output(x, s[0] if s else None, h, training, star)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "num_domains": self.num_domains,
            "norm": self.norm is not None,
        }
