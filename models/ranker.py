"""What every ranking model shares: the road up to the embedding seam, and a training step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embed, Embedded
from qianmo.layers.encode import Encode, Encoded, example
from qianmo.layers.inner_loop import AdaptableTower
from qianmo.layers.keras_3 import refuse_keras_3
from qianmo.layers.label_heads import label_losses, label_moments, predictions, present
from qianmo.layers.meta import Meta
from qianmo.layers.own_weights import collect, still
from qianmo.layers.schema import Schema
from qianmo.layers.tower import TowerOutput

Targets = Mapping[str, tf.Tensor]
MEANS = 16  # of the loss and its terms; few models have as many


class Weight(NamedTuple):
    """A variable, or what stands at one place of its first axis."""

    variable: tf.Variable
    place: int | None = None

    @property
    def value(self) -> tf.Tensor:
        """What it holds."""
        return self.variable.value() if self.place is None else self.variable[self.place]

    def assign(self, value: tf.Tensor) -> None:
        """Replaces what it holds."""
        if self.place is None:
            self.variable.assign(value)
        else:
            self.variable.scatter_update(tf.IndexedSlices(value[None], [self.place]))


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
      meta: makes the serving head's tower a meta tower, as a `Meta` or its config.

    Inputs: a mapping with exactly the names of `schema.input_names`.
    Outputs: a mapping head name -> logits [B, K], in the order of `schema.labels`.
    """

    head_names: tuple[str, ...]
    serving_head: str
    learns_from_positives = False  # whether rows of positives are enough to learn from

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        *,
        linear_dim: int = 0,
        embedding_l2: float = 0.0,
        embedding_stddev: float = 0.01,
        embedding_seed: int | None = None,
        meta: Meta | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(autocast=False, **kwargs)  # so raw features reach `encode` as they are
        self.schema = schema if isinstance(schema, Schema) else Schema.from_config(schema)
        # Parts have the model's policy, not that of the process: a file is loaded under any.
        self.encode = Encode(self.schema, name="encode", dtype=self.dtype_policy)
        self.embed = Embed(
            self.schema,
            linear_dim,
            l2=embedding_l2,
            stddev=embedding_stddev,
            seed=embedding_seed,
            name="embed",
            dtype=self.dtype_policy,
        )
        if meta is not None and not isinstance(meta, Meta):
            meta = Meta(**{"name": "meta", "dtype": self.dtype_policy, **meta})
        self.meta: Meta | None = meta
        if self.meta is not None:
            needs = ("task_id", "timestamp") if self.meta.split == "time" else ("task_id",)
            missing = [key for key in needs if not getattr(self.schema, key)]
            if missing:
                raise ValueError(f"`meta` needs `schema.{missing[0]}`, which names no column.")
            self.meta.inner.label_moments = label_moments(self.schema)
        self.first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False, name="bad_step")

    def heads(
        self, embedded: Embedded, names: Sequence[str], training: bool = False
    ) -> dict[str, TowerOutput]:
        """Computes the heads named, from what lies right of the embedding seam."""
        raise NotImplementedError

    def tower_of(self, head: str) -> AdaptableTower:
        """The tower of a head."""
        raise NotImplementedError

    def loss_terms(self, heads: Mapping[str, TowerOutput], targets: Targets) -> dict[str, Any]:
        """The parts of the loss, each per row [B]; what is minimised is the sum of their means.

        Args:
          heads: what `heads` made, by name.
          targets: `labels` [B, K], NaN where a row does not have one, and `label_weights` [B, K]
            where the schema declares any.
        """
        raise NotImplementedError

    def label_loss(self, logits: tf.Tensor, targets: Targets) -> tf.Tensor:
        """The loss of each row, summed over its labels, [B]; see `label_losses`."""
        weights = self.label_weights(targets)
        return tf.reduce_sum(label_losses(self.schema, targets["labels"], logits, weights), 1)

    def label_weights(self, targets: Targets) -> tf.Tensor | None:
        """The labels' weights, [B, K], or None where the schema declares none.

        Raises:
          ValueError: the schema declares weights, and the targets have none.
        """
        if self.schema.label_weights and "label_weights" not in targets:
            raise ValueError(
                "`schema.label_weights` declares weights, so the targets should have "
                f"`label_weights` [B, K]. Received: {sorted(targets)}"
            )
        return targets["label_weights"] if self.schema.label_weights else None

    def targets_of(self, encoded: Encoded, targets: Targets) -> Targets:
        """What the loss reads beside the heads; a model may add ids, which do not reach them."""
        return targets

    def mean_terms(self, heads: Mapping[str, TowerOutput], targets: Targets) -> dict[str, Any]:
        """Means of `loss_terms` over the rows of the original loss."""
        weight = targets["weight"]
        if "original" in targets:  # rows of chunks may take part in episodes alone
            weight *= targets["original"]
        weight = tf.math.divide_no_nan(weight, tf.reduce_sum(weight))
        terms = self.loss_terms(heads, targets)
        return {name: tf.reduce_sum(weight * term) for name, term in terms.items()}

    def call(self, features: Mapping[str, tf.Tensor], training: bool = False) -> dict[str, Any]:
        """Scores one batch."""
        inputs = {name: features[name] for name in self.schema.input_names}
        embedded = self.embed(self.encode(inputs), training=training)
        heads = self.heads(embedded, self.head_names, training=training)
        return {name: head.logits for name, head in heads.items()}

    def one_head(
        self, features: Mapping[str, tf.Tensor], head: str
    ) -> tuple[TowerOutput, tf.Tensor]:
        """A head's output, with no other head computed, and the rows' status of `encode`, [B]."""
        encoded = self.encode({name: features[name] for name in self.schema.input_names})
        return self.heads(self.embed(encoded), (head,))[head], encoded.status

    def tower_input(self, features: Mapping[str, tf.Tensor], head: str) -> tf.Tensor:
        """What crosses a head's tower seam, [B, H]."""
        return self.one_head(features, head)[0].h

    def build(self, input_shape: Any = None) -> None:
        """Makes all weights; the schema tells all shapes, so none is needed.

        Raises:
          ValueError: a layer of Keras 3, one made for another number of domains, or `meta` for a
            tower that cannot adapt.
        """
        if not getattr(self, "built", False):
            refuse_keras_3(self)
            for layer in self.submodules:
                count = getattr(layer, "num_domains", 0)
                if count and count != self.schema.num_domains:
                    raise ValueError(
                        f"`{layer.name}` ({type(layer).__name__}) should have `num_domains` "
                        f"{self.schema.num_domains}, those of the schema. Received: {count}"
                    )
            self._check_adapts()
            self.built = True
            with tf.init_scope():
                features = example(self.schema)
                self(features)
                if self.meta is not None:
                    head = self.serving_head
                    h = self.tower_input(features, head)
                    self.meta.inner.build(self.tower_of(head).dense_shapes(h.shape[-1]))

    def _check_adapts(self) -> None:
        if self.meta is None:
            return
        tower = self.tower_of(self.serving_head)
        if not hasattr(tower, "dense_shapes"):
            reason = getattr(tower, "cannot_adapt", "it has no `dense_shapes`")
            raise ValueError(
                f"`meta` needs a tower that adapts, and {type(tower).__name__} cannot: {reason}."
            )

    def compile(
        self,
        optimizer: Any,
        table_optimizer: Any = None,
        meta_optimizer: Any = None,
        slowed: Sequence[tuple[Weight, float]] = (),
        **kwargs: Any,
    ) -> None:
        """Sets the optimisers: for dense weights, embedding tables, and learned step sizes.

        Weights in `slowed` move by that factor of what their optimiser would move them; 0 freezes.

        Raises:
          ValueError: no optimiser of the tables; or an optimiser that averages weights, which Keras
            can do for one alone.
        """
        if kwargs.pop("from_serialized", False):
            # Keras' SavedModels hold one optimiser.
            tf.get_logger().warning("Compile the loaded model again before it trains.")
            return
        if table_optimizer is None:
            raise ValueError("`table_optimizer` should be the optimiser of the tables.")
        if any(getattr(o, "use_ema", False) for o in (optimizer, table_optimizer, meta_optimizer)):
            raise ValueError("`use_ema` should be False: a model has several optimisers.")
        super().compile(optimizer=optimizer, **kwargs)
        # Not as they are, or Keras would take them for its own.
        self._slowed: Callable[[], Sequence[tuple[Weight, float]]] = lambda: slowed
        self.table_optimizer = table_optimizer
        self.meta_optimizer = meta_optimizer
        self._means: dict[str, tf_keras.metrics.Mean] = {}
        # Made ahead: a function that makes variables while it is traced is traced once more.
        spare = [tf_keras.metrics.Mean() for _ in range(MEANS)]
        self._spare_mean: Callable[[], tf_keras.metrics.Mean] = lambda: (
            spare.pop() if spare else tf_keras.metrics.Mean()
        )

    def train_step(self, data: tuple[Mapping[str, tf.Tensor], Targets]) -> dict[str, tf.Tensor]:
        """One step; notes in `first_bad_step` the first step whose loss was not finite."""
        features, targets = data
        encoded = self.encode({name: features[name] for name in self.schema.input_names})
        targets = self.targets_of(encoded, targets)
        with tf.GradientTape(persistent=True) as tape:
            embedded = self.embed(encoded, training=True)
            heads = self.heads(embedded, self.head_names, training=True)
            terms = self.mean_terms(heads, targets)
            if self.losses:
                terms["regularisation"] = tf.add_n(self.losses)
            table_loss = loss = tf.add_n(list(terms.values()))
            if self.meta is not None and self.meta.weight:
                h = heads[self.serving_head].h
                terms["meta"] = self.meta_loss(h, targets, self.optimizer.iterations)
                loss += terms["meta"]
                if self.meta.gradient_to == "embeddings":
                    table_loss = loss
        groups = self.trained_by()
        variables = [variable for _, group in groups for variable in group]
        gradients = tape.gradient(loss, variables)
        for optimizer, group in groups:
            own, gradients = gradients[: len(group)], gradients[len(group) :]
            if optimizer is self.table_optimizer and table_loss is not loss:
                own = tape.gradient(table_loss, group)
            with self._slowly(group):
                self._apply(optimizer, own, group)
        first = tf.logical_and(self.first_bad_step < 0, tf.logical_not(tf.math.is_finite(loss)))
        self.first_bad_step.assign(
            tf.where(first, self.optimizer.iterations - 1, self.first_bad_step)
        )
        for name, value in {"loss": loss, **terms}.items():
            self._mean(name).update_state(value)
        return {name: mean.result() for name, mean in self._means.items()}

    def meta_loss(self, h: tf.Tensor, targets: Targets, step: tf.Tensor) -> tf.Tensor:
        """What `meta` adds to the loss: `Meta.loss` of the serving head's tower."""
        assert self.meta is not None
        rows = {"h": h, **{k: targets[k] for k in ("weight", "task_id")}}
        rows["labels"], rows["label_weights"] = present(
            targets["labels"], self.label_weights(targets)
        )
        # A random split reads no time; any column then stands in.
        rows["timestamp"] = targets.get("timestamp", targets["task_id"])
        takes_part = [targets["episode"] > 0] if "episode" in targets else []
        if self.schema.weight or self.schema.domain_weights:
            takes_part.append(targets["weight"] > 0)
        if takes_part:
            mask = tf.reduce_all(tf.stack(takes_part), 0)
            rows = {k: tf.boolean_mask(v, mask) for k, v in rows.items()}
        tower = self.tower_of(self.serving_head)
        return self.meta.loss(tower, **rows, step=step)

    def _apply(
        self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[tf.Variable]
    ) -> None:
        """Applies gradients; those of `trained_apart` are clipped by a norm of their own.

        What belongs to a domain or label that the batch does not speak of stays as it is.
        """
        with tf.init_scope():
            optimizer.build(variables)  # slots in the order of `trained_by`, whatever is clipped
        pairs = list(optimizer.aggregate_gradients(zip(gradients, variables, strict=True)))
        norm = optimizer.global_clipnorm
        if norm:
            apart = {variable.ref() for variable in self.trained_apart()}
            clipped: list[tuple[Any, tf.Variable]] = []
            for is_apart in (True, False):
                part = [(g, v) for g, v in pairs if (v.ref() in apart) == is_apart]
                found, _ = tf.clip_by_global_norm([g for g, _ in part], norm)
                clipped += zip(found, [v for _, v in part], strict=True)
            pairs = clipped
        try:
            optimizer.global_clipnorm = None
            with still(optimizer, pairs, collect(self.submodules)):
                optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)
        finally:
            optimizer.global_clipnorm = norm

    @contextlib.contextmanager
    def _slowly(self, group: Sequence[tf.Variable]) -> Iterator[None]:
        """Takes back a part of what happens to the weights of a group that should be slow."""
        here = {id(variable) for variable in group}
        slowed = [(one, factor) for one, factor in self._slowed() if id(one.variable) in here]
        before = [tf.identity(one.value) for one, _ in slowed]
        yield
        for (one, factor), value in zip(slowed, before, strict=True):
            one.assign(value + factor * (one.value - value))

    def trained_by(self) -> list[tuple[Any, list[tf.Variable]]]:
        """Each optimiser that has something to do, with its variables."""
        tables = self.embed.trainable_variables
        rates = self.meta.trainable_variables if self.meta is not None else []
        of_others = {id(v) for v in [*tables, *rates]}
        dense = [v for v in self.trainable_variables if id(v) not in of_others]
        if self.meta is not None and not self.meta.weight:
            rates = []
        groups = (
            (self.table_optimizer, tables),
            (self.optimizer, dense),
            (self.meta_optimizer, rates),
        )
        return [(optimizer, group) for optimizer, group in groups if group]

    def trained_apart(self) -> Sequence[tf.Variable]:
        """Weights that move as if the others were not there."""
        return ()

    def _mean(self, name: str) -> tf_keras.metrics.Mean:
        if name not in self._means:
            self._means[name] = self._spare_mean()
        return self._means[name]

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """Running means of the loss and its terms, reset by `fit` at each epoch."""
        return list(getattr(self, "_means", {}).values())

    @property
    def running_means(self) -> Mapping[str, tf_keras.metrics.Mean]:
        """The loss and its terms by name, as means since the epoch began."""
        return dict(getattr(self, "_means", {}))

    @property
    def starts_trained(self) -> bool:
        """Whether its first weights must come from a trained model."""
        return False

    @functools.cached_property
    def probabilities(self) -> Any:
        """`predict_step` as one graph, traced once for all batch sizes."""
        return tf.function(self.predict_step, reduce_retracing=True)

    def predict_step(self, data: Any) -> dict[str, tf.Tensor]:
        """Every head's predictions, [B, K] each: probabilities, and ratings in their own units."""
        features = data[0] if isinstance(data, tuple) else data
        logits = self(features, training=False)
        return {name: predictions(self.schema, z) for name, z in logits.items()}

    def get_build_config(self) -> dict[str, Any]:
        """Tells Keras that a loaded model can be built: without weights it could read none."""
        return {"input_shape": None}

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        """Builds a model that is being loaded."""
        self.build()

    def ranker_config(self) -> dict[str, Any]:
        """The arguments that all rankers have."""
        return {
            "name": self.name,
            "dtype": self.dtype_policy.name,
            "schema": self.schema.to_config(),
            "linear_dim": self.embed.linear_dim,
            "embedding_l2": self.embed.l2,
            "embedding_stddev": self.embed.stddev,
            "embedding_seed": self.embed.seed,
            "meta": self.meta and self.meta.get_config(),
        }
