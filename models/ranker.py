"""What every ranking model shares: the road up to the embedding seam, and a training step."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embed, Embedded
from qianmo.layers.encode import Encode, example
from qianmo.layers.features import Schema
from qianmo.layers.tower import TowerOutput

Targets = Mapping[str, tf.Tensor]


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Ranker(tf_keras.Model):
    """A model on the road `encode -> embed -> heads`; each head is a bottom and a tower.

    A subclass says what its heads are and what it minimises, by `heads` and `loss_terms`. Exporters
    cut between `encode` and `embed`, and ask `heads` for those that they ship.

    Args:
      schema: what a row holds, as a `Schema` or its config.
      linear_dim: first-order columns of the tables.
      embedding_l2: weight of the L2 loss on the batch's vectors, see `Embed`.
      embedding_stddev: of the tables' initialisation.
      embedding_seed: of the same. None draws one.

    Inputs: a mapping with exactly the names of `schema.input_names`.
    Outputs: a mapping head name -> logits [B, K], in the order of `schema.labels`.
    """

    head_names: tuple[str, ...]
    serving_head: str

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        *,
        linear_dim: int = 0,
        embedding_l2: float = 0.0,
        embedding_stddev: float = 0.01,
        embedding_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.schema = schema if isinstance(schema, Schema) else Schema.from_config(schema)
        self.encode = Encode(self.schema, name="encode")
        self.embed = Embed(
            self.schema,
            linear_dim,
            l2=embedding_l2,
            stddev=embedding_stddev,
            seed=embedding_seed,
            name="embed",
        )
        self.first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False, name="bad_step")

    def heads(
        self, embedded: Embedded, names: Sequence[str], training: bool = False
    ) -> dict[str, TowerOutput]:
        """Computes the heads named, from what lies right of the embedding seam."""
        raise NotImplementedError

    def loss_terms(self, heads: Mapping[str, TowerOutput], labels: tf.Tensor) -> dict[str, Any]:
        """The parts of the loss, each per row [B]; what is minimised is the sum of their means."""
        raise NotImplementedError

    def call(self, features: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, Any]:
        """Scores one batch."""
        inputs = {name: features[name] for name in self.schema.input_names}
        embedded = self.embed(self.encode(inputs), training=training)
        heads = self.heads(embedded, self.head_names, training=training)
        return {name: head.logits for name, head in heads.items()}

    def build(self, input_shape: Any = None) -> None:
        """Makes all weights; the schema tells all shapes, so none is needed."""
        if not getattr(self, "built", False):
            self.built = True
            with tf.init_scope():
                self(example(self.schema))

    def compile(self, optimizer: Any, table_optimizer: Any, **kwargs: Any) -> None:
        """Sets the optimisers: one for dense weights, one for the embedding tables."""
        super().compile(optimizer=optimizer, **kwargs)
        self.table_optimizer = table_optimizer
        self._means: dict[str, tf_keras.metrics.Mean] = {}

    def train_step(self, data: tuple[Mapping[str, tf.Tensor], Targets]) -> dict[str, tf.Tensor]:
        """One step; notes in `first_bad_step` the first step whose loss was not finite."""
        features, targets = data
        weight = tf.math.divide_no_nan(targets["weight"], tf.reduce_sum(targets["weight"]))
        inputs = {name: features[name] for name in self.schema.input_names}
        with tf.GradientTape() as tape:
            embedded = self.embed(self.encode(inputs), training=True)
            heads = self.heads(embedded, self.head_names, training=True)
            terms = {
                name: tf.reduce_sum(weight * term)
                for name, term in self.loss_terms(heads, targets["labels"]).items()
            }
            if self.losses:
                terms["regularisation"] = tf.add_n(self.losses)
            loss = tf.add_n(list(terms.values()))
        tables = self.embed.trainable_variables
        is_table = {id(v) for v in tables}
        dense = [v for v in self.trainable_variables if id(v) not in is_table]
        gradients = tape.gradient(loss, tables + dense)
        if tables:
            self.table_optimizer.apply_gradients(zip(gradients[: len(tables)], tables, strict=True))
        if dense:
            self.optimizer.apply_gradients(zip(gradients[len(tables) :], dense, strict=True))
        first = tf.logical_and(self.first_bad_step < 0, tf.logical_not(tf.math.is_finite(loss)))
        self.first_bad_step.assign(
            tf.where(first, self.optimizer.iterations - 1, self.first_bad_step)
        )
        for name, value in {"loss": loss, **terms}.items():
            self._mean(name).update_state(value)
        return {name: mean.result() for name, mean in self._means.items()}

    def _mean(self, name: str) -> tf_keras.metrics.Mean:
        if name not in self._means:
            self._means[name] = tf_keras.metrics.Mean(name=name)
        return self._means[name]

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """Running means of the loss and its terms, reset by `fit` at each epoch."""
        return list(getattr(self, "_means", {}).values())

    @property
    def starts_trained(self) -> bool:
        """Whether its first weights must come from a trained model."""
        return False

    @functools.cached_property
    def probabilities(self) -> Any:
        """`predict_step` as one graph, traced once for all batch sizes."""
        return tf.function(self.predict_step, reduce_retracing=True)

    def predict_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Probabilities of every head, [B, K] each."""
        features = data[0] if isinstance(data, tuple) else data
        return {name: tf.sigmoid(z) for name, z in self(features, training=False).items()}

    def ranker_config(self) -> dict[str, Any]:
        """The arguments that all rankers have."""
        return {
            "name": self.name,
            "schema": self.schema.to_config(),
            "linear_dim": self.embed.linear_dim,
            "embedding_l2": self.embed.l2,
            "embedding_stddev": self.embed.stddev,
            "embedding_seed": self.embed.seed,
        }
