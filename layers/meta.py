"""The meta-learning objective: towers that are good after a few steps on a task's own rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import tensorflow as tf
import tf_keras

from qianmo.layers.episodes import check_split, episodes
from qianmo.layers.inner_loop import AdaptableTower, InnerLoop, Support
from qianmo.layers.label_heads import elementwise, weighted
from qianmo.layers.seeding import pick_seed
from qianmo.layers.tower import TowerOutput

NO_SUPPORT = 8  # the task has too few support rows; the row got the plain score
DIVERGED = 16  # the steps led away, or nowhere finite; the row got the plain score
ROUNDING = 1e-3  # of losses near 0, which may double by chance

GradientTo = Literal["tower", "bottom", "embeddings"]
Split = Literal["time", "random"]


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Meta(tf_keras.layers.Layer):
    """What a batch's episodes add to the loss of a model.

        L_meta = weight * sum_q w_q sum_k w_qk l_k(f_{phi_t}(h_q), y_qk) / sum_q w_q

    over the query rows q of all tasks t, with phi_t the tower phi after `inner` on the support rows
    of task t, w_q the weight of a row and w_qk that of its label. The tower's weights stay what
    they are.

    Support rows are not weighted, as those that a server adapts on are not; a label of weight 0 is
    none. The tower runs without dropout, in the inner loop and on the query rows, as it does in
    serving: a mask would be one more reason for phi_t to differ from phi, and one that no task has.
    h comes from a bottom in training mode, with its dropout.

    With `reptile`, all rows of a task are support, and the outer gradient is the mean of its inner
    gradients along the way, which moves phi towards the mean of the phi_t, and nothing else. It
    weighs neither rows nor labels.

    Args:
      inner: the inner loop, as a layer or its config.
      weight: lambda. At 0 the model trains as if this were not here, bit for bit.
      split: whether support comes before query in "time", or at "random".
      support_share: share of a task's rows that are support, see `episodes`.
      support_sizes: sizes of the support to draw from instead.
      max_query: most query rows of a task in a batch.
      gradient_to: how far the gradient of L_meta flows: the "tower" alone, down through the
        "bottom", or into the "embeddings". `Ranker` stops it at the tables.
      min_support: in serving, labels of which a task has fewer support rows get the plain score.
      serving_steps: steps in serving; None for those of `inner`. A model that knows its tasks by
        heart learns steps that are short for rows it has not seen, so more may suit these.
      reptile: whether to learn by Reptile.
      seed: of random splits and sizes. None draws one.

    References:
      Finn et al. 2017, MAML. Nichol et al. 2018, Reptile.
    """

    def __init__(
        self,
        inner: InnerLoop | dict[str, Any],
        weight: float = 1.0,
        split: Split = "time",
        support_share: float = 0.5,
        support_sizes: tuple[int, ...] = (),
        max_query: int = 40,
        gradient_to: GradientTo = "bottom",
        min_support: int = 1,
        serving_steps: int | None = None,
        reptile: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value, known in (
            ("split", split, Split),
            ("gradient_to", gradient_to, GradientTo),
        ):
            if value not in get_args(known):
                raise ValueError(
                    f"`{name}` should be one of {get_args(known)}. Received: {value!r}"
                )
        if weight < 0:
            raise ValueError(f"`weight` should be >= 0. Received: {weight}")
        for key, number in (
            ("min_support", min_support),
            ("serving_steps", serving_steps),
            ("max_query", max_query),
        ):
            if number is not None and number < 1:
                raise ValueError(f"`{key}` should be >= 1. Received: {number}")
        check_split(support_share, support_sizes)
        self.inner = (
            inner
            if isinstance(inner, InnerLoop)
            else InnerLoop(**{"dtype": self.dtype_policy, **inner}, name="inner")
        )
        if reptile and not (self.inner.first_order and self.inner.rates == "fixed"):
            raise ValueError("`reptile` needs an inner loop with first_order and fixed rates.")
        self.weight = weight
        self.split = split
        self.support_share = support_share
        self.support_sizes = tuple(support_sizes)
        self.max_query = max_query
        self.gradient_to = gradient_to
        self.min_support = min_support
        self.serving_steps = serving_steps
        self.reptile = reptile
        self.seed = pick_seed(seed)

    def loss(
        self,
        tower: AdaptableTower,
        h: tf.Tensor,
        labels: tf.Tensor,
        weight: tf.Tensor,
        label_weights: tf.Tensor,
        task_id: tf.Tensor,
        timestamp: tf.Tensor,
        step: tf.Tensor,
    ) -> tf.Tensor:
        """L_meta of one batch, a scalar.

        Args:
          tower: phi.
          h: what crosses the tower seam, [B, H].
          labels: [B, K], finite.
          weight: of the rows, [B].
          label_weights: [B, K], 0 where a row does not have that label.
          task_id: [B].
          timestamp: [B], read when split by time.
          step: number of the training step, from which random splits follow.
        """
        seed = tf.stack([tf.constant(self.seed, tf.int64), tf.cast(step, tf.int64)])
        order = timestamp
        if self.split == "random":
            order = tf.random.stateless_uniform(tf.shape(task_id), seed, alg="philox")
        found = episodes(
            task_id,
            order,
            support_share=self.support_share,
            support_sizes=self.support_sizes,
            max_support=self.inner.max_support,
            max_query=self.max_query,
            seed=seed + 1,
        )

        def rows(index: tf.Tensor, count: tf.Tensor, weights: tf.Tensor) -> Support:
            inside = tf.sequence_mask(count, tf.shape(index)[1], weights.dtype)[:, :, None]
            return Support(
                tf.gather(h, index), tf.gather(labels, index), tf.gather(weights, index) * inside
            )

        weight = tf.cast(weight, labels.dtype)[:, None]
        has_label = tf.cast(label_weights > 0, labels.dtype)
        support = rows(found.support, found.support_count, has_label)
        query = rows(found.query, found.query_count, weight * label_weights)
        inside = tf.sequence_mask(found.query_count, tf.shape(found.query)[1], labels.dtype)
        total = tf.reduce_sum(inside * tf.gather(weight[:, 0], found.query))
        return self.episode_loss(tower, support, query, total)

    def episode_loss(
        self, tower: AdaptableTower, support: Support, query: Support, total_weight: tf.Tensor
    ) -> tf.Tensor:
        """L_meta of episodes, a scalar.

        Args:
          tower: phi.
          support: of T tasks.
          query: of the same, with weights of any size.
          total_weight: of the rows in `query`, by which their losses' sum is divided.
        """
        if self.gradient_to == "tower":
            query = query._replace(h=tf.stop_gradient(query.h))
        if self.reptile:
            query = query._replace(weights=tf.cast(query.weights > 0, query.weights.dtype))
            everything = Support(*(tf.concat(pair, 1) for pair in zip(support, query, strict=True)))
            losses = tf.add_n(self.inner.adapt(tower, everything).losses[:-1])
            mean = tf.math.divide_no_nan(
                tf.reduce_sum(losses), tf.cast(tf.size(losses), losses.dtype)
            )
            return self.weight * self.inner.step_size * mean
        logits = tower(query.h, correction=self.inner.adapt(tower, support)).logits
        labels = tf.cast(query.labels, logits.dtype)
        losses = weighted(query.weights, elementwise(self.inner.label_moments, labels, logits))
        total = tf.cast(total_weight, logits.dtype)
        return self.weight * tf.math.divide_no_nan(tf.reduce_sum(losses), total)

    def score(
        self, tower: AdaptableTower, plain: TowerOutput, task: tf.Tensor, support: Support
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Scores rows by the towers of their tasks, which are then forgotten.

        A label of which a row's task has fewer than `min_support` support rows gets the plain
        score, exactly; so does a row whose adapted score is not finite, or for whose task the steps
        more than doubled the loss of the support rows. No row depends on other tasks.

        Args:
          tower: phi.
          plain: what phi made of the rows.
          task: [B], place of each row's task in `support`.
          support: rows of the distinct tasks.

        Returns:
          Logits [B, K], and int32 [B]: 0 or a bit of `NO_SUPPORT`, `DIVERGED`.
        """
        return self.adapted(tower, plain, task, support, lambda output: output.logits)

    def adapted(
        self,
        tower: AdaptableTower,
        plain: TowerOutput,
        task: tf.Tensor,
        support: Support,
        part: Callable[[TowerOutput], tf.Tensor],
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The same for any part of what a tower makes, [..., N] of h [..., H]."""
        adaptation = self.inner.adapt(tower, support, self.serving_steps)
        adapted = part(tower(plain.h[:, None], correction=adaptation.rows(task)))[:, 0]
        before, after = adaptation.losses[0], adaptation.losses[-1]
        good = tf.gather(after <= 2 * before + ROUNDING, task)
        good &= tf.reduce_all(tf.math.is_finite(adapted), 1)
        count = tf.reduce_sum(tf.cast(support.weights, tf.float32), 1)
        enough = tf.gather(count >= self.min_support, task)
        found = tf.where(enough & good[:, None], adapted, part(plain))
        how = tf.where(good, 0, DIVERGED)
        return found, tf.where(tf.reduce_any(enough, 1), how, NO_SUPPORT)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = (
            *("weight", "split", "support_share", "support_sizes", "max_query", "gradient_to"),
            *("min_support", "serving_steps", "reptile", "seed"),
        )
        inner = self.inner.get_config()
        for key in ("name", "trainable", "dtype"):
            inner.pop(key)
        return {
            **super().get_config(),
            "inner": inner,
            **{name: getattr(self, name) for name in names},
        }
