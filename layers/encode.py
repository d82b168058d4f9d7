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
BAD_DENSE = 1  # a dense value was infinite, or NaN where it may not be, and was read as the mean
BAD_LENGTH = 2  # a list's length was below 0 or above the list's width, and was clipped


class Encoded(NamedTuple):
    """What crosses the embedding seam from the left.

    Attributes:
      ids: feature -> row of its table, int64, [B], or [B, L] for lists.
      lengths: list feature -> valid ids in each row, int64 [B].
      dense: standardised dense features and their indicators, [B, `schema.dense_width`].
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


def _vocabulary(table: Categorical) -> tf.lookup.StaticHashTable:
    """The rows of a vocabulary's values, from 1 on, and 0 for any other value.

    The lookup layers of Keras know unknown values by a token of their own, which data may hold.

    Raises:
      ValueError: the vocabulary has not been counted, or is empty.
    """
    if not table.vocabulary:
        raise ValueError(
            f"table `{table.table}`: `vocabulary` should hold at least one value. Received: "
            f"{table.vocabulary!r}. Count it from the training rows, or use hash_buckets or "
            "num_ids."
        )
    # Strings as bytes: NumPy would cut zeros off their ends.
    values = [v.encode() if isinstance(v, str) else v for v in table.vocabulary]
    with tf.init_scope():
        keys = tf.constant(values, tf.as_dtype(table.dtype))
        rows = tf.range(1, len(values) + 1, dtype=tf.int64)
        return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, rows), 0)


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
        dense(x) = (x - mean) / sqrt(variance), in float64
                 = dense(default), or 0    x is NaN, which stands for no value
                 = 0                       a row whose domain does not own it
        indicator(x) = 1 where x is NaN, else 0

    Vocabularies are hash tables of stock TensorFlow, which travel in the SavedModel. No row can
    make the call fail: what cannot be read gets a stated value and a bit in `status`.

    Args:
      schema: the features, as a `Schema` or its config; its vocabularies must be known.

    Attributes:
      vocabularies: hash table of each embedding table that has a vocabulary.

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
        tables = self.schema.tables.items()
        self._hashes = {
            name: tf_keras.layers.Hashing(table.hash_buckets, name=f"hash_{name}")
            for name, table in tables
            if table.hash_buckets
        }
        self.vocabularies = {
            name: _vocabulary(table)
            for name, table in tables
            if not table.hash_buckets and not table.num_ids
        }
        missing = [f.name for f in self.schema.dense if f.mean is None]
        if missing:
            raise ValueError(f"dense features {missing}: mean and variance are not known yet.")

    def _ids(self, table: Categorical, raw: tf.Tensor) -> tf.Tensor:
        if table.num_ids:
            inside = tf.logical_and(raw >= 0, raw < table.num_ids)
            return tf.where(inside, raw + 1, tf.zeros_like(raw))
        if table.hash_buckets:
            return self._hashes[table.table](raw) + 1
        return self.vocabularies[table.table].lookup(raw)

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
        """Standardised dense features [B, `schema.dense_width`], and which rows were read as given.

        What a row's domain does not own is 0, whatever came in.
        """
        dense = self.schema.dense
        x = tf.stack([tf.cast(features[f.name], tf.float32) for f in dense], 1)
        missing = tf.math.is_nan(x)
        good = tf.math.is_finite(x) | (missing & [f.may_be_missing for f in dense])
        own = tf.ones_like(missing)
        if any(f.domains for f in dense):
            every = tf.ones_like(domain, tf.bool)
            own = tf.stack(
                [owns(self.schema, f.domains, domain) if f.domains else every for f in dense], 1
            )
            good |= ~own
        # In float64, which holds the moments of any float32 values.
        mean = np.array([f.mean for f in dense], np.float64)
        scale = np.array([f.variance for f in dense], np.float64) ** -0.5
        default = [f.mean if f.default is None else f.default for f in dense]
        filled = tf.where(tf.math.is_finite(x), tf.cast(x, tf.float64), mean)
        filled = tf.where(missing & good, np.array(default, np.float64), filled)
        standard = tf.where(own, (filled - mean) * scale, tf.zeros([], tf.float64))
        columns = [tf.cast(standard, self.compute_dtype)]
        if indicators := [i for i, f in enumerate(dense) if f.indicator]:
            is_missing = tf.gather(missing & own, indicators, axis=1)
            columns.append(tf.cast(is_missing, self.compute_dtype))
        return tf.concat(columns, 1), tf.reduce_all(good, 1)

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
