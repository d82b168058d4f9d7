"""Adam whose cost depends on the rows in the batch and not on the table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.ops.library import library


@tf_keras.utils.register_keras_serializable(package="qianmo")
class SparseAdam(tf_keras.optimizers.Optimizer):
    """Adam that moves, and whose moments decay in, only the rows that a gradient names ("lazy").

    For each row r of a variable with gradient g_r at step t (duplicates of a row summed first):

        m_r = beta_1 m_r + (1 - beta_1) g_r
        v_r = beta_2 v_r + (1 - beta_2) g_r^2
        w_r = w_r - alpha_t m_r / (sqrt(v_r) + epsilon)
        alpha_t = learning_rate * sqrt(1 - beta_2^t) / (1 - beta_1^t)

    A sparse gradient (`tf.IndexedSlices`, as lookups make) names the rows of the batch: the others,
    and their moments, stay as they are. A dense gradient names all rows, which is Keras' Adam. So
    one `SparseAdam` serves a model's tables and its dense layers alike. t counts all steps, also
    those without the row.

    Args:
      learning_rate: a number or a Keras schedule.
      beta_1: decay of the first moment, in [0, 1).
      beta_2: decay of the second moment, in [0, 1).
      epsilon: keeps the quotient finite.

    Raises:
      ValueError: a decay outside [0, 1).
      RuntimeError: at the first sparse gradient of a float32 variable on the CPU, which a
        custom op applies: the ops were not compiled.

    Cost: one step on n distinct rows reads and writes 3 n rows, whatever the table's size. An L2
      penalty on a whole table makes its gradient dense and loses this.

    References:
      Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015; `epsilon` is the
      "epsilon hat" of its section 2.
    """

    def __init__(
        self,
        learning_rate: float | tf_keras.optimizers.schedules.LearningRateSchedule = 0.001,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-7,
        name: str = "SparseAdam",
    ) -> None:
        # Keras' default weight decay is 0, not None, and rewrites every variable at every step.
        super().__init__(name=name, weight_decay=None, jit_compile=False)
        for key, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= value < 1:
                raise ValueError(f"`{key}` should be in [0, 1). Received: {value}")
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon

    def build(self, var_list: Sequence[tf.Variable]) -> None:
        """Makes both moments of every variable."""
        super().build(var_list)
        if getattr(self, "_built", False):
            return
        self._built = True
        self._m = [self.add_variable_from_reference(w, "m") for w in var_list]
        self._v = [self.add_variable_from_reference(w, "v") for w in var_list]

    def _deduplicate_sparse_grad(
        self, grads: Iterable[tf.Tensor | tf.IndexedSlices]
    ) -> list[tf.Tensor | tf.IndexedSlices]:
        """Leaves duplicates to `update_step`: Keras' way of summing them costs more than the op."""
        return list(grads)

    def update_step(self, gradient: tf.Tensor | tf.IndexedSlices, variable: tf.Variable) -> None:
        """Moves one variable by a gradient that may name a row more than once."""
        index = self._index_dict[self._var_key(variable)]
        m, v = self._m[index], self._v[index]
        if isinstance(gradient, tf.IndexedSlices) and _has_kernel(variable):
            library().qianmo_sparse_adam(
                variable.handle,
                m.handle,
                v.handle,
                indices=tf.cast(gradient.indices, tf.int64),
                gradients=gradient.values,
                learning_rate=self.learning_rate,
                step=self.iterations + 1,
                beta_1=self.beta_1,
                beta_2=self.beta_2,
                epsilon=self.epsilon,
            )
            return

        rate = tf.cast(self.learning_rate, m.dtype)
        step = tf.cast(self.iterations + 1, m.dtype)
        beta_1_power = tf.pow(tf.constant(self.beta_1, m.dtype), step)
        beta_2_power = tf.pow(tf.constant(self.beta_2, m.dtype), step)
        if not isinstance(gradient, tf.IndexedSlices):
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=m.handle,
                v=v.handle,
                beta1_power=beta_1_power,
                beta2_power=beta_2_power,
                lr=rate,
                beta1=self.beta_1,
                beta2=self.beta_2,
                epsilon=self.epsilon,
                grad=gradient,
            )
            return

        (gradient,) = super()._deduplicate_sparse_grad([gradient])
        rows, g = gradient.indices, gradient.values
        m_rows, v_rows = tf.gather(m, rows), tf.gather(v, rows)
        m_rows += (1 - self.beta_1) * (g - m_rows)
        v_rows += (1 - self.beta_2) * (tf.square(g) - v_rows)
        alpha = rate * tf.sqrt(1 - beta_2_power) / (1 - beta_1_power)
        moves = alpha * m_rows / (tf.sqrt(v_rows) + self.epsilon)
        m.scatter_update(tf.IndexedSlices(m_rows, rows))
        v.scatter_update(tf.IndexedSlices(v_rows, rows))
        variable.scatter_sub(tf.IndexedSlices(moves, rows))

    def get_config(self) -> dict[str, Any]:
        """The optimiser's arguments."""
        rate = self._serialize_hyperparameter(self._learning_rate)
        return {
            "name": self.name,
            "learning_rate": rate if isinstance(rate, dict) else float(rate),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }


def _has_kernel(variable: tf.Variable) -> bool:
    """Whether the op `Qianmo>SparseAdam` can move the variable; elsewhere stock ops do."""
    return variable.dtype == tf.float32 and "GPU" not in variable.device
