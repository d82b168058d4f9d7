"""Some features of an embedded row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded, fields_of
from qianmo.layers.features import Schema


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Select(tf_keras.layers.Layer):
    """Keeps some features of an embedded row, and its domain.

    Args:
      schema: all features, as a `Schema` or its config.
      features: names of those that stay.

    Inputs: `Embedded`, with all features.
    Outputs: `Embedded`, with those named.

    Raises:
      ValueError: no feature, or one that the schema lacks.
    """

    def __init__(
        self, schema: Schema | Mapping[str, Any], features: Sequence[str], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.schema = schema if isinstance(schema, Schema) else Schema.from_config(schema)
        self.features = list(features)
        known = [f.name for f in self.schema.features]
        wrong = [name for name in features if name not in known]
        if wrong or not self.features:
            raise ValueError(
                f"`features` should name some of the schema's. Received: {list(features)}"
            )
        dims = sorted({f.dim for f in self.schema.categorical})
        ordered = [fields_of(self.schema, dim) for dim in dims]
        self._fields = [self._kept(f.name for f in group) for group in ordered]
        self._linear = self._kept(f.name for group in ordered for f in group)
        self._dense = self._kept(f.name for f in self.schema.dense)

    def _kept(self, names: Any) -> list[int]:
        return [place for place, name in enumerate(names) if name in self.features]

    def call(self, embedded: Embedded) -> Embedded:
        """Selects."""
        pairs = zip(embedded.fields, self._fields, strict=True)
        return Embedded(
            tuple(tf.gather(field, kept, axis=1) for field, kept in pairs if kept),
            tf.gather(embedded.linear, tf.constant(self._linear, tf.int32), axis=1),
            tf.gather(embedded.dense, tf.constant(self._dense, tf.int32), axis=1),
            embedded.domain,
        )

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        arguments = {"schema": self.schema.to_config(), "features": self.features}
        return {**super().get_config(), **arguments}
