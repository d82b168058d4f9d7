"""Ids to vectors: the second station of the road, right of the embedding seam."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf
import tf_keras

from qianmo.layers.encode import Encoded, owns
from qianmo.layers.features import Categorical, Pooling
from qianmo.layers.schema import Schema
from qianmo.layers.seeding import derive_seed, pick_seed


class Embedded(NamedTuple):
    """What a bottom reads.

    Attributes:
      fields: one tensor [B, F, D] for each embedding dim D that the schema has, by rising D.
      linear: first-order terms, [B, F, K]; K is 0 when none were asked for.
      dense: standardised dense features, [B, N].
      domain: places of the rows' domains, int64 [B]: 1 to P, and 0 for an unknown one.
    """

    fields: tuple[tf.Tensor, ...]
    linear: tf.Tensor
    dense: tf.Tensor
    domain: tf.Tensor

    @property
    def stacked(self) -> tf.Tensor:
        """All fields as one tensor [B, F, D], as interactions between fields need them.

        Raises:
          ValueError: the features have more than one embedding dim, or there are none.
        """
        if len(self.fields) != 1:
            dims = [f.shape[-1] for f in self.fields]
            raise ValueError(
                f"An interaction needs all features to have one embedding `dim`. Received: {dims}"
            )
        return self.fields[0]

    @property
    def flat(self) -> tf.Tensor:
        """All vectors and the dense features side by side, [B, sum of F * D + N]."""
        parts = [tf.reshape(f, [-1, f.shape[1] * f.shape[2]]) for f in self.fields]
        return tf.concat([*parts, tf.cast(self.dense, self.linear.dtype)], 1)


def fields_of(schema: Schema, dim: int) -> list[Categorical]:
    """The features with that embedding dim, in the order of `Embedded.fields`.

    Shared ones first, and of the shared as of each domain's own the lists last.
    """
    # So that the others' vectors come out of one gather and are copied once.
    features = [f for f in schema.categorical if f.dim == dim]
    return sorted(features, key=lambda f: (f.domains, f.is_list))


def pool(vectors: tf.Tensor, length: tf.Tensor, how: Pooling) -> tf.Tensor:
    """Pools lists of vectors over their valid places; an empty list gives zeros.

    Args:
      vectors: [B, L, D], finite in all places.
      length: valid places, from the start, [B].
      how: "mean", "sum", "sqrtn" (sum / sqrt(length)) or "max".

    Returns:
      [B, D].
    """
    width = tf.shape(vectors)[1]
    if how == "max":
        mask = tf.sequence_mask(length, width)[:, :, None]
        largest = tf.reduce_max(tf.where(mask, vectors, vectors.dtype.min), 1)
        return tf.where(length[:, None] > 0, largest, tf.zeros_like(largest))
    weights = tf.sequence_mask(length, width, vectors.dtype)
    if how != "sum":
        count = tf.cast(tf.maximum(length, 1), vectors.dtype)[:, None]
        weights /= tf.sqrt(count) if how == "sqrtn" else count
    # As a product this costs a third of a masked sum, and its gradient too.
    return tf.squeeze(tf.matmul(tf.expand_dims(weights, 1), vectors), 1)


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Embed(tf_keras.layers.Layer):
    """Turns ids into vectors through tables that are fused where their dims agree.

    All tables of one dim are row ranges of one variable, so a batch costs one gather and one sparse
    update for each dim, whatever the number of features. First-order terms are extra columns of
    the same rows, not tables of their own. A feature that domains own costs the rows of these
    domains alone; in other rows its vector is zeros, and no gradient leaves them.

    Args:
      schema: the features, as a `Schema` or its config.
      linear_dim: K, number of first-order columns; 0 for none.
      l2: weight of the loss  l2 * mean over rows of sum ||v||^2  on the vectors of the batch. It
        reads the rows of the batch alone, never a whole table.
      stddev: of the normal initialisation. First-order columns start at 0.
      seed: of the first vectors, which depend on it and on the tables alone, and of the features'
        `drop_rate`. None draws one.

    Inputs: `Encoded`.
    Outputs: `Embedded`.

    Cost: rows read and written are those of the batch; nothing depends on the vocabulary.
    """

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        linear_dim: int = 0,
        l2: float = 0.0,
        stddev: float = 0.01,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value in (("linear_dim", linear_dim), ("l2", l2), ("stddev", stddev)):
            if value < 0:
                raise ValueError(f"`{key}` should be >= 0. Received: {value}")
        self.schema = schema if isinstance(schema, Schema) else Schema.from_config(schema)
        self.linear_dim = linear_dim
        self.l2 = l2
        self.stddev = stddev
        self.seed = pick_seed(seed)
        self.dims = sorted({f.dim for f in self.schema.categorical})
        self._first_row: dict[str, int] = {}

    def features_of(self, dim: int) -> list[Categorical]:
        """The features with that embedding dim, in the order of `Embedded.fields`."""
        return fields_of(self.schema, dim)

    def build(self, input_shape: Any) -> None:
        """Makes one variable for each dim."""
        self.tables: dict[str, tf.Variable] = {}
        for dim in self.dims:
            rows = 0
            for name, table in self.schema.tables.items():
                if table.dim == dim:
                    self._first_row[name] = rows
                    rows += table.num_rows

            normal = tf_keras.initializers.RandomNormal(
                stddev=self.stddev, seed=derive_seed(self.seed, dim)
            )

            def start(
                shape: tuple[int, int], dtype: Any = None, dim: int = dim, normal: Any = normal
            ) -> tf.Tensor:
                vectors = normal((shape[0], dim), dtype=dtype)
                return tf.concat([vectors, tf.zeros((shape[0], shape[1] - dim), dtype)], 1)

            self.tables[str(dim)] = self.add_weight(
                name=f"tables_{dim}", shape=(rows, dim + self.linear_dim), initializer=start
            )
        if any(f.drop_rate for f in self.schema.categorical):
            self._calls = self.add_weight(
                name="drop_calls",
                shape=(),
                dtype=tf.int64,
                initializer="zeros",
                trainable=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
        super().build(input_shape)

    def _with_drops(self, encoded: Encoded) -> Encoded:
        """Reads each feature's `drop_rate` of the values as unknown, others at each call."""
        ids = dict(encoded.ids)
        call = self._calls.read_value()
        self._calls.assign_add(1)
        for number, feature in enumerate(self.schema.categorical):
            if feature.drop_rate:
                values = ids[feature.name]
                # Paths of one number are the tables' seeds, so drops take two. Calls are counted by
                # a weight, so that a resumed run drops what it would have dropped.
                seed = tf.stack([tf.constant(derive_seed(self.seed, number, 1), tf.int64), call])
                uniform = tf.random.stateless_uniform(tf.shape(values), seed, alg="philox")
                ids[feature.name] = tf.where(uniform >= feature.drop_rate, values, 0)
        return encoded._replace(ids=ids)

    def rows(self, table: str) -> tuple[tf.Variable, int, int]:
        """Where a table lies: (fused variable, first row, end row)."""
        described = self.schema.tables[table]
        first = self._first_row[table]
        return self.tables[str(described.dim)], first, first + described.num_rows

    def vectors(self, encoded: Encoded) -> dict[str, tf.Tensor]:
        """Vectors of each feature, lists pooled: feature -> [B, dim + linear_dim].

        This is what crosses the embedding seam when graph and embeddings are deployed apart.
        """
        found: dict[str, tf.Tensor] = {}
        for dim in self.dims:
            features = self.features_of(dim)
            gathered = self._gather(dim, features, encoded)
            found.update(zip([f.name for f in features], tf.unstack(gathered, axis=1), strict=True))
        return found

    def _gather(self, dim: int, features: list[Categorical], encoded: Encoded) -> tf.Tensor:
        """Looks up all features of one dim: [B, F, dim + linear_dim]."""
        parts = []
        for domains, group in itertools.groupby(features, lambda f: f.domains):
            owned = [*group]
            if not domains:
                parts.append(self._look_up(dim, owned, encoded.ids, encoded.lengths))
                continue
            domain = encoded.ids[self.schema.domain]
            rows = tf.where(owns(self.schema, domains, domain))
            ids = {f.name: tf.gather(encoded.ids[f.name], rows[:, 0]) for f in owned}
            lengths = {
                f.name: tf.gather(encoded.lengths[f.name], rows[:, 0]) for f in owned if f.is_list
            }
            found = self._look_up(dim, owned, ids, lengths)
            shape = tf.concat([tf.shape(domain), tf.shape(found)[1:]], 0)
            part = tf.scatter_nd(rows, found, tf.cast(shape, tf.int64))
            parts.append(tf.ensure_shape(part, [None, *found.shape[1:]]))
        return tf.concat(parts, 1) if len(parts) > 1 else parts[0]

    def _look_up(
        self,
        dim: int,
        features: list[Categorical],
        ids: Mapping[str, tf.Tensor],
        lengths: Mapping[str, tf.Tensor],
    ) -> tf.Tensor:
        table = self.tables[str(dim)]
        places = {f.name: ids[f.name] + self._first_row[f.table] for f in features}
        parts = []
        singles = [places[f.name] for f in features if not f.is_list]
        if singles:
            parts.append(tf.gather(table, tf.stack(singles, 1)))
        for f in features:
            if f.is_list:
                # Padding may hold any id; its row is not read, and no gradient names it.
                valid = tf.sequence_mask(lengths[f.name], tf.shape(places[f.name])[1])
                rows = tf.where(valid, places[f.name], self._first_row[f.table])
                vectors = tf.gather(table, rows)
                pooled = pool(vectors, lengths[f.name], f.pooling)
                parts.append(tf.expand_dims(pooled, 1))
        return tf.cast(tf.concat(parts, 1), self.compute_dtype)

    def assemble(
        self, vectors: Mapping[str, tf.Tensor], dense: tf.Tensor, domain: tf.Tensor
    ) -> Embedded:
        """Makes `Embedded` of what crossed the seam (see `vectors`), and the rows' domains."""
        stacks = [
            tf.stack([vectors[f.name] for f in self.features_of(dim)], 1) for dim in self.dims
        ]
        return self._embedded(stacks, dense, domain)

    def _embedded(self, stacks: list[tf.Tensor], dense: tf.Tensor, domain: tf.Tensor) -> Embedded:
        # A split's gradient is one concatenation; that of a slice would first fill zeros.
        parts = [
            tf.split(s, [dim, self.linear_dim], axis=2)
            for s, dim in zip(stacks, self.dims, strict=True)
        ]
        fields = tuple(part[0] for part in parts)
        if stacks:
            linear = tf.concat([part[1] for part in parts], 1)
        else:
            linear = tf.zeros([tf.shape(dense)[0], 0, self.linear_dim], dense.dtype)
        return Embedded(fields, linear, dense, domain)

    def call(self, encoded: Encoded, training: bool = False) -> Embedded:
        """Embeds one batch."""
        if training and any(f.drop_rate for f in self.schema.categorical):
            encoded = self._with_drops(encoded)
        stacks = [self._gather(dim, self.features_of(dim), encoded) for dim in self.dims]
        if self.l2 and training and stacks:
            # As wide as the weights: a sum over a batch is beyond bfloat16.
            wide = [tf.cast(s, self.variable_dtype) for s in stacks]
            squares = [tf.reduce_sum(tf.square(s)) for s in wide]
            batch = tf.cast(tf.shape(wide[0])[0], self.variable_dtype)
            self.add_loss(self.l2 * tf.add_n(squares) / batch)
        return self._embedded(stacks, encoded.dense, encoded.domain(self.schema))

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "schema": self.schema.to_config(),
            "linear_dim": self.linear_dim,
            "l2": self.l2,
            "stddev": self.stddev,
            "seed": self.seed,
        }
