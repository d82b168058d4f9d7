"""MLPs of one shape that belong to one domain each, with their weights stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.by_domain import by_domain
from qianmo.layers.mlp import MLP
from qianmo.layers.own_weights import Own
from qianmo.layers.seeding import derive_seed, pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class DomainMLP(tf_keras.layers.Layer):
    """Passes each row through its own domain's MLP.

        y_i = MLP_{d_i}(x_i),   y_i = 0 where d_i = 0

    It is `DomainExperts` of P `MLP`s with the seeds derive_seed(seed, p), but for dropout's masks.
    Here all domains' weights of a layer are one variable, which an optimiser moves in one step, and
    no Keras layer is called for each domain: with many domains the graph is a small part of theirs.

    Args:
      num_domains: P.
      units: widths of the layers, at least one.
      activation: of every layer, by its Keras name.
      dropout: rate after every layer, in training.
      seed: of weights and masks. None draws one.

    Inputs: (x [B, N], domain [B]); domains are 1 to P, and 0 for an unknown one.
    Outputs: y, [B, units[-1]].

    Raises:
      ValueError: no domain, no width, or what `MLP` refuses.

    Cost: each MLP computes the rows of its own domain. The graph grows with P, by some ten ops a
      layer and domain.
    """

    reads_domain = True

    def __init__(
        self,
        num_domains: int,
        units: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_domains < 1:
            raise ValueError(f"`num_domains` should be >= 1. Received: {num_domains}")
        if not units:
            raise ValueError("`units` should hold at least one width. Received: none")
        MLP(units, activation, dropout, seed=0)  # which checks them
        self.num_domains = num_domains
        self.units = tuple(units)
        self.activation = activation
        self.dropout = dropout
        self.seed = pick_seed(seed)
        self._act = tf_keras.activations.get(activation)

    def build(self, input_shape: Any) -> None:
        """Makes the layers' weights, [P, in, out] and [P, out], and a counter of calls."""
        widths = [tf.TensorShape(input_shape[0])[-1], *self.units]
        domains = range(self.num_domains)
        self.kernels, self.biases = [], []
        for layer in range(len(self.units)):

            def start(shape: Any, dtype: Any = None, layer: int = layer) -> tf.Tensor:
                seeds = [derive_seed(derive_seed(self.seed, p), layer) for p in domains]
                glorot = tf_keras.initializers.GlorotUniform
                return tf.stack([glorot(seed)(shape[1:], dtype) for seed in seeds])

            shape = (self.num_domains, *widths[layer : layer + 2])
            self.kernels.append(self.add_weight(f"kernels_{layer}", shape, initializer=start))
            shape = (self.num_domains, widths[layer + 1])
            self.biases.append(self.add_weight(f"biases_{layer}", shape, initializer="zeros"))
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
    def own_weights(self) -> list[Own]:
        """All weights, by domain."""
        return [
            Own(v, (self.num_domains, *(1,) * (v.shape.rank - 1))) for v in self.trainable_weights
        ]

    def of_domain(self, place: int) -> dict[str, tf.Variable]:
        """The variables whose part `place`, 0 to P - 1, is one domain's, by an `MLP`'s names."""
        if not 0 <= place < self.num_domains:
            raise ValueError(f"`place` should be in [0, {self.num_domains}). Received: {place}")
        pairs = enumerate(zip(self.kernels, self.biases, strict=True))
        return {
            f"_layers/{layer}/{name}": variable
            for layer, pair in pairs
            for name, variable in zip(("kernel", "bias"), pair, strict=True)
        }

    def _masks(self, rows: tf.Tensor) -> tf.Tensor:
        """What dropout multiplies all layers' outputs by, side by side, [B, sum of units]."""
        call = self._calls.read_value()
        self._calls.assign_add(1)
        seed = tf.stack([tf.constant(derive_seed(self.seed, 0, 1), tf.int64), call])
        shape = tf.stack([rows, sum(self.units)])
        uniform = tf.random.stateless_uniform(shape, seed, alg="philox")
        kept = 1 / (1 - self.dropout)
        return tf.cast(tf.where(uniform >= self.dropout, kept, 0.0), self.compute_dtype)

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Computes y."""
        x, domain = inputs
        drops = bool(training and self.dropout)
        masks = [self._masks(tf.shape(x)[0])] if drops else []
        weights = [
            [tf.unstack(tf.cast(stacked, self.compute_dtype)) for stacked in pair]
            for pair in zip(self.kernels, self.biases, strict=True)
        ]

        def mlp(p: int, rows: tuple[tf.Tensor, list[tf.Tensor]]) -> tf.Tensor:
            a, own_masks = rows
            each = tf.split(own_masks[0], self.units, 1) if drops else []
            for layer, (kernels, biases) in enumerate(weights):
                a = self._act(tf.nn.bias_add(tf.matmul(a, kernels[p]), biases[p]))
                if drops:
                    a *= each[layer]
            return a

        return by_domain(mlp, (x, masks), domain, self.num_domains)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = ("num_domains", "activation", "dropout", "seed")
        arguments = {name: getattr(self, name) for name in names}
        return {**super().get_config(), **arguments, "units": list(self.units)}
