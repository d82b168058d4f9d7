"""What a tower's gates read, as columns of h."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.schema import Schema
from qianmo.layers.seam import GATES, Columns
from qianmo.layers.select import Select


@tf_keras.utils.register_keras_serializable(package="qianmo")
class GateColumns(tf_keras.layers.Layer):
    """The vectors and dense features that gates read, side by side.

    Args:
      schema: all features, as a `Schema` or its config.
      features: names of those that the gates read.

    Inputs: `Embedded`.
    Outputs: [B, G].

    Raises:
      ValueError: no feature, or one that the schema lacks.
    """

    def __init__(
        self, schema: Schema | Mapping[str, Any], features: Sequence[str], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.select = Select(schema, features, dtype=self.dtype_policy, name="select")

    @property
    def columns(self) -> Columns:
        """What it puts into h."""
        return Columns(GATES, self.select.width)

    def call(self, embedded: Embedded) -> tf.Tensor:
        """Makes the columns."""
        return self.select(embedded).flat

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        of_select = self.select.get_config()
        return {**super().get_config(), **{k: of_select[k] for k in ("schema", "features")}}
