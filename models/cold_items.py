"""Learns first vectors for the ids of new items, beside a trained model that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.encode import Encoded, completed
from qianmo.layers.episodes import episodes
from qianmo.layers.meta_embedding import MetaEmbedding, warm_up_loss
from qianmo.layers.select import Select
from qianmo.models.ranker import Ranker, Targets
from qianmo.models.two_tower import item_feature


class ColdItems(tf.Module):
    """Meta-Embedding on any ranking model: a generator of rows of the items' table.

    It meets known items as if they were new: the row of each item's id is replaced by phi, made of
    its other features, and by phi after a step on some of its rows. Only the generator learns. Rows
    of new ids are then written by `fill`, and the model serves on as it is.

    Args:
      base: a trained model. Its serving head counts.
      item_id: feature of the item's id; the other features of the side "item" are its content.
      rows: K, most rows of an item in each of the two batches.
      step_size: eta, of the step between them.
      cold_share: alpha, the weight of the loss before the step.
      scale: of `MetaEmbedding`.
      learning_rate: of the generator's Adam.
      seed: of the generator. None draws one.

    References: Pan et al. 2019. There each item gives exactly K rows to either batch; here items
    with fewer take part too, with their means. First-order columns of the row are generated too.
    """

    def __init__(
        self,
        base: Ranker,
        item_id: str,
        *,
        rows: int = 20,
        step_size: float = 0.1,
        cold_share: float = 0.1,
        scale: float = 0.2,
        learning_rate: float = 1e-3,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.item = item_feature(base.schema, item_id)
        names = [f.name for f in base.schema.features if f.side == "item" and f.name != item_id]
        if not names:
            raise ValueError(f"`{item_id}` is the only item feature: nothing tells of a new item.")
        if not 0 <= cold_share <= 1:
            raise ValueError(f"`cold_share` should be in [0, 1]. Received: {cold_share}")
        if rows < 1:
            raise ValueError(f"`rows` should be >= 1. Received: {rows}")
        if not step_size > 0:
            raise ValueError(f"`step_size` should be > 0. Received: {step_size}")
        self.base = base
        self.content = Select(base.schema, names, name="content")
        self.generator = MetaEmbedding(
            self.item.dim + base.embed.linear_dim, scale, seed, name="generator"
        )
        self.rows = rows
        self.step_size = step_size
        self.cold_share = cold_share
        self.optimizer = tf_keras.optimizers.Adam(learning_rate)

    def first_vectors(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """What the generator makes of items, [B, dim + first-order columns].

        Args:
          features: those of the item.
        """
        encoded = self.base.encode(completed(self.base.schema, features))
        return self._generated(encoded)

    def _generated(self, encoded: Encoded) -> tf.Tensor:
        return self.generator(self.content(self.base.embed(encoded)).flat)

    def logits(self, encoded: Encoded, vectors: tf.Tensor) -> tf.Tensor:
        """The base's logits of rows whose item has the given vectors, [B, D]."""
        base = self.base
        found = {**base.embed.vectors(encoded), self.item.name: vectors}
        embedded: Embedded = base.embed.assemble(found, encoded.dense, encoded.domain(base.schema))
        return base.heads(embedded, (base.serving_head,))[base.serving_head].logits

    def losses_of(self, features: Mapping[str, tf.Tensor], targets: Targets) -> tf.Tensor:
        """The loss of each item of a batch that has at least two rows, [T].

        An item's earlier half of rows, at most K, is the first batch, the next at most K the
        second. `targets` has the items as `task_id`, and `timestamp`.
        """
        found = episodes(
            targets["task_id"],
            targets["timestamp"],
            max_support=self.rows,
            max_query=self.rows,
        )
        encoded = self.base.encode(features)

        def mean_loss(index: tf.Tensor, count: tf.Tensor) -> Any:
            flat = tf.reshape(index, [-1])
            part = tf.nest.map_structure(lambda column: tf.gather(column, flat), encoded)
            of_rows = {k: tf.gather(v, flat) for k, v in targets.items()}
            weight = tf.sequence_mask(count, tf.shape(index)[1], tf.float32)
            weight *= tf.reshape(of_rows["weight"], tf.shape(index))

            def loss(vectors: tf.Tensor) -> tf.Tensor:
                logits = self.logits(part, tf.repeat(vectors, tf.shape(index)[1], 0))
                each = tf.reshape(self.base.label_loss(logits, of_rows), tf.shape(index))
                total = tf.reduce_sum(weight * each, 1)
                return tf.math.divide_no_nan(total, tf.reduce_sum(weight, 1))

            return loss

        first = tf.nest.map_structure(
            lambda column: tf.gather(column, found.support[:, 0]), encoded
        )
        return warm_up_loss(
            self._generated(first),
            mean_loss(found.support, found.support_count),
            mean_loss(found.query, found.query_count),
            step_size=self.step_size,
            cold_share=self.cold_share,
        )

    @tf.function(reduce_retracing=True)
    def step(self, features: Mapping[str, tf.Tensor], targets: Targets) -> tf.Tensor:
        """One step of the generator on a batch; returns the mean of `losses_of`."""
        with tf.GradientTape() as tape:
            losses = self.losses_of(features, targets)
            size = tf.cast(tf.size(losses), losses.dtype)
            loss = tf.math.divide_no_nan(tf.reduce_sum(losses), size)
        variables = self.generator.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    def fill(self, features: Mapping[str, tf.Tensor]) -> None:
        """Writes first vectors into the rows of new items' ids.

        Args:
          features: those of the item, one row for each new item.

        Raises:
          ValueError: an id without a row of its own.
        """
        ids = self.base.encode(completed(self.base.schema, features)).ids[self.item.name]
        unknown = tf.where(ids == 0)[:, 0].numpy()
        if len(unknown):
            value = features[self.item.name][unknown[0]].numpy()
            raise ValueError(
                f"`{self.item.name}` {value} has no row of its own in the table; declare the "
                "feature by `num_ids` or `hash_buckets`, or its whole `vocabulary`."
            )
        table, first, _ = self.base.embed.rows(self.item.table)
        vectors = tf.cast(self.first_vectors(features), table.dtype)
        table.scatter_update(tf.IndexedSlices(vectors, first + ids))
