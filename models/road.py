"""The plain road: one bottom, one tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.schema import Schema
from qianmo.layers.seam import check_seam
from qianmo.layers.tower import Tower, TowerOutput
from qianmo.models.ranker import Ranker, Targets


@tf_keras.utils.register_keras_serializable(package="qianmo")
class Road(Ranker):
    """encode -> embed -> bottom -> tower, trained on the loss of its labels, see `label_losses`.

    Args:
      schema: what a row holds.
      bottom: layer `Embedded` -> [B, H].
      tower: layer [B, H] -> `TowerOutput`.
      **kwargs: arguments of `Ranker`.

    Raises:
      ValueError: a tower that would misread the bottom's h.
    """

    head_names = ("model",)
    serving_head = "model"

    def __init__(
        self,
        schema: Schema | Mapping[str, Any],
        bottom: tf_keras.layers.Layer,
        tower: Tower,
        **kwargs: Any,
    ) -> None:
        super().__init__(schema, **kwargs)
        check_seam(bottom, tower)
        self.bottom = bottom
        self.tower = tower

    def heads(
        self, embedded: Embedded, names: Sequence[str], training: bool = False
    ) -> dict[str, TowerOutput]:
        """Computes the only head, "model"."""
        h = self.bottom(embedded, training=training)
        return {"model": self.tower(h, training=training)}

    def tower_of(self, head: str) -> Tower:
        """The only tower."""
        return self.tower

    def loss_terms(self, heads: Mapping[str, TowerOutput], targets: Targets) -> dict[str, Any]:
        """The labels' loss."""
        return {"label_loss": self.label_loss(heads["model"].logits, targets)}

    def get_config(self) -> dict[str, Any]:
        """The model's arguments, its layers serialised."""
        serialize = tf_keras.layers.serialize
        parts = {"bottom": serialize(self.bottom), "tower": serialize(self.tower)}
        return {**self.ranker_config(), **parts}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Road:
        """Builds the model and its layers."""
        deserialize = tf_keras.layers.deserialize
        parts = {k: deserialize(config[k], custom_objects) for k in ("bottom", "tower")}
        return cls(**{**config, **parts})
