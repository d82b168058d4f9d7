"""Raw feature values to ids: the first station of the road."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical
from qianmo.layers.schema import Domain, Schema

OK = 0
BAD_DENSE = 1  # a dense value was NaN or infinite and was read as the mean
BAD_LENGTH = 2  # a list's length was below 0 or above the list's width, and was clipped


class Encoded(NamedTuple):
    """What crosses the embedding seam from the left.

    Attributes:
      ids: feature -> row of its table, int64, [B], or [B, L] for lists.
      lengths: list feature -> valid ids in each row, int64 [B].
      dense: standardised dense features, [B, N].
      status: bits `BAD_DENSE`, `BAD_LENGTH`, int32 [B]; 0 means that the row was read as given.
    """

    ids: dict[str, tf.Tensor]
    lengths: dict[str, tf.Tensor]
    dense: tf.Tensor
    status: tf.Tensor

    def domain(self, schema: Schema) -> tf.Tensor:
        """Places of the rows' domains, int64 [B]; zeros when no feature tells the domain."""
        feature = schema.domain_feature
        return tf.zeros_like(self.status, tf.int64) if feature is None else self.ids[feature.name]


def owns(schema: Schema, domains: Iterable[Domain], domain: tf.Tensor) -> tf.Tensor:
    """Which rows are of the domains that own a feature: places of domains [B] -> bool [B]."""
    return tf.gather(tf.constant(schema.owners(domains)), domain)


def example(schema: Schema, rows: int = 1) -> dict[str, tf.Tensor]:
    """A batch of the right names, shapes and dtypes, to build a model with."""
    features: dict[str, tf.Tensor] = {}
    for f in schema.categorical:
        shape = (rows, f.max_length) if f.is_list else (rows,)
        features[f.name] = tf.zeros(shape, tf.as_dtype(f.dtype))
        if f.is_list:
            features[f.length_name] = tf.zeros((rows,), tf.int64)
    for d in schema.dense:
        features[d.name] = tf.zeros((rows,), tf.float32)
    return features


