"""A bottom with something before it, and columns beside what it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.seam import Columns

Layers = Sequence[tf_keras.layers.Layer]


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Extended(tf_keras.layers.Layer):
    """Puts layers before a bottom, and columns for the tower behind its hidden state.

        e' = T_n(... T_1(e)),   h = [ bottom(e') ; C_1(e') ; C_2(e') ; ... ]

    A tower that needs more than a hidden state, such as the row's domain, reads it from the last
    columns of h; so one tensor crosses the tower seam, whatever the tower.

    Args:
      bottom: layer, `Embedded` -> [B, *].
      before: layers T, `Embedded` -> `Embedded`, such as `Select` or `EPNet`.
      columns: layers C, `Embedded` -> [B, *], such as `DomainColumn`, which say by `columns` what
        theirs are.

    Inputs: e, `Embedded`.
    Outputs: h, [B, H].

    Raises:
      ValueError: a layer C that does not say so.
    """

    def __init__(
        self,
        bottom: tf_keras.layers.Layer,
        before: Layers = (),
        columns: Layers = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bottom = bottom
        self.before = list(before)
        self.columns = list(columns)
        for layer in self.columns:
            if not isinstance(getattr(layer, "columns", None), Columns):
                raise ValueError(
                    f"`columns`: {type(layer).__name__} should have an attribute `columns`, the "
                    "`Columns` that it puts into h. Received: none"
                )

    @property
    def given_columns(self) -> tuple[Columns, ...]:
        """What stands at the end of h."""
        before: tuple[Columns, ...] = tuple(getattr(self.bottom, "given_columns", ()))
        return (*before, *(layer.columns for layer in self.columns))

    @property
    def num_states(self) -> int:
        """Hidden states side by side."""
        return getattr(self.bottom, "num_states", 1)

    def call(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """Computes h."""
        for layer in self.before:
            embedded = layer(embedded, training=training)
        h = self.bottom(embedded, training=training)
        columns = [tf.cast(layer(embedded, training=training), h.dtype) for layer in self.columns]
        return tf.concat([h, *columns], 1) if columns else h

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, its parts serialised."""
        serialize = tf_keras.layers.serialize
        return {
            **super().get_config(),
            "bottom": serialize(self.bottom),
            "before": [serialize(layer) for layer in self.before],
            "columns": [serialize(layer) for layer in self.columns],
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Extended:
        """Builds the layer and its parts."""
        deserialize = tf_keras.layers.deserialize
        parts = {key: [deserialize(part) for part in config[key]] for key in ("before", "columns")}
        return cls(**{**config, "bottom": deserialize(config["bottom"]), **parts})
