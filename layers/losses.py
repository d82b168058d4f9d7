"""Losses on logits, of each row and label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import tensorflow as tf

from qianmo.layers.schema import LabelKind

Distance = Literal["soft_labels", "logit_mse", "probability_mse"]


def distillation(
    teacher: tf.Tensor,
    student: tf.Tensor,
    distance: Distance,
    temperature: float = 1.0,
    kinds: Sequence[LabelKind] = (),
) -> tf.Tensor:
    """How far a student's logits are from its teacher's, for each row and label.

    With p = sigmoid(z_T / t) and q = sigmoid(z_S / t), for binary labels:

        soft_labels      t^2 * BCE(p, z_S / t)
        logit_mse        (z_T - z_S)^2 / t^2
        probability_mse  t^2 * (p - q)^2

    A rating's logit is its prediction, so there p = z_T / t, q = z_S / t, and the loss by soft
    labels is (p - q)^2.

    No gradient reaches the teacher. The factors t^2 keep the gradient's size when t grows, to first
    order; in logit_mse t only scales.

    Args:
      teacher: logits z_T, [B, K].
      student: logits z_S, [B, K].
      distance: one of the three above.
      temperature: t > 0.
      kinds: of the labels; all binary when empty.

    Returns:
      [B, K].

    Raises:
      ValueError: an unknown distance or a temperature that is not above 0.

    References: Hinton et al. 2015, Distilling the Knowledge in a Neural Network.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` should be > 0. Received: {temperature}")
    z_t = tf.stop_gradient(teacher) / temperature
    z_s = student / temperature
    if distance == "logit_mse":
        return tf.square(z_t - z_s)
    if distance == "soft_labels":
        losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.sigmoid(z_t), z_s)
    elif distance == "probability_mse":
        losses = tf.square(tf.sigmoid(z_t) - tf.sigmoid(z_s))
    else:
        raise ValueError(
            f"`distance` should be one of {get_args(Distance)}. Received: {distance!r}"
        )
    if "rating" in kinds:
        is_rating = tf.constant([kind == "rating" for kind in kinds])
        losses = tf.where(is_rating, tf.square(z_t - z_s), losses)
    return temperature**2 * losses
