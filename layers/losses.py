"""Losses on logits, per row."""

from __future__ import annotations

from typing import Literal

import tensorflow as tf

Distance = Literal["soft_labels", "logit_mse", "probability_mse"]


def binary_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """Cross-entropy of each row, summed over its K labels: [B, K], [B, K] -> [B].

    BCE(y, z) = max(z, 0) - z y + log(1 + exp(-|z|))

    A label that is NaN is one that the row does not have; it adds nothing.
    """
    is_there = ~tf.math.is_nan(labels)
    labels = tf.where(is_there, labels, tf.zeros_like(labels))
    losses = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    return tf.reduce_sum(tf.where(is_there, losses, tf.zeros_like(losses)), 1)


def distillation(
    teacher: tf.Tensor, student: tf.Tensor, distance: Distance, temperature: float = 1.0
) -> tf.Tensor:
    """How far a student's logits are from its teacher's, per row: [B, K], [B, K] -> [B].

    With p = sigmoid(z_T / t) and q = sigmoid(z_S / t):

        soft_labels      t^2 * sum_k BCE(p, z_S / t)
        logit_mse        sum_k (z_T - z_S)^2 / t^2
        probability_mse  t^2 * sum_k (p - q)^2

    No gradient reaches the teacher. The factors t^2 keep the gradient's size when t grows, to first
    order; in logit_mse t only scales.

    Args:
      teacher: logits z_T.
      student: logits z_S.
      distance: one of the three above.
      temperature: t > 0.

    Raises:
      ValueError: an unknown distance or a temperature that is not above 0.

    References: Hinton et al. 2015, Distilling the Knowledge in a Neural Network.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` should be > 0. Received: {temperature}")
    z_t = tf.stop_gradient(teacher) / temperature
    z_s = student / temperature
    if distance == "soft_labels":
        return temperature**2 * binary_cross_entropy(tf.sigmoid(z_t), z_s)
    if distance == "logit_mse":
        return tf.reduce_sum(tf.square(z_t - z_s), 1)
    if distance == "probability_mse":
        return temperature**2 * tf.reduce_sum(tf.square(tf.sigmoid(z_t) - tf.sigmoid(z_s)), 1)
    raise ValueError(
        f"`distance` should be soft_labels, logit_mse or probability_mse. Received: {distance!r}"
    )
