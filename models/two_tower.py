"""Two-tower retrieval: two roads, a user's and an item's, that meet in a product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.bottom import Bottom
from qianmo.layers.domain_column import DomainColumn
from qianmo.layers.embed import Embedded
from qianmo.layers.encode import Encoded, completed
from qianmo.layers.extended import Extended
from qianmo.layers.features import Categorical
from qianmo.layers.inner_loop import Support
from qianmo.layers.item_queue import ItemQueue
from qianmo.layers.mlp import MLP
from qianmo.layers.product_tower import ProductTower
from qianmo.layers.recommenders import Retrieval
from qianmo.layers.schema import Schema
from qianmo.layers.seam import check_seam
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.select import Select
from qianmo.layers.tower import Tower, TowerOutput
from qianmo.models.cross_domain import expert_mixture
from qianmo.models.ranker import Ranker, Targets

# Rows of a batch that learn from their lists; each is a task, and all would cost more than the rest
# of the step many times over.
LIST_TASKS = 64


@tf_keras.utils.register_keras_serializable(package="qianmo")
class TwoTower(Ranker):
    """A user's vector u and an item's vector v, both of length 1, trained on an in-batch softmax.

        L = - mean over i of log [ exp(<u_i, v_i> / tau) / p_i / sum_j exp(<u_i, v_j> / tau) / p_j ]

    over the batch's rows with a positive label as i, and all rows as candidates j; p is how often
    training sees the item (log-Q correction), and a row's own item elsewhere is no candidate. Item
    features are those of the side "item", all others are the user's. If the domain is a feature of
    the side "item", each item belongs to one: the user's side reads it too, and only the items of a
    row's own domain are its candidates and negatives; a row of an unknown one has all.

    The logit is z of `ProductTower`, so `meta` adapts the user's last layers. Its support is, for a
    task, rows of the batch; or with `support_feature`, for each row, the items in a list of its
    own, such as the user's last ones, from which the first `LIST_TASKS` rows of a batch learn. The
    negatives are the queue's.

    Args:
      schema: what a row holds; of one label, which positives have.
      user_bottom: layer `Embedded`, with the user's features -> h_u, [B, H].
      item_bottom: layer `Embedded`, with the item's features -> [B, *].
      tower: layer [h_u ; v] -> `TowerOutput`, with u as the last hidden layer. Where items belong
        to domains it has their number, and `user_bottom` puts the domain in h_u's last column.
      item_tower: layer, what `item_bottom` makes -> `TowerOutput`, with the logits v, not of length
        1 yet.
      item_id: feature of the item's id.
      support_feature: a list of items in the table of `item_id`, then the only item feature.
      **kwargs: arguments of `Ranker`.

    Raises:
      ValueError: several labels, a side without features, or features or a tower that do not fit.

    References: Yi et al. 2019, Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations. The loss is tensorflow-recommenders' `Retrieval`.
    """

    head_names = ("model",)
    serving_head = "model"
    learns_from_positives = True  # its negatives are other rows' items

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        user_bottom: tf_keras.layers.Layer,
        item_bottom: tf_keras.layers.Layer,
        tower: ProductTower,
        item_tower: Tower,
        *,
        item_id: str,
        support_feature: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(schema, **kwargs)
        schema = self.schema
        if len(schema.labels) != 1:
            raise ValueError(f"A two-tower model has one label. Received: {schema.labels}")
        if schema.kind(schema.labels[0]) != "binary":
            raise ValueError(
                f"A two-tower model's label says which rows are positive. Received: "
                f"`{schema.labels[0]}`, a rating; make a binary label of it."
            )
        self.item = item_feature(schema, item_id)
        if item_id.lower() == "score":
            raise ValueError(
                f"`item_id`: the answer holds scores by the name `score`. Received: {item_id!r}. "
                "Rename the feature."
            )
        users, items = sides(schema)
        self.items_have_domains = schema.domain in items
        self.support_feature = support_feature
        if support_feature:
            found = [f for f in schema.categorical if f.name == support_feature]
            fits = found and found[0].is_list and found[0].table == self.item.table
            if not fits or found[0].side == "item" or items != [item_id]:
                raise ValueError(
                    "`support_feature` should be a user's list in the table of `item_id`, which "
                    f"should be the only item feature. Received: {support_feature!r}, and the item "
                    f"features {items}"
                )
            if self.meta is None:
                raise ValueError("`support_feature` needs `meta`, which says how to adapt.")
        num_domains = schema.num_domains if self.items_have_domains else 0
        if tower.num_domains != num_domains:
            raise ValueError(
                f"`tower` should have `num_domains` {num_domains}, those that items belong to. "
                f"Received: {tower.num_domains}"
            )
        check_seam(user_bottom, tower)
        check_seam(item_bottom, item_tower)
        policy = self.dtype_policy
        self.user_features = Select(schema, users, dtype=policy, name="user_features")
        self.item_features = Select(schema, items, dtype=policy, name="item_features")
        self.user_bottom = user_bottom
        self.item_bottom = item_bottom
        self.tower = tower
        self.item_tower = item_tower
        self.task = Retrieval(
            loss=tf_keras.losses.CategoricalCrossentropy(
                from_logits=True, reduction=tf_keras.losses.Reduction.NONE
            ),
            temperature=tower.temperature,
            remove_accidental_hits=True,
        )

    def _user_state(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """h_u, [B, H]."""
        return self.user_bottom(self.user_features(embedded), training=training)

    def _item_vector(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """The item's v, [B, D], of its features alone."""
        state = self.item_bottom(embedded, training=training)
        return tf.math.l2_normalize(self.item_tower(state, training=training).logits, -1)

    def _without_item(self, state: tf.Tensor) -> tf.Tensor:
        """What crosses the seam where no item matters: zeros stand for it."""
        return tf.concat([state, tf.zeros([tf.shape(state)[0], self.tower.dim], state.dtype)], 1)

    def _one_side(self, features: Mapping[str, tf.Tensor]) -> tuple[Embedded, Encoded]:
        """Embeds rows that have one side's features; constants stand in for the others."""
        encoded = self.encode(completed(self.schema, features))
        return self.embed(encoded), encoded

    def user_state(self, features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        """What is left of the tower seam of the user's side, [B, H], of the user's features."""
        return self._user_state(self._one_side(features)[0])

    def user_vectors(self, features: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Users' vectors [B, D], of their features, and the rows' status of `encode`."""
        embedded, encoded = self._one_side(features)
        h = self._without_item(self._user_state(embedded))
        return self.tower(h).hidden[-1], encoded.status

    def item_vectors(self, features: Mapping[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """Items' vectors [B, D], of their features, and the rows' status of `encode`."""
        embedded, encoded = self._one_side(features)
        return self._item_vector(self.item_features(embedded)), encoded.status

    def adapted_user_vectors(
        self,
        features: Mapping[str, tf.Tensor],
        adapt: tf.Tensor,
        items: tf.Tensor | None = None,
        inside: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Users' vectors [B, D] by layers that adapted to each row's items, and the rows' status.

        Equal rows are each adapted, unlike a ranker's, whose requests hold many rows of one task:
        here a user is one row, and looking for equal ones would cost more than it saves.

        Args:
          features: of the user.
          adapt: which rows adapt, bool [B]; the others get the plain vector.
          items: vectors of the items that are the row's support, [B, S, D]; None for those of
            `support_feature`.
          inside: which of them are there, [B, S].
        """
        embedded, encoded = self._one_side(features)
        state = self._user_state(embedded)
        if items is None or inside is None:
            name = self.support_feature
            items, inside = self._listed(encoded.ids[name], encoded.lengths[name])
        support = self._support(state, items, inside & adapt[:, None])
        task = tf.range(tf.shape(state)[0])
        found, how = self.adapted_state(state, task, support)
        return found, encoded.status | tf.where(adapt, how, 0)

    def adapted_state(
        self, state: tf.Tensor, task: tf.Tensor, support: Support
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Users' vectors [B, D] by layers that adapted to tasks, and how that went, [B].

        Args:
          state: h_u, [B, H].
          task: [B], place of each row's task in `support`.
          support: rows of the distinct tasks, as they cross the tower seam.
        """
        if self.meta is None:
            raise ValueError("The model has no `meta`, which says how its tower adapts.")
        plain = self.tower(self._without_item(state))
        return self.meta.adapted(self.tower, plain, task, support, lambda out: out.hidden[-1])

    def heads(
        self, embedded: Embedded, names: Sequence[str], training: bool = False
    ) -> dict[str, TowerOutput]:
        """Computes the only head, "model"."""
        state = self._user_state(embedded, training)
        item = self._item_vector(self.item_features(embedded), training)
        h = tf.concat([state, tf.cast(item, state.dtype)], 1)
        return {"model": self.tower(h, training=training)}

    def tower_of(self, head: str) -> ProductTower:
        """The user's last layers."""
        return self.tower

    def targets_of(self, encoded: Encoded, targets: Targets) -> Targets:
        """Adds the rows' items, and those of `support_feature`."""
        found = {**targets, "item": encoded.ids[self.item.name]}
        if self.items_have_domains:
            found["item_domain"] = encoded.domain(self.schema)
        if self.support_feature:
            found["support"] = encoded.ids[self.support_feature]
            found["support_length"] = encoded.lengths[self.support_feature]
        return found

    def mean_terms(self, heads: Mapping[str, TowerOutput], targets: Targets) -> dict[str, Any]:
        """The in-batch softmax; then the batch's items enter the queue."""
        output = heads["model"]
        rows = {
            "u": output.hidden[-1],
            "v": tf.cast(output.h[:, -self.tower.dim :], output.logits.dtype),
            "weight": targets["weight"] * tf.cast(targets["labels"][:, 0] > 0, tf.float32),
            "item": targets["item"],
        }
        if self.items_have_domains:
            rows["domain"] = targets["item_domain"]
        if "original" in targets:  # rows of chunks are of few users: no sample of the items
            rows = {k: tf.boolean_mask(v, targets["original"] > 0) for k, v in rows.items()}
        queue = self.tower.queue
        domain = rows.get("domain")
        # As one coordinate more, since the task's own correction takes p for 1e-6 where it is less.
        correction = self.tower.temperature * queue.log_correction(rows["item"])[:, None]
        loss = self.task(
            tf.concat([rows["u"], tf.ones_like(correction)], 1),
            tf.concat([rows["v"], correction], 1),
            candidate_ids=rows["item"],
            score_mask=None if domain is None else _of_own_domain(domain),
        )
        queue.push(rows["item"], rows["v"], domain)
        total = tf.reduce_sum(rows["weight"] * tf.cast(loss, tf.float32))
        return {"softmax": tf.math.divide_no_nan(total, tf.reduce_sum(rows["weight"]))}

    def meta_loss(self, h: tf.Tensor, targets: Targets, step: tf.Tensor) -> tf.Tensor:
        """What `meta` adds to the loss; it moves users, and no item's vector."""
        # The queue's vectors take no gradient: without any against it, an item's own would move
        # towards all who had it, and away from no one.
        state, item = h[:, : -self.tower.dim], h[:, -self.tower.dim :]
        h = tf.concat([state, tf.stop_gradient(item)], 1)
        if not self.support_feature:
            return super().meta_loss(h, targets, step)
        assert self.meta is not None
        names = ("support", "support_length", "labels", "weight")
        ids, length, labels, weight = (targets[name][:LIST_TASKS] for name in names)
        h = h[:LIST_TASKS]
        support = self._support(h[:, : -self.tower.dim], *self._listed(ids, length))
        positive = tf.cast(labels > 0, tf.float32)
        # Only a positive says what the adapted tower should have found.
        weights = weight[:, None] * positive
        query = Support(h[:, None], positive[:, :, None], weights[:, :, None])
        return self.meta.episode_loss(self.tower, support, query, tf.reduce_sum(weights))

    def _listed(self, ids: tf.Tensor, length: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Vectors of the items in lists, [B, L, D], and which of them are there and known."""
        shape = tf.shape(ids)
        inside = tf.sequence_mask(length, shape[1]) & (ids > 0)
        table, first, _ = self.embed.rows(self.item.table)
        places = tf.reshape(tf.where(inside, ids, 0), [-1])
        vectors = tf.cast(tf.gather(table, first + places), self.compute_dtype)
        fields, linear = tf.split(vectors[:, None], [self.item.dim, self.embed.linear_dim], 2)
        none = tf.zeros([tf.shape(places)[0], 0])
        v = self._item_vector(Embedded((fields,), linear, none, tf.zeros_like(places)))
        return tf.reshape(v, [shape[0], shape[1], self.tower.dim]), inside

    def _support(self, state: tf.Tensor, items: tf.Tensor, inside: tf.Tensor) -> Support:
        """A task for each row: items [B, S, D], each beside what is known of the user."""
        tiled = tf.repeat(state[:, None], tf.shape(items)[1], 1)
        weights = tf.cast(inside, tf.float32)[:, :, None]
        h = tf.concat([tiled, tf.cast(items, state.dtype)], 2)
        return Support(h, tf.ones_like(weights), weights)

    def get_config(self) -> dict[str, Any]:
        """The model's arguments, its layers serialised."""
        names = ("user_bottom", "item_bottom", "tower", "item_tower")
        parts = {name: tf_keras.layers.serialize(getattr(self, name)) for name in names}
        arguments = {"item_id": self.item.name, "support_feature": self.support_feature}
        return {**self.ranker_config(), **parts, **arguments}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> TwoTower:
        """Builds the model and its layers."""
        names = ("user_bottom", "item_bottom", "tower", "item_tower")
        parts = {k: tf_keras.layers.deserialize(config[k], custom_objects) for k in names}
        return cls(**{**config, **parts})


def _of_own_domain(domain: tf.Tensor) -> tf.Tensor:
    """Which rows' items [B] are candidates of which rows [B], by the rows' domains."""
    return (domain[:, None] == domain[None]) | (domain[:, None] == 0)


def sides(schema: Schema) -> tuple[list[str], list[str]]:
    """Names of the user's features and of the item's; an item's domain is also the user's."""
    items = [f.name for f in schema.features if f.side == "item"]
    users = [f.name for f in schema.features if f.side != "item" or f.name == schema.domain]
    return users, items


def item_feature(schema: Schema, name: str) -> Categorical:
    """The feature that is an item's id.

    Raises:
      ValueError: there is none such.
    """
    for f in schema.categorical:
        if f.name == name and f.side == "item" and not f.is_list:
            return f
    raise ValueError(
        '`item_id` should name a feature of the side "item" with one value a row. '
        f"Received: {name!r}"
    )


def two_tower(
    schema: Schema,
    *,
    item_id: str,
    dim: int = 32,
    units: Sequence[int] = (128,),
    seam_dim: int = 64,
    tower_units: Sequence[int] = (),
    item_units: Sequence[int] = (128,),
    temperature: float = 0.1,
    queue_size: int = 512,
    support_feature: str = "",
    num_shared: int = 0,
    dropout: float = 0.0,
    **ranker: Any,
) -> TwoTower:
    """A plain network on each side, and a linear last layer of width `dim`.

    With `num_shared` several retrieval models are fused: the user's network, and the item's where
    items belong to domains, is a mixture of shared experts and each domain's own, whose gate reads
    all that the side shares.

    Args:
      schema: what a row holds.
      item_id: feature of the item's id.
      dim: D, width of the vectors.
      units: widths of the user's network.
      seam_dim: H; 0 for the network's last width, not centred, as a mixture's is always.
      tower_units: hidden layers of the user's part that adapts, between h_u and u.
      item_units: widths of the item's network.
      temperature: tau.
      queue_size: items in the queue.
      support_feature: as for `TwoTower`.
      num_shared: shared experts of each side; 0 for a plain network, the same for all domains.
      dropout: of the networks.
      **ranker: arguments of `Ranker`.
    """
    users, items = sides(schema)
    num_domains = schema.num_domains if schema.domain in items else 0
    seed = pick_seed(None) if num_shared else 0

    def bottom(side: int, names: list[str], units: Sequence[int], seam_dim: int) -> Any:
        name = ("user_bottom", "item_bottom")[side]
        if not num_shared or (side and not num_domains):
            mlp = MLP(units, dropout=dropout)
            return Bottom(networks=[mlp], seam_dim=seam_dim, name=name)
        return expert_mixture(
            schema,
            Select(schema, names).selected,
            [f.name for f in schema.features if f.name in names and not f.domains],
            num_shared=num_shared,
            units=units,
            dropout=dropout,
            seed=derive_seed(seed, side),
            name=name,
        )

    user_bottom = bottom(0, users, units, seam_dim)
    if num_domains:
        columns = [DomainColumn(name="domain")]
        user_bottom = Extended(user_bottom, columns=columns, name="user_bottom")
    queue = ItemQueue(queue_size, dim, item_feature(schema, item_id).num_rows, name="queue")
    return TwoTower(
        schema,
        user_bottom,
        bottom(1, items, item_units, 0),
        ProductTower(
            Tower(dim, tower_units, name="layers"), queue, temperature, num_domains, name="tower"
        ),
        Tower(dim, name="item_tower"),
        item_id=item_id,
        support_feature=support_feature,
        **ranker,
    )
