"""A tower whose hidden units are scaled by a gate of the row: PPNet and POSO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.mlp import MLP, Correction
from qianmo.layers.seam import GATES, Columns
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.tower import DenseShape, Tower, TowerOutput


@tf_keras.utils.register_keras_serializable(package="qianmo")
class GatedTower(tf_keras.layers.Layer):
    """A tower with a gate after every hidden layer.

        a^l = g^l * relu(W^l a^{l-1} + b^l),   g^l = 2 sigmoid(V^l relu(U^l c + e^l) + f^l)

    with u the last `gate_dim` columns of h, that is, vectors of the user or whoever the gates are
    for, and a^0 the others. PPNet: c = [u ; sg(a^0)], with sg the stopped gradient. POSO: c = u.

    Args:
      num_labels: K.
      gate_dim: columns of u.
      units: widths of the hidden layers.
      gate_units: width of the gates' hidden layers.
      reads_input: whether c holds sg(a^0), as in PPNet.
      dropout: rate after each hidden layer, in training.
      activation: of the hidden layers.
      seed: of weights and dropout. None draws one.

    Inputs: h, [..., H].
    Outputs: `TowerOutput`.

    Raises:
      ValueError: no hidden layer, or a width below 1.

    References: Chang et al. 2023, PEPNet. Dai et al. 2021, POSO, whose gates differ by layer type
      and are those of its MLP here, with C = 2.
    """

    def __init__(
        self,
        num_labels: int,
        gate_dim: int,
        units: Sequence[int],
        gate_units: int = 32,
        reads_input: bool = True,
        dropout: float = 0.0,
        activation: str = "relu",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value in (
            ("num_labels", num_labels),
            ("gate_dim", gate_dim),
            ("gate_units", gate_units),
        ):
            if value < 1:
                raise ValueError(f"`{key}` should be >= 1. Received: {value}")
        if not units:
            raise ValueError("`units` should hold a width: gates scale hidden layers.")
        self.num_labels = num_labels
        self.gate_dim = gate_dim
        self.units = list(units)
        self.gate_units = gate_units
        self.reads_input = reads_input
        self.dropout = dropout
        self.activation = activation
        self.seed = pick_seed(seed)
        self._hidden: list[MLP] = []
        self._gates: list[MLP] = []
        self._scales: list[MLP] = []
        for index, width in enumerate(self.units):
            one, two, three = (derive_seed(self.seed, index, part) for part in range(3))
            dtype = self.dtype_policy
            self._hidden.append(
                MLP((width,), activation, dropout, seed=one, dtype=dtype, name=f"hidden_{index}")
            )
            self._gates.append(MLP((gate_units,), seed=two, dtype=dtype, name=f"gate_{index}"))
            self._scales.append(
                MLP((width,), "sigmoid", seed=three, dtype=dtype, name=f"scale_{index}")
            )
        self.head = Tower(num_labels, seed=derive_seed(self.seed, 0), dtype=dtype, name="head")

    @property
    def read_columns(self) -> tuple[Columns, ...]:
        """What it takes from the end of h."""
        return (Columns(GATES, self.gate_dim),)

    def dense_shapes(self, h_dim: int) -> list[DenseShape]:
        """Its dense layers, in the order in which a correction counts them; gates do not adapt."""
        widths = [h_dim - self.gate_dim, *self.units, self.num_labels]
        last = len(self.units)
        return [DenseShape(widths[i], widths[i + 1], i == 0, i == last) for i in range(last + 1)]

    def call(
        self, h: tf.Tensor, training: bool = False, correction: Correction | None = None
    ) -> TowerOutput:
        """Computes logits; see `Tower`."""
        a, u = tf.split(h, [h.shape[-1] - self.gate_dim, self.gate_dim], -1)
        c = tf.concat([u, tf.stop_gradient(a)], -1) if self.reads_input else u

        def at(index: int) -> Correction | None:
            return correction and (lambda _, x, layer: correction(index, x, layer))

        outputs = []
        parts = zip(self._hidden, self._gates, self._scales, strict=True)
        for index, (layer, gate, scale) in enumerate(parts):
            (a,) = layer.hidden(a, training=training, correction=at(index))
            a *= 2 * scale(gate(c))
            outputs.append(a)
        logits = self.head(a, correction=at(len(self.units))).logits
        return TowerOutput(logits, outputs, h)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = ("num_labels", "gate_dim", "units", "gate_units", "reads_input")
        arguments = {name: getattr(self, name) for name in names}
        more = {"dropout": self.dropout, "activation": self.activation, "seed": self.seed}
        return {**super().get_config(), **arguments, **more}
