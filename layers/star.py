"""The star topology: dense layers whose weights are a shared centre and a leaf of each domain."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.by_domain import by_domain
from qianmo.layers.own_weights import Own
from qianmo.layers.seeding import pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class StarLeaves(tf_keras.layers.Layer):
    """What the domains' leaves add to the output of a dense layer, their centre.

        leaf(x) = x ((W_p - 1) * W) + b_p

    with p the row's domain, W the centre's kernel and * the elementwise product. W_p starts at 1
    and b_p at 0, so that leaves start by adding exactly 0. Rows of an unknown domain get 0.

    Args:
      num_domains: P.

    Inputs: (x [..., N], W [N, M], domain [...]), domains from 1 to P and 0 for an unknown one.
    Outputs: leaf(x), [..., M].
    """

    reads_domain = True

    def __init__(self, num_domains: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_domains < 1:
            raise ValueError(f"`num_domains` should be >= 1. Received: {num_domains}")
        self.num_domains = num_domains

    def build(self, input_shape: Any) -> None:
        """Makes the leaves."""
        num_inputs, num_outputs = tf.TensorShape(input_shape[1])
        self.kernels = self.add_weight(
            "kernels", (self.num_domains, num_inputs, num_outputs), initializer="ones"
        )
        self.biases = self.add_weight(
            "biases", (self.num_domains, num_outputs), initializer="zeros"
        )
        super().build(input_shape)

    @property
    def own_weights(self) -> list[Own]:
        """The leaves."""
        return [
            Own(self.kernels, (self.num_domains, 1, 1)),
            Own(self.biases, (self.num_domains, 1)),
        ]

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Computes leaf(x)."""
        x, centre, domain = inputs
        # Not slices, each of whose gradients would be as large as the whole.
        kernels = tf.unstack((tf.cast(self.kernels, self.compute_dtype) - 1) * centre)
        domain = tf.reshape(domain, [-1])
        leaves = by_domain(
            lambda p, rows: tf.matmul(rows, kernels[p]),
            tf.reshape(x, [-1, x.shape[-1]]),
            domain,
            self.num_domains,
        )
        biases = tf.pad(tf.cast(self.biases, self.compute_dtype), [[1, 0], [0, 0]])
        leaves += tf.gather(biases, domain)
        shape = tf.concat([tf.shape(x)[:-1], [leaves.shape[-1]]], 0)
        return tf.ensure_shape(tf.reshape(leaves, shape), [*x.shape[:-1], leaves.shape[-1]])

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {**super().get_config(), "num_domains": self.num_domains}


@tf_keras.utils.register_keras_serializable(package="qianmo")
class StarDense(tf_keras.layers.Layer):
    """A dense layer of star topology, without activation.

        y = x (W_p * W) + b_p + b

    computed as a plain dense layer and its `StarLeaves`: it starts equal to the plain layer bit for
    bit, and rows of an unknown domain get the centre alone.

    Args:
      units: width of y.
      num_domains: P.
      seed: of W. None draws one.

    Inputs: (x [..., N], domain [...]), domains from 1 to P and 0 for an unknown one.
    Outputs: y, [..., units].

    References: Sheng et al. 2021, One Model to Serve All (STAR).

    Example:
    >>> StarDense(4, num_domains=3, seed=1)((tf.ones([2, 5]), tf.constant([3, 0]))).shape
    TensorShape([2, 4])
    """

    reads_domain = True

    def __init__(
        self, units: int, num_domains: int, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.seed = pick_seed(seed)
        glorot = tf_keras.initializers.GlorotUniform(self.seed)
        self.centre = tf_keras.layers.Dense(
            units, kernel_initializer=glorot, dtype=self.dtype_policy, name="centre"
        )
        self.leaves = StarLeaves(num_domains, dtype=self.dtype_policy, name="leaves")

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        """Computes y."""
        x, domain = inputs
        y = self.centre(x)
        return y + self.leaves((x, tf.cast(self.centre.kernel, y.dtype), domain))

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        arguments = {"units": self.centre.units, "num_domains": self.leaves.num_domains}
        return {**super().get_config(), **arguments, "seed": self.seed}
