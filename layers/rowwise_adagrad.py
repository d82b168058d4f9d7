"""Adagrad with one accumulator for each row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras


@tf_keras.utils.register_keras_serializable(package="qianmo")
class RowwiseAdagrad(tf_keras.optimizers.Optimizer):
    """Adagrad whose accumulator is shared by the numbers of a row.

    For each row r of a variable with gradient g_r (duplicates of a row summed first):

        a_r = a_r + mean_d g_rd^2,   a_r = 0 at the start
        w_r = w_r - learning_rate * g_r / (sqrt(a_r) + epsilon)

    A table [rows, D] needs rows numbers of state, where Adam needs 2 * rows * D. A dense gradient
    gets the same rule with all rows named: a row of zeros moves nothing, so both kinds agree. Rows
    lie along a variable's first axis; each number of a bias is a row of its own.

    Args:
      learning_rate: a number or a Keras schedule.
      epsilon: keeps the quotient finite.

    Cost: one step on n distinct rows reads and writes n rows and n accumulators, whatever the
      table's size. An L2 penalty on a whole table makes its gradient dense and loses this.

    References:
      Duchi, Hazan, Singer. Adaptive Subgradient Methods for Online Learning and Stochastic
      Optimization. JMLR 2011; the mean over a row in place of each number's own accumulator is
      the deviation that embedding tables take for their memory.
    """

    def __init__(
        self,
        learning_rate: float | tf_keras.optimizers.schedules.LearningRateSchedule = 0.01,
        epsilon: float = 1e-7,
        name: str = "RowwiseAdagrad",
    ) -> None:
        # Keras' default weight decay is 0, not None, and rewrites every variable at every step.
        super().__init__(name=name, weight_decay=None, jit_compile=False)
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.epsilon = epsilon

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Makes the accumulators, one number for each row."""
        super().build(var_list)
        if getattr(self, "_built", False):
            return
        self._built = True
        self._accumulators = [
            self.add_variable_from_reference(
                w, "accumulator", shape=[*w.shape[:1], *(1 for _ in w.shape[1:])]
            )
            for w in var_list
        ]

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        """Moves one variable; Keras has summed a sparse gradient's duplicates before."""
        accumulator = self._accumulators[self._index_dict[self._var_key(variable)]]
        rate = tf.cast(self.learning_rate, accumulator.dtype)
        is_sparse = isinstance(gradient, tf.IndexedSlices)
        g = gradient.values if is_sparse else gradient
        mean_square = tf.reduce_mean(tf.square(g), list(range(1, g.shape.rank)), keepdims=True)

        if not is_sparse:
            accumulator.assign_add(mean_square)
            variable.assign_sub(g * (rate / (tf.sqrt(accumulator) + self.epsilon)))
            return
        rows = gradient.indices
        a = tf.gather(accumulator, rows) + mean_square
        accumulator.scatter_update(tf.IndexedSlices(a, rows))
        moves = g * (rate / (tf.sqrt(a) + self.epsilon))
        variable.scatter_sub(tf.IndexedSlices(moves, rows))

    def get_config(self) -> dict[str, Any]:
        """The optimiser's arguments."""
        rate = self._serialize_hyperparameter(self._learning_rate)
        return {
            "name": self.name,
            "learning_rate": rate if isinstance(rate, dict) else float(rate),
            "epsilon": self.epsilon,
        }
