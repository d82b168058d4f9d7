"""Experts that belong to one domain each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.by_domain import by_domain
from qianmo.layers.embed import Embedded
from qianmo.layers.own_weights import Own


@tf_keras.utils.register_keras_serializable(package="qianmo")
class DomainExperts(tf_keras.layers.Layer):
    """Passes each row through its own domain's expert.

        y_i = E_{d_i}(x_i),   y_i = 0 where d_i = 0

    Args:
      experts: E_1 to E_P, any layers of one output width: x of n rows -> [n, H]. n may be 0.

    Inputs: `Embedded`, or (x, domain [B]), where x is a tensor or a nesting of tensors, each
      [B, ...]; domains are 1 to P, and 0 for an unknown one.
    Outputs: y, [B, H].

    Cost: each expert computes the rows of its own domain. The graph grows with P: MLPs of one shape
      are better a `DomainMLP`.
    """

    reads_domain = True

    def __init__(self, experts: Sequence[tf_keras.layers.Layer], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not experts:
            raise ValueError("`experts` should hold one layer for each domain. Received: none")
        self.experts = list(experts)

    @property
    def own_weights(self) -> list[Own]:
        """The experts' weights."""
        return [Own(v) for v in self.trainable_weights]

    def call(self, inputs: Embedded | tuple[Any, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Computes y."""
        x, domain = (inputs, inputs.domain) if isinstance(inputs, Embedded) else inputs
        return by_domain(
            lambda p, rows: self.experts[p](rows, training=training),
            x,
            domain,
            len(self.experts),
        )

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, the experts serialised."""
        experts = [tf_keras.layers.serialize(expert) for expert in self.experts]
        return {**super().get_config(), "experts": experts}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DomainExperts:
        """Builds the layer and its experts."""
        experts = [tf_keras.layers.deserialize(expert) for expert in config["experts"]]
        return cls(**{**config, "experts": experts})
