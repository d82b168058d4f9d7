"""Some features of an embedded row."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded, fields_of
from qianmo.layers.schema import Schema


class _Columns:
    """Takes places of the second axis by a split, whose gradient is one concatenation."""

    def __init__(self, places: Sequence[int], width: int) -> None:
        self.runs: list[tuple[int, int]] = []
        for place in places:
            if self.runs and self.runs[-1][1] == place:
                self.runs[-1] = (self.runs[-1][0], place + 1)
            else:
                self.runs.append((place, place + 1))
        self.cuts = sorted({0, width, *(end for run in self.runs for end in run)})

    def of(self, x: tf.Tensor) -> tf.Tensor:
        """Those places of x, [B, width, ...]."""
        if len(self.cuts) < 3:  # all of them, or none
            return x if self.runs else x[:, :0]
        sizes = [end - start for start, end in itertools.pairwise(self.cuts)]
        parts = tf.split(x, sizes, axis=1)
        return tf.concat([parts[self.cuts.index(start)] for start, _ in self.runs], 1)


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Select(tf_keras.layers.Layer):
    """Keeps some features of an embedded row, and its domain.

    They come out in the order in which the vectors of a schema of these alone would, none of them
    owned by domains: what a model of one domain, with the same features, reads in the same order.

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
        self._fields: list[_Columns] = []
        linear: list[int] = []
        first = 0
        for dim in dims:
            group = [f.name for f in fields_of(self.schema, dim)]
            kept = [f for f in self.schema.categorical if f.name in group and f.name in features]
            kept.sort(key=lambda f: f.is_list)
            places = [group.index(f.name) for f in kept]
            self._fields.append(_Columns(places, len(group)))
            linear += [first + place for place in places]
            first += len(group)
        self._linear = _Columns(linear, first)
        dense = self.schema.dense_columns
        self._dense = _Columns([i for i, name in enumerate(dense) if name in features], len(dense))

    @property
    def selected(self) -> Schema:
        """What comes out as a schema of its own, by which a layer behind can select again."""
        kept = [f for f in self.schema.features if f.name in self.features]
        return self.schema.with_features(dataclasses.replace(f, domains=()) for f in kept)

    @property
    def width(self) -> int:
        """Columns of what comes out, flat."""
        selected = self.selected
        return sum(f.dim for f in selected.categorical) + len(selected.dense)

    def call(self, embedded: Embedded) -> Embedded:
        """Selects."""
        pairs = zip(embedded.fields, self._fields, strict=True)
        return Embedded(
            tuple(columns.of(field) for field, columns in pairs if columns.runs),
            self._linear.of(embedded.linear),
            self._dense.of(embedded.dense),
            embedded.domain,
        )

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        arguments = {"schema": self.schema.to_config(), "features": self.features}
        return {**super().get_config(), **arguments}
