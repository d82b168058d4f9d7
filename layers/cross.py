"""Cross network of DCN v2."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.recommenders import Cross
from qianmo.layers.seeding import derive_seed, pick_seed


@tf_keras.utils.register_keras_serializable(package="qianmo")
class CrossNetwork(tf_keras.layers.Layer):
    """A stack of tensorflow-recommenders' `Cross` layers.

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l

    Args:
      num_layers: number of cross layers.
      projection_dim: rank of W_l = V_l U_l; None keeps W_l full.
      seed: of the first weights, which depend on it and on the shapes alone. None draws one.

    Inputs: x_0, [B, N].
    Outputs: x_{num_layers}, [B, N].

    Raises:
      ValueError: no layers, a rank below 1, or inputs of another shape.

    References:
      Wang et al. DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning
      to Rank Systems. WWW 2021.

    Example:
    >>> CrossNetwork(2)(tf.zeros([5, 10])).shape
    TensorShape([5, 10])
    """

    def __init__(
        self,
        num_layers: int,
        projection_dim: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_layers < 1:
            raise ValueError(f"`num_layers` should be >= 1. Received: {num_layers}")
        if projection_dim is not None and projection_dim < 1:
            raise ValueError(
                f"`projection_dim` should be >= 1, or None. Received: {projection_dim}"
            )
        self.num_layers = num_layers
        self.projection_dim = projection_dim
        self.seed = pick_seed(seed)
        self._crosses = [
            Cross(
                projection_dim,
                kernel_initializer=tf_keras.initializers.TruncatedNormal(
                    stddev=0.05, seed=derive_seed(self.seed, index)
                ),
                dtype=self.dtype_policy,
                name=f"cross_{index}",
            )
            for index in range(num_layers)
        ]

    def build(self, input_shape: Any) -> None:
        """Makes the layers' weights."""
        if len(input_shape) != 2 or input_shape[1] is None:
            raise ValueError(
                "`CrossNetwork` reads flat rows: their shape should be [B, N] with N known. "
                f"Received: {tuple(input_shape)}"
            )
        for cross in self._crosses:
            # A `Cross` makes its kernels when it is first called, not when it is built.
            cross(tf.zeros([1, input_shape[1]], self.compute_dtype))
        super().build(input_shape)

    def call(self, x0: tf.Tensor) -> tf.Tensor:
        """Computes the crosses."""
        x = x0
        for cross in self._crosses:
            x = cross(x0, x)
        return x

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "num_layers": self.num_layers,
            "projection_dim": self.projection_dim,
            "seed": self.seed,
        }
