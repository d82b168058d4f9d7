"""One tower for each domain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.by_domain import by_domain
from qianmo.layers.domain_column import read_domain
from qianmo.layers.own_weights import Own
from qianmo.layers.seam import DOMAIN, Columns
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.tower import Tower, TowerOutput


@tf_keras.utils.register_keras_serializable(package="qianmo")
class DomainTowers(tf_keras.layers.Layer):
    """Towers that share nothing: domains as tasks.

        z_i = tower_{d_i}(h_i)

    with d the row's domain, 1 to P, or 0 for an unknown one, which has a tower too: the domain
    feature's `drop_rate` gives it rows to learn from. The domain is the last column of h. Inner
    loops cannot adapt these towers, as a task's rows may be of several domains.

    Args:
      num_labels: K.
      num_domains: P.
      units: widths of each tower's hidden layers.
      dropout: rate after each hidden layer, in training.
      seed: of the towers. None draws one.

    Inputs: h, [B, H].
    Outputs: `TowerOutput`, with no hidden layers.
    """

    reads_domain = True
    read_columns = (Columns(DOMAIN, 1),)
    cannot_adapt = (
        "the rows of a task may be of several domains, whose towers share nothing. Leave `meta` "
        'out, or take tasks="labels", `star` or `cross_domain`'
    )

    def __init__(
        self,
        num_labels: int,
        num_domains: int,
        units: Sequence[int] = (),
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_domains < 1:
            raise ValueError(f"`num_domains` should be >= 1. Received: {num_domains}")
        self.num_labels = num_labels
        self.num_domains = num_domains
        self.units = list(units)
        self.dropout = dropout
        self.seed = pick_seed(seed)
        self.towers = [
            Tower(
                num_labels,
                units,
                dropout,
                seed=derive_seed(self.seed, place),
                dtype=self.dtype_policy,
                name=f"tower_{place}",
            )
            for place in range(num_domains + 1)
        ]

    @property
    def own_weights(self) -> list[Own]:
        """The towers' weights."""
        return [Own(v) for v in self.trainable_weights]

    def call(self, h: tf.Tensor, training: bool = False) -> TowerOutput:
        """Computes logits."""
        x, column = tf.split(h, [h.shape[-1] - 1, 1], -1)
        place = read_domain(column[:, 0], self.num_domains)
        logits = by_domain(
            lambda p, rows: self.towers[p](rows, training=training).logits,
            x,
            place + 1,
            self.num_domains + 1,
        )
        return TowerOutput(logits, [], h)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = ("num_labels", "num_domains", "units", "dropout", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