def completed(schema: Schema, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Features of some names with constants for the others, for what reads one side alone."""
    rows = tf.shape(next(iter(features.values())))[0]
    return {
        name: features[name] if name in features else tf.repeat(column, rows, 0)
        for name, column in example(schema).items()
    }


def _lookup(table: Categorical) -> tf_keras.layers.Layer | None:
    if table.num_ids:
        return None
    if table.hash_buckets:
        return tf_keras.layers.Hashing(table.hash_buckets, name=f"hash_{table.table}")
    vocabulary = table.vocabulary
    if not vocabulary:
        raise ValueError(
            f"table `{table.table}`: `vocabulary` should hold at least one value. Received: "
            f"{vocabulary!r}. Count it from the training rows, or use hash_buckets or num_ids."
        )
    # Keras takes a vocabulary's first value for its own mark of unknown values when they are equal,
    # as -1 and "[UNK]" may be: so a mark that no data holds.
    values, name = list(vocabulary), f"lookup_{table.table}"
    if table.dtype == "int64":
        lowest = int(np.iinfo(np.int64).min)
        return tf_keras.layers.IntegerLookup(vocabulary=values, oov_token=lowest, name=name)
    return tf_keras.layers.StringLookup(vocabulary=values, oov_token="\0unknown", name=name)


def _truncate(
    feature: Categorical, values: tf.Tensor, length: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Cuts lists to `max_length` at the same end as the readers do."""
    limit = feature.max_length
    if values.shape[1] is not None and values.shape[1] <= limit:
        return values, length
    kept = tf.minimum(length, limit)
    if feature.keep == "first":
        return values[:, :limit], kept
    width = tf.shape(values, out_type=length.dtype)[1]
    places = (length - kept)[:, None] + tf.range(tf.minimum(width, limit))
    return tf.gather(values, tf.minimum(places, width - 1), batch_dims=1), kept


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Encode(tf_keras.layers.Layer):
    """Turns raw features into rows of embedding tables and standardised numbers.

        id(x) = 0                     x out of the vocabulary or the range
              = 1 + place of x        vocabulary
              = 1 + x                 identity, 0 <= x < num_ids
              = 1 + hash(x) mod n     hash
        dense(x) = (x - mean) / sqrt(variance), and 0 in rows whose domain does not own it

    The lookups are tf_keras preprocessing layers, so they travel in the SavedModel. No row can make
    the call fail: what cannot be read gets a stated value and a bit in `status`.

    Args:
      schema: the features, as a `Schema` or its config; its vocabularies must be known.

    Inputs: a mapping with exactly the names of `schema.input_names`: [B] each, [B, L] for lists.
    Outputs: `Encoded`.

    Raises:
      ValueError: a vocabulary that has not been counted.

    Example:
    >>> encode = Encode({"features": [{"name": "age", "vocabulary": [18, 25]}], "labels": ["y"]})
    >>> encode({"age": tf.constant([25, 7], tf.int64)}).ids["age"].numpy()
    array([2, 0])
    """

    def __init__(self, schema: Schema | Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # raw values are standardised before they narrow
        self.schema = schema if isinstance(schema, Schema) else Schema.from_config(schema)
        self._lookups = {name: _lookup(table) for name, table in self.schema.tables.items()}
        missing = [f.name for f in self.schema.dense if f.mean is None]
        if missing:
            raise ValueError(f"dense features {missing}: mean and variance are not known yet.")

    @property
    def lookups(self) -> list[tf_keras.layers.Layer]:
        """The preprocessing layers that hold vocabularies or hash."""
        return [lookup for lookup in self._lookups.values() if lookup is not None]

    def _ids(self, table: Categorical, raw: tf.Tensor) -> tf.Tensor:
        lookup = self._lookups[table.table]
        if lookup is None:
            inside = tf.logical_and(raw >= 0, raw < table.num_ids)
            return tf.where(inside, raw + 1, tf.zeros_like(raw))
        ids = lookup(raw)
        return ids + 1 if table.hash_buckets else ids

    def ids(self, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Rows of the tables: feature -> [B] or [B, L]."""
        ids: dict[str, tf.Tensor] = {}
        for name, table in self.schema.tables.items():
            users = [f for f in self.schema.categorical if f.table == name]
            raw = [features[f.name] for f in users]
            # One lookup per table, however many features share it.
            found = self._ids(table, tf.concat([tf.reshape(x, [-1]) for x in raw], 0))
            sizes = [tf.size(x) for x in raw]
            parts = tf.split(found, sizes) if len(users) > 1 else [found]
            for feature, part, x in zip(users, parts, raw, strict=True):
                ids[feature.name] = tf.reshape(part, tf.shape(x))
        return ids

    def domain(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """Places of the rows' domains, int64 [B]; zeros when no feature tells the domain."""
        feature = self.schema.domain_feature
        if feature is None:
            return tf.zeros([tf.shape(next(iter(features.values())))[0]], tf.int64)
        return self._ids(feature, features[feature.name])

    def dense(
        self, features: Mapping[str, tf.Tensor], domain: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Standardised dense features [B, N] and which rows were finite, bool [B].

        What a row's domain does not own is 0, whatever came in.
        """
        dense = self.schema.dense
        x = tf.stack([tf.cast(features[f.name], tf.float32) for f in dense], 1)
        finite = tf.math.is_finite(x)
        is_given = finite
        if any(f.domains for f in dense):
            every = tf.ones_like(domain, tf.bool)
            own = tf.stack(
                [owns(self.schema, f.domains, domain) if f.domains else every for f in dense], 1
            )
            is_given, finite = own & finite, finite | ~own
        mean = tf.constant([f.mean for f in dense], tf.float32)
        scale = tf.constant([f.variance for f in dense], tf.float32) ** -0.5
        standard = tf.where(is_given, (x - mean) * scale, tf.zeros_like(x))
        return tf.cast(standard, self.compute_dtype), tf.reduce_all(finite, 1)

    def call(self, features: Mapping[str, tf.Tensor]) -> Encoded:
        """Encodes one batch."""
        batch = tf.shape(next(iter(features.values())))[0]
        features = dict(features)
        status = tf.zeros([batch], tf.int32)
        lengths: dict[str, tf.Tensor] = {}
        for feature in self.schema.categorical:
            if feature.is_list:
                values, length = features[feature.name], features[feature.length_name]
                width = tf.shape(values, out_type=length.dtype)[1]
                clipped = tf.clip_by_value(length, 0, width)
                status |= tf.where(clipped == length, OK, BAD_LENGTH)
                features[feature.name], lengths[feature.name] = _truncate(feature, values, clipped)
        ids = self.ids(features)
        if self.schema.dense:
            domain = ids.get(self.schema.domain, tf.zeros([batch], tf.int64))
            dense, finite = self.dense(features, domain)
            status |= tf.where(finite, OK, BAD_DENSE)
        else:
            dense = tf.zeros([batch, 0], self.compute_dtype)
        return Encoded(ids, lengths, dense, status)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {**super().get_config(), "schema": self.schema.to_config()}
