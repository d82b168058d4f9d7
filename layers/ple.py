"""Progressive layered extraction: levels of shared experts and experts of each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.embed import Embedded
from qianmo.layers.mlp import MLP
from qianmo.layers.own_weights import Own
from qianmo.layers.personal_gate import PersonalGate
from qianmo.layers.seeding import derive_seed, pick_seed

OWN, SHARED, GATE, SHARED_GATE = range(4)  # paths of the parts' seeds


@tf_keras.utils.register_keras_serializable(package="qianmo")
class PLE(tf_keras.layers.Layer):
    """Customised gate control (CGC) in several levels.

        x_t^l = sum_e g_te [O_t(x_t^{l-1}) ; S(x_s^{l-1})]_e,         g_t = softmax(W_t x_t^{l-1})
        x_s^l = sum_e g_se [O_1(x_1^{l-1}) ; ... ; S(x_s^{l-1})]_e,   g_s = softmax(W_s x_s^{l-1})

    with O_t the experts of task t, S the shared ones and x_t^0 = x_s^0 = x; gates have biases, too.
    The last level has no
    x_s. Each expert is an MLP.

    By domain, tasks are domains: a row passes the experts and the gate of its own domain only, so
    x_s fuses its own experts and the shared ones. Rows of an unknown domain pass the shared ones
    and the gate of place 0.

    Args:
      num_tasks: T: the labels, or by domain P.
      units: of each level, the widths of its experts' layers.
      num_own: experts of each task and level.
      num_shared: shared experts of each level.
      by_domain: whether tasks are domains.
      dropout: of the experts, in training.
      seed: of the weights. None draws one.

    Inputs: `Embedded`; x is all its vectors and dense features.
    Outputs: x_t of the last level, side by side [B, T * H]; by domain the row's own, [B, H].

    Raises:
      ValueError: no level, or a size below 1.

    References: Tang et al. 2020, Progressive Layered Extraction.
    """

    def __init__(
        self,
        num_tasks: int,
        units: Sequence[Sequence[int]],
        num_own: int = 1,
        num_shared: int = 1,
        by_domain: bool = False,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value in (
            ("num_tasks", num_tasks),
            ("num_own", num_own),
            ("num_shared", num_shared),
            ("levels", len(units)),
        ):
            if value < 1:
                raise ValueError(f"`{key}` should be >= 1. Received: {value}")
        self.num_tasks = num_tasks
        self.units = [list(widths) for widths in units]
        self.num_own = num_own
        self.num_shared = num_shared
        self.reads_domain = by_domain
        self.dropout = dropout
        self.seed = pick_seed(seed)
        # One list of each kind for all levels: files of Keras do not hold lists in lists.
        self._own: list[tf_keras.layers.Layer] = []
        self._shared: list[MLP] = []
        self._gates: list[PersonalGate] = []
        self._shared_gates: list[PersonalGate] = []
        for level, widths in enumerate(self.units):
            self._make_level(level, widths)

    def _make_level(self, level: int, widths: list[int]) -> None:
        def expert(*path: int) -> MLP:
            seed = derive_seed(self.seed, level, *path)
            return MLP(widths, dropout=self.dropout, seed=seed, dtype=self.dtype_policy)

        def gate(num_experts: int, num_gates: int, *path: int) -> PersonalGate:
            seed = derive_seed(self.seed, level, *path)
            return PersonalGate(num_experts, num_gates, seed=seed, dtype=self.dtype_policy)

        tasks, own = range(self.num_tasks), range(self.num_own)
        beside = self.num_own + self.num_shared
        if self.reads_domain:
            # Experts of one place but of other domains stand together.
            self._own += [
                DomainMLP(
                    self.num_tasks,
                    widths,
                    dropout=self.dropout,
                    seed=derive_seed(self.seed, level, OWN, i),
                    dtype=self.dtype_policy,
                )
                for i in own
            ]
            self._gates.append(gate(beside, self.num_tasks + 1, GATE))
        else:
            self._own += [expert(OWN, task, i) for task in tasks for i in own]
            self._gates += [gate(beside, 1, GATE, task) for task in tasks]
        self._shared += [expert(SHARED, i) for i in range(self.num_shared)]
        if level < len(self.units) - 1:
            num_others = self.num_own * (1 if self.reads_domain else self.num_tasks)
            self._shared_gates.append(gate(num_others + self.num_shared, 1, SHARED_GATE))

    @property
    def own_weights(self) -> list[Own]:
        """The labels' experts and gates; those of domains are stacked and say so themselves."""
        own = [] if self.reads_domain else [*self._own, *self._gates]
        return [Own(v) for layer in own for v in layer.trainable_weights]

    @property
    def num_states(self) -> int:
        """Hidden states side by side."""
        return 1 if self.reads_domain else self.num_tasks

    def _of_level(self, layers: list[Any], level: int) -> list[Any]:
        size = len(layers) // len(self.units)
        return layers[level * size : (level + 1) * size]

    def call(self, embedded: Embedded, training: bool = False) -> tf.Tensor:
        """Computes x_t of the last level."""
        if self.reads_domain:
            return self._by_domain(embedded, training)
        return self._all(embedded, training)

    def _by_domain(self, embedded: Embedded, training: bool) -> tf.Tensor:
        x, x_shared, domain = embedded.flat, embedded.flat, embedded.domain
        known = (domain > 0)[:, None]
        available = tf.concat([known] * self.num_own + [tf.ones_like(known)] * self.num_shared, 1)
        for level in range(len(self.units)):
            own, shared = self._of_level(self._own, level), self._of_level(self._shared, level)
            outputs = [experts((x, domain), training=training) for experts in own]
            outputs += [expert(x_shared, training=training) for expert in shared]
            y = tf.stack(outputs, 1)
            x = self._gates[level]((x, y), available=available, task=domain)
            if level < len(self._shared_gates):
                fused = self._shared_gates[level]((x_shared, y), available=available)
                x_shared = fused[:, 0]
        return x

    def _all(self, embedded: Embedded, training: bool) -> tf.Tensor:
        x_shared = embedded.flat
        x = [x_shared] * self.num_tasks
        for level in range(len(self.units)):
            experts, shared = self._of_level(self._own, level), self._of_level(self._shared, level)
            own = [
                expert(x[place // self.num_own], training=training)
                for place, expert in enumerate(experts)
            ]
            of_all = [expert(x_shared, training=training) for expert in shared]
            x = [
                gate((x[task], tf.stack([*own[task * self.num_own :][: self.num_own], *of_all], 1)))
                for task, gate in enumerate(self._of_level(self._gates, level))
            ]
            x = [fused[:, 0] for fused in x]
            if level < len(self._shared_gates):
                y = tf.stack([*own, *of_all], 1)
                x_shared = self._shared_gates[level]((x_shared, y))[:, 0]
        return tf.concat(x, 1)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = ("num_tasks", "units", "num_own", "num_shared", "dropout", "seed")
        arguments = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **arguments, "by_domain": self.reads_domain}
