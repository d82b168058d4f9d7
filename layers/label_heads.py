"""What a label's kind decides: the loss of its logit, and what the logit predicts."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from qianmo.layers.schema import Schema

# Mean and variance of each label that is a rating, None for a binary one; () if all are binary.
LabelMoments = Sequence[tuple[float, float] | None]


def label_moments(schema: Schema) -> tuple[tuple[float, float] | None, ...]:
    """The moments by which the schema's ratings are standardised, in the order of its labels.

    Returns:
      Mean and variance of each rating, None for each binary label; () if all labels are binary.

    Raises:
      ValueError: a rating without moments.
    """
    ratings = [label for label in schema.labels if schema.kind(label) == "rating"]
    for label in ratings:
        if label not in schema.label_moments:
            raise ValueError(
                f"label `{label}`: mean and variance are not known yet. Give `label_moments`, or "
                "count them from the training rows first."
            )
    return tuple(schema.label_moments.get(label) for label in schema.labels) if ratings else ()


def _standard(moments: LabelMoments, labels: tf.Tensor) -> tf.Tensor:
    if not any(moments):
        return labels
    mean = tf.constant([m[0] if m else 0.0 for m in moments], labels.dtype)
    scale = tf.constant([m[1] ** -0.5 if m else 1.0 for m in moments], labels.dtype)
    return (labels - mean) * scale


def standard_labels(schema: Schema, labels: tf.Tensor) -> tf.Tensor:
    """Labels as logits are compared with them: (y - mean) / sqrt(variance) of ratings.

    Binary labels stay as they are, and so does NaN.

    Args:
      schema: kinds and moments of the labels.
      labels: [..., K].
    """
    return _standard(label_moments(schema), labels)


def elementwise(moments: LabelMoments, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The loss l of each row and label that is there; see `label_losses`.

    Args:
      moments: of the labels; () if all are binary.
      labels: y, [..., K], finite.
      logits: z, [..., K].
    """
    if not any(moments):
        return tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
    is_rating = tf.constant([m is not None for m in moments])
    labels = _standard(moments, labels)
    # Neither kind may see the other's values: an infinite loss has NaN for its masked gradient.
    binary = tf.nn.sigmoid_cross_entropy_with_logits(
        tf.where(is_rating, tf.zeros_like(labels), labels), logits
    )
    return tf.where(is_rating, tf.square(logits - labels), binary)


def present(
    labels: tf.Tensor, label_weights: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Labels with 0 for NaN, which would be the gradient too, and what each of them counts.

    Args:
      labels: [..., K]; NaN where the row does not have the label.
      label_weights: [..., K], >= 0; None for 1.

    Returns:
      Labels, and weights: 0 where the row does not have the label. [..., K] each.
    """
    is_there = ~tf.math.is_nan(labels)
    if label_weights is None:
        label_weights = tf.ones_like(labels)
    weights = tf.cast(label_weights, labels.dtype)
    return tf.where(is_there, labels, 0.0), tf.where(is_there, weights, 0.0)


def weighted(weights: tf.Tensor, losses: tf.Tensor) -> tf.Tensor:
    """The product; 0 where a weight is 0, whatever the loss."""
    weights = tf.cast(weights, losses.dtype)
    return tf.where(weights > 0, weights * losses, tf.zeros_like(losses))


def label_losses(
    schema: Schema,
    labels: tf.Tensor,
    logits: tf.Tensor,
    label_weights: tf.Tensor | None = None,
) -> tf.Tensor:
    """The loss of each row and label, [B, K].

        w BCE(y, z)                              binary label
        w (z - (y - mean) / sqrt(variance))^2    rating

    with BCE(y, z) = max(z, 0) - z y + log(1 + exp(-|z|)). A label that is NaN is one that the row
    does not have: its loss and its gradient are 0.

    Args:
      schema: kinds and moments of the labels.
      labels: y, [B, K], in the labels' own units.
      logits: z, [B, K].
      label_weights: w, [B, K]; None for 1.

    Raises:
      ValueError: a rating without moments.

    Example:
    >>> schema = Schema.from_config({
    ...     "features": [{"name": "user", "num_ids": 9}],
    ...     "labels": ["click", "stars"],
    ...     "label_kinds": {"stars": "rating"},
    ...     "label_moments": {"stars": [3.0, 4.0]},
    ... })
    >>> label_losses(schema, tf.constant([[1.0, 5.0]]), tf.constant([[0.0, 3.0]])).numpy()
    array([[0.6931472, 4.       ]], dtype=float32)
    """
    labels, weights = present(labels, label_weights)
    labels = tf.cast(labels, logits.dtype)
    return weighted(weights, elementwise(label_moments(schema), labels, logits))


def predictions(schema: Schema, logits: tf.Tensor) -> tf.Tensor:
    """What logits say of labels, [..., K]: sigmoid(z), or mean + sqrt(variance) z of a rating.

    Args:
      schema: kinds and moments of the labels.
      logits: z, [..., K].

    Raises:
      ValueError: a rating without moments.

    Example:
    >>> schema = Schema.from_config({
    ...     "features": [{"name": "user", "num_ids": 9}],
    ...     "labels": ["click", "stars"],
    ...     "label_kinds": {"stars": "rating"},
    ...     "label_moments": {"stars": [3.0, 4.0]},
    ... })
    >>> predictions(schema, tf.constant([[0.0, 0.5]])).numpy()
    array([[0.5, 4. ]], dtype=float32)
    """
    probabilities = tf.sigmoid(logits)
    moments = label_moments(schema)
    if not moments:
        return probabilities
    mean = tf.constant([m[0] if m else 0.0 for m in moments], logits.dtype)
    deviation = tf.constant([m[1] ** 0.5 if m else 0.0 for m in moments], logits.dtype)
    is_rating = tf.constant([m is not None for m in moments])
    return tf.where(is_rating, mean + deviation * logits, probabilities)
