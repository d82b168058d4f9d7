"""Multi-gate mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.embed import Embedded
from qianmo.layers.personal_gate import PersonalGate


@tf_keras.utils.register_keras_serializable(package="qianmo")
class MMoE(tf_keras.layers.Layer):
    """Experts that all tasks share, and a gate for each task.

        h_t = sum_e g_te E_e(x),   g_t = softmax(W_t x + b_t)

    Args:
      experts: layers E of one output width, `Embedded` -> [B, H].
      num_tasks: T.
      by_domain: whether tasks are domains: a row then passes the gate of its own domain, or that of
        place 0 when it is unknown, and T is P + 1. Otherwise every row is of all tasks.
      seed: of the gates. None draws one.

    Inputs: `Embedded`; x is all its vectors and dense features.
    Outputs: h of the T tasks side by side, [B, T * H]; by domain that of the row's own, [B, H].

    References: Ma et al. 2018, Modeling Task Relationships in Multi-task Learning with Multi-gate
      Mixture-of-Experts.
    """

    def __init__(
        self,
        experts: Sequence[tf_keras.layers.Layer],
        num_tasks: int,
        by_domain: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.experts = list(experts)
        self.reads_domain = by_domain
        self.gates = PersonalGate(
            len(self.experts), num_tasks, seed=seed, dtype=self.dtype_policy, name="gates"
        )

    @property
    def num_states(self) -> int:
        """Hidden states side by side."""
        return 1 if self.reads_domain else self.gates.num_gates

    def call(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """Computes h."""
        y = tf.stack([expert(embedded, training=training) for expert in self.experts], 1)
        if self.reads_domain:
            return self.gates((embedded.flat, y), task=embedded.domain)
        h = self.gates((embedded.flat, y))
        return tf.reshape(h, [-1, self.gates.num_gates * y.shape[2]])

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments, the experts serialised."""
        return {
            **super().get_config(),
            "experts": [tf_keras.layers.serialize(expert) for expert in self.experts],
            "num_tasks": self.gates.num_gates,
            "by_domain": self.reads_domain,
            "seed": self.gates.seed,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MMoE:
        """Builds the layer and its experts."""
        experts = [tf_keras.layers.deserialize(expert) for expert in config["experts"]]
        return cls(**{**config, "experts": experts})
