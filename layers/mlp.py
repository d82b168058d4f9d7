"""Dense layers in a row, with reproducible weights and resumable dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.seeding import derive_seed, pick_seed

Layer = Callable[[tf.Tensor], tf.Tensor]
# (number of a dense layer, what enters it, the layer) -> its corrected output, before activation.
Correction = Callable[[int, tf.Tensor, Layer], tf.Tensor]


def dense(layer: tf_keras.layers.Dense, x: tf.Tensor) -> tf.Tensor:
    """A dense layer on [..., in], as one product.

    Keras would find out at each call which of unknown axes to contract, by some twenty small ops.
    """
    if x.shape.rank == 2:
        return layer(x)
    z = layer(tf.reshape(x, [-1, x.shape[-1]]))
    return tf.reshape(z, [*tf.unstack(tf.shape(x))[:-1], layer.units])


def corrected(
    correction: Correction | None, number: int, layer: tf_keras.layers.Dense, x: tf.Tensor
) -> tf.Tensor:
    """A dense layer on [..., in], as a task sees it."""
    if correction is None:
        return dense(layer, x)
    return correction(number, x, functools.partial(dense, layer))


@tf_keras.utils.register_keras_serializable(package="qianmo")
class MLP(tf_keras.layers.Layer):
    """A multi-layer perceptron.

        a^0 = x,   a^l = m^l * act(W^l a^{l-1} + b^l) / (1 - dropout)

    with m^l the dropout mask of training, all ones (and no division) otherwise.

    Its first weights depend on `seed` and its own widths alone, not on what was built before it.
    Its masks depend on `seed` and on the number of training calls so far, which is a weight: a run
    that is killed and resumed from its checkpoint draws the masks that it would have drawn.

    Args:
      units: widths of the layers; with none the layer is the identity.
      activation: of every layer, by its Keras name.
      dropout: rate after every layer, in training.
      l2: weight of the loss  l2 * sum ||W^l||^2.
      seed: of weights and masks. Networks of equal widths and seed start equal, so experts that
        stand side by side need different ones. None draws a seed, which the config then holds.

    Inputs: x, [B, N].
    Outputs: the last layer's a, [B, units[-1]].

    Raises:
      ValueError: a width below 1, a rate outside [0, 1), a negative l2 or an unknown activation.

    Example:
    >>> MLP((64, 32), dropout=0.1, seed=7)(tf.zeros([5, 10])).shape
    TensorShape([5, 32])
    """

    def __init__(
        self,
        units: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        l2: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if any(width < 1 for width in units):
            raise ValueError(f"`units` should be widths >= 1. Received: {tuple(units)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` should be in [0, 1). Received: {dropout}")
        if l2 < 0:
            raise ValueError(f"`l2` should be >= 0. Received: {l2}")
        self.units = tuple(units)
        self.activation = activation
        self.dropout = dropout
        self.l2 = l2
        self.seed = pick_seed(seed)
        self._act = tf_keras.activations.get(activation)
        self._layers = [
            tf_keras.layers.Dense(
                width,
                kernel_initializer=tf_keras.initializers.GlorotUniform(
                    derive_seed(self.seed, index)
                ),
                kernel_regularizer=tf_keras.regularizers.L2(l2) if l2 else None,
                dtype=self.dtype_policy,
                name=f"dense_{index}",
            )
            for index, width in enumerate(self.units)
        ]

    def build(self, input_shape: Any) -> None:
        """Makes the layers' weights and the counter of training calls."""
        shape = tf.TensorShape(input_shape)
        for layer in self._layers:
            with tf.name_scope(layer.name):
                layer.build(shape)
            shape = layer.compute_output_shape(shape)
        if self.dropout:
            self._calls = self.add_weight(
                name="dropout_calls",
                shape=(),
                dtype=tf.int64,
                initializer="zeros",
                trainable=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )
        super().build(input_shape)

    @property
    def kernels(self) -> list[tf.Variable]:
        """The layers' W^l."""
        return [layer.kernel for layer in self._layers]

    def hidden(
        self, x: tf.Tensor, training: bool = False, correction: Correction | None = None
    ) -> list[tf.Tensor]:
        """Outputs of all layers, each [B, units[l]], as the layer after it receives them."""
        if not self.built:
            self.build(x.shape)
        drops = bool(training and self.dropout)
        if drops:
            call = self._calls.read_value()
            self._calls.assign_add(1)
        outputs = []
        for index, layer in enumerate(self._layers):
            x = self._act(corrected(correction, index, layer, x))
            if drops:
                # Paths of one number are the kernels' seeds, so masks take two.
                seed = tf.stack([tf.constant(derive_seed(self.seed, index, 1), tf.int64), call])
                uniform = tf.random.stateless_uniform(tf.shape(x), seed, alg="philox")
                x = tf.where(uniform >= self.dropout, x / (1 - self.dropout), tf.zeros_like(x))
            outputs.append(x)
        return outputs

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Output of the last layer."""
        return self.hidden(x, training)[-1] if self.units else x

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "units": list(self.units),
            "activation": self.activation,
            "dropout": self.dropout,
            "l2": self.l2,
            "seed": self.seed,
        }
