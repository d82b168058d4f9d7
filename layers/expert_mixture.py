"""Shared experts and each domain's own, fused by a personal gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.personal_gate import PersonalGate


@tf_keras.utils.register_keras_serializable(package="qianmo")
class ExpertMixture(tf_keras.layers.Layer):
    """The cross-domain bottom.

        h = sum_j g_j S_j(e) + g_own O_p(e),   g = gate(s(e))

    with p the row's domain. Rows of an unknown domain have the shared experts alone, and all of
    the gate's weight goes to these.

    Args:
      shared: experts S that every row passes, `Embedded` -> [B, H].
      own: the domains' experts in one layer, `Embedded` -> [B, H], which passes each row through
        that of its domain alone, and gives zeros for an unknown one: `DomainExperts`, or a
        `Bottom` with a `DomainMLP`.
      gate: of len(shared) + 1 experts and one task.
      gate_input: s, what the gate reads: layer `Embedded` -> `Embedded`, such as `Select`.

    Inputs: e, `Embedded`.
    Outputs: h, [B, H].

    Raises:
      ValueError: no shared expert, or a gate of another size.

    References: the cross-domain model of Tencent's TRS.
    """

    reads_domain = True

    def __init__(
        self,
        shared: Sequence[tf_keras.layers.Layer],
        own: tf_keras.layers.Layer,
        gate: PersonalGate,
        gate_input: tf_keras.layers.Layer,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not shared:
            raise ValueError("`shared` should hold an expert: unknown domains have no other.")
        if (gate.num_experts, gate.num_gates) != (len(shared) + 1, 1):
            raise ValueError(
                f"`gate` should have {len(shared) + 1} experts and one task. Received: "
                f"{gate.num_experts} and {gate.num_gates}"
            )
        self.shared = list(shared)
        self.own = own
        self.gate = gate
        self.gate_input = gate_input

    def call(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """Computes h."""
        outputs = [expert(embedded, training=training) for expert in self.shared]
        outputs.append(self.own(embedded, training=training))
        known = (embedded.domain > 0)[:, None]
        available = tf.concat([tf.ones_like(known)] * len(self.shared) + [known], 1)
        x = self.gate_input(embedded).flat
        return self.gate((x, tf.stack(outputs, 1)), available=available)[:, 0]

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, its parts serialised."""
        serialize = tf_keras.layers.serialize
        return {
            **super().get_config(),
            "shared": [serialize(expert) for expert in self.shared],
            "own": serialize(self.own),
            "gate": serialize(self.gate),
            "gate_input": serialize(self.gate_input),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ExpertMixture:
        """Builds the layer and its parts."""
        deserialize = tf_keras.layers.deserialize
        shared = [deserialize(part) for part in config["shared"]]
        parts = {key: deserialize(config[key]) for key in ("own", "gate", "gate_input")}
        return cls(**{**config, "shared": shared, **parts})
