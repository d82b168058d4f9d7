"""The tower of a two-tower model: a user's side that adapts, against an item's given vector."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.domain_column import read_domain
from qianmo.layers.item_queue import ItemQueue
from qianmo.layers.mlp import Correction
from qianmo.layers.seam import DOMAIN, Columns
from qianmo.layers.tower import DenseShape, Tower, TowerOutput


@tf_keras.utils.register_keras_serializable(package="qianmo")
class ProductTower(tf_keras.layers.Layer):
    """The last layers of a user's side; its logit is a product with an item's vector.

        u = W(h_u) / ||W(h_u)||,   z = <u, v> / tau - log sum_j exp s_j(u / tau)

    with h_u the hidden state of the user, v the vector of the item, which are the last D columns of
    h, and s_j the scores of the items in the queue. For one user z ranks items as <u, v> does. The
    queue makes it the log-odds of the item against its negatives:

        -log sigmoid(z) = -log [ exp(<u, v> / tau) / (exp(<u, v> / tau) + sum_j exp s_j) ],

    so that the binary cross-entropy of a positive is the sampled softmax loss. An item's vector is
    a constant here: what adapts are the layers W, to support rows that are one item each. An item
    that also stands in the queue is among its own negatives, as any of its rows' items may be.

    Args:
      tower: W, [..., H] -> logits [..., D].
      queue: the negatives. Its dim is D.
      temperature: tau.
      num_domains: P where items belong to domains, so that the negatives are those of the row's
        own. Its domain is then the last column of h_u, which W does not read.

    Inputs: h, [..., H + D]. Here v has length 1.
    Outputs: `TowerOutput` with logits [..., 1] and u as the last of `hidden`.

    Raises:
      ValueError: a tower and a queue of different widths, or a temperature that is not positive.
    """

    def __init__(
        self,
        tower: Tower,
        queue: ItemQueue,
        temperature: float = 0.1,
        num_domains: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if tower.num_labels != queue.dim:
            raise ValueError(
                "`tower` should make vectors as wide as those of `queue`. "
                f"Received: {tower.num_labels} and {queue.dim}"
            )
        if not temperature > 0:
            raise ValueError(f"`temperature` should be > 0. Received: {temperature}")
        self.tower = tower
        self.queue = queue
        self.temperature = temperature
        self.num_domains = num_domains
        self.dim = queue.dim

    @property
    def read_columns(self) -> tuple[Columns, ...]:
        """What it takes from the end of h_u."""
        return (Columns(DOMAIN, 1),) if self.num_domains else ()

    def dense_shapes(self, h_dim: int) -> list[DenseShape]:
        """The dense layers of W, in the order in which a correction counts them."""
        return self.tower.dense_shapes(h_dim - self.dim - bool(self.num_domains))

    def call(
        self, h: tf.Tensor, training: bool = False, correction: Correction | None = None
    ) -> TowerOutput:
        """Computes logits.

        Args:
          h: what crosses the tower seam.
          training: whether dropout acts.
          correction: what a task makes of each dense layer, see `InnerLoop`.
        """
        width = h.shape[-1] - self.dim
        user, item = tf.split(h, [width, self.dim], -1)
        domain = None
        if self.num_domains:
            user, column = tf.split(user, [width - 1, 1], -1)
            domain = read_domain(column[..., 0], self.num_domains)
        made = self.tower(user, training=training, correction=correction)
        u = tf.math.l2_normalize(made.logits, -1)
        q = u / self.temperature
        score = tf.reduce_sum(q * tf.cast(item, q.dtype), -1, keepdims=True)
        against = tf.reduce_logsumexp(self.queue(q, domain), -1, keepdims=True)
        return TowerOutput(score - against, [*made.hidden, u], h)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, its parts serialised."""
        serialize = tf_keras.layers.serialize
        return {
            **super().get_config(),
            "tower": serialize(self.tower),
            "queue": serialize(self.queue),
            "temperature": self.temperature,
            "num_domains": self.num_domains,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ProductTower:
        """Builds the layer and its parts."""
        parts = {key: tf_keras.layers.deserialize(config[key]) for key in ("tower", "queue")}
        return cls(**{**config, **parts})
