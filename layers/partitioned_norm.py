"""Normalisation by the statistics of each row's own domain."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.own_weights import Own


@tf_keras.utils.register_keras_serializable(package="qianmo")
class PartitionedNorm(tf_keras.layers.Layer):
    """Normalises rows by their domain's moving statistics, which hold for domains of few rows.

        y = gamma * gamma_p * (x - mu_p) / sqrt(var_p + epsilon) + beta + beta_p

    Mean and variance of the last `window` rows are kept for each domain and for all rows. A domain
    that has shown s rows so far (at most `window`) is normalised by both sets pooled, its own with
    weight s and those of all rows with weight `prior_rows`: an unknown domain has those of all
    rows. In training the batch is counted in first, and the gradient flows through the share that
    its rows have in their own domain's statistics; so a domain with few rows in a batch is never
    normalised by these few alone, and training and inference see nearly the same numbers.

    Args:
      num_domains: P.
      window: rows that the moving statistics remember.
      prior_rows: weight of all rows' statistics in a domain's own.
      epsilon: added to the variance.

    Inputs: (x [..., N], domain [...]), domains from 1 to P and 0 for an unknown one.
    Outputs: y, [..., N].

    Raises:
      ValueError: `num_domains`, `window` or `prior_rows` below 1.

    References: Sheng et al. 2021, STAR, whose batches are of one domain each and normalise
      themselves; here batches are mixed, and the two sets of statistics pooled.
    """

    reads_domain = True

    def __init__(
        self,
        num_domains: int,
        window: int = 2000,
        prior_rows: int = 100,
        epsilon: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for key, value in (
            ("num_domains", num_domains),
            ("window", window),
            ("prior_rows", prior_rows),
        ):
            if value < 1:
                raise ValueError(f"`{key}` should be >= 1. Received: {value}")
        self.num_domains = num_domains
        self.window = window
        self.prior_rows = prior_rows
        self.epsilon = epsilon

    def build(self, input_shape: Any) -> None:
        """Makes scales, shifts and statistics; those of all rows stand at place 0."""
        width = tf.TensorShape(input_shape[0])[-1]
        shape = (self.num_domains + 1, width)
        self.gamma = self.add_weight("gamma", (width,), initializer="ones")
        self.beta = self.add_weight("beta", (width,), initializer="zeros")
        own = (self.num_domains, width)
        self.domain_gammas = self.add_weight("domain_gammas", own, initializer="ones")
        self.domain_betas = self.add_weight("domain_betas", own, initializer="zeros")
        self.rows = self.add_weight(
            "rows", (self.num_domains + 1,), initializer="zeros", trainable=False
        )
        self.means = self.add_weight("means", shape, initializer="zeros", trainable=False)
        self.variances = self.add_weight("variances", shape, initializer="ones", trainable=False)
        super().build(input_shape)

    @property
    def own_weights(self) -> list[Own]:
        """The domains' scales and shifts."""
        return [Own(v, (self.num_domains, 1)) for v in (self.domain_gammas, self.domain_betas)]

    def _counted_in(
        self, x: tf.Tensor, domain: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Rows, means and variances with the batch in them, for all rows and each domain."""

        def sums(values: tf.Tensor) -> tf.Tensor:
            found = tf.math.unsorted_segment_sum(values, domain, self.num_domains + 1)
            return tf.concat([tf.reduce_sum(values, 0, keepdims=True), found[1:]], 0)

        count = sums(tf.ones_like(x[:, 0]))
        mean = tf.math.divide_no_nan(sums(x), count[:, None])
        # No row is compared with another domain's mean, so that no gradient crosses.
        apart = tf.square(x - tf.gather(mean, domain))
        apart_from_all = tf.square(x - mean[0])
        own = tf.math.unsorted_segment_sum(apart, domain, self.num_domains + 1)[1:]
        squares = tf.concat([tf.reduce_sum(apart_from_all, 0, keepdims=True), own], 0)
        variance = tf.math.divide_no_nan(squares, count[:, None])

        rows = tf.minimum(tf.cast(self.rows, x.dtype) + count, count + self.window)
        share = tf.math.divide_no_nan(count, rows)[:, None]
        means, variances = tf.cast(self.means, x.dtype), tf.cast(self.variances, x.dtype)
        shift = mean - means
        return (
            rows,
            means + share * shift,
            (1 - share) * variances + share * variance + share * (1 - share) * tf.square(shift),
        )

    def call(self, inputs: tuple[tf.Tensor, tf.Tensor], training: bool = False) -> tf.Tensor:
        """Computes y, and in training counts the batch in."""
        given, domain = inputs
        wide = tf.float64 if given.dtype == tf.float64 else tf.float32
        x = tf.cast(tf.reshape(given, [-1, given.shape[-1]]), wide)
        domain = tf.reshape(domain, [-1])
        statistics = self.rows, self.means, self.variances
        rows, means, variances = (tf.cast(v, wide) for v in statistics)
        if training:
            rows, means, variances = self._counted_in(x, domain)
            for variable, value in zip(statistics, (rows, means, variances), strict=True):
                variable.assign(tf.cast(tf.stop_gradient(value), variable.dtype))
        all_mean, all_variance = tf.stop_gradient(means[0]), tf.stop_gradient(variances[0])
        seen = tf.concat([tf.zeros_like(rows[:1]), tf.minimum(rows[1:], self.window)], 0)
        own = (seen / (seen + self.prior_rows))[:, None]
        shift = means - all_mean
        mean = all_mean + own * shift
        variance = own * variances + (1 - own) * all_variance + own * (1 - own) * tf.square(shift)

        one, zero = tf.ones_like(all_mean)[None], tf.zeros_like(all_mean)[None]
        gammas = tf.concat([one, tf.cast(self.domain_gammas, wide)], 0) * tf.cast(self.gamma, wide)
        betas = tf.concat([zero, tf.cast(self.domain_betas, wide)], 0) + tf.cast(self.beta, wide)
        scale = gammas * tf.math.rsqrt(variance + self.epsilon)
        y = (x - tf.gather(mean, domain)) * tf.gather(scale, domain) + tf.gather(betas, domain)
        return tf.cast(tf.reshape(y, tf.shape(given)), given.dtype)

    def get_config(self) -> dict[str, Any]:
        """The layer's arguments."""
        names = ("num_domains", "window", "prior_rows", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
