"""Compressed interaction network of xDeepFM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.shapes import field_shape


@tf_keras.utils.register_keras_serializable(package="qianmo")
class CIN(tf_keras.layers.Layer):
    """Vector-wise interactions between fields, of one degree more in each layer.

        X^k_u = act( sum_{i,h} W^k_{ihu} (X^0_i * X^{k-1}_h) + b^k_u ),   X^0 = v
        p     = sums over D of the feature maps X^k_u, all layers side by side

    With `split_half`, one half of a layer's maps feeds the next layer and the other half goes to p;
    the last layer's maps all go to p. Without it, every map does both.

    Args:
      units: feature maps U_k of each layer.
      activation: of every layer, by its Keras name; the paper has none.
      split_half: see above.
      seed: of the first weights, which depend on it and on the shapes alone. None draws one.

    Inputs: field vectors v, [B, F, D].
    Outputs: p, [B, P]; P is the number of maps that go to p.

    Raises:
      ValueError: no layers, a width below 1, an odd width that should be split, or inputs of
        another shape.

    Cost: D * F * H * U multiplications for each row and layer, H maps of the layer before; in
      training, D * F * H numbers for each row and layer are kept for the gradient.

    References:
      Lian et al. xDeepFM: Combining Explicit and Implicit Feature Interactions for Recommender
      Systems. KDD 2018, equation 6. The bias and the split are of the authors' code, not of the
      paper. DeepCTR's layer has the activation relu by default.

    Example:
    >>> CIN((64, 64))(tf.zeros([5, 9, 16])).shape
    TensorShape([5, 96])
    """

    def __init__(
        self,
        units: Sequence[int],
        activation: str = "linear",
        split_half: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not units or any(width < 1 for width in units):
            raise ValueError(f"`units` should be one or more widths >= 1. Received: {tuple(units)}")
        odd = [width for width in units[:-1] if width % 2]
        if split_half and odd:
            raise ValueError(
                "`units` should be even in all layers but the last, to be split in halves. "
                f"Received: {tuple(units)}"
            )
        self.units = tuple(units)
        self.activation = activation
        self.split_half = split_half
        self.seed = pick_seed(seed)
        self._activate = tf_keras.activations.get(activation)

    def build(self, input_shape: Any) -> None:
        """Makes W^k, [F * H, U], and b^k, [U]."""
        num_fields, _ = field_shape("CIN", input_shape)
        self._weights = []
        maps = num_fields
        for k, width in enumerate(self.units):
            glorot = tf_keras.initializers.GlorotUniform(derive_seed(self.seed, k))
            kernel = self.add_weight(
                name=f"kernel_{k}", shape=(num_fields * maps, width), initializer=glorot
            )
            bias = self.add_weight(name=f"bias_{k}", shape=(width,), initializer="zeros")
            self._weights.append((kernel, bias))
            maps = width // 2 if self.split_half else width
        super().build(input_shape)

    def call(self, v: tf.Tensor) -> tf.Tensor:
        """Computes p."""
        num_fields, dim = v.shape[1:]
        x0 = tf.reshape(tf.transpose(v, [0, 2, 1]), [-1, num_fields, 1])  # [B * D, F, 1]
        x = x0[:, :, 0]  # [B * D, H]
        pooled = []
        for k, (kernel, bias) in enumerate(self._weights):
            # As a batched matrix product the outer product has batched matrix products for its
            # gradients too: on CPU faster than a broadcast product, whose gradients are sums.
            outer = tf.matmul(x0, x[:, None, :])  # [B * D, F, H]
            z = tf.matmul(tf.reshape(outer, [-1, num_fields * x.shape[1]]), kernel)
            x = direct = self._activate(tf.nn.bias_add(z, bias))
            if self.split_half and k < len(self.units) - 1:
                x, direct = tf.split(x, 2, 1)
            pooled.append(tf.reduce_sum(tf.reshape(direct, [-1, dim, direct.shape[1]]), 1))
        return tf.concat(pooled, 1)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        return {
            **super().get_config(),
            "units": list(self.units),
            "activation": self.activation,
            "split_half": self.split_half,
            "seed": self.seed,
        }
