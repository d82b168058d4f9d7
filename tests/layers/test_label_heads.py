"""The loss and the prediction of each kind of label, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from qianmo.layers.features import Categorical
from qianmo.layers.inner_loop import InnerLoop, Support
from qianmo.layers.label_heads import (
    elementwise,
    label_losses,
    label_moments,
    predictions,
    present,
    standard_labels,
    weighted,
)
from qianmo.layers.losses import distillation
from qianmo.layers.schema import Schema
from qianmo.layers.tower import Tower

FEATURES = (Categorical(name="user", num_ids=5),)
LABELS = ("click", "stars", "minutes")
SCHEMA = Schema(
    features=FEATURES,
    labels=LABELS,
    label_kinds={"stars": "rating", "minutes": "rating"},
    label_moments={"stars": (3.5, 0.25), "minutes": (40.0, 900.0)},
)
BINARY = Schema(features=FEATURES, labels=LABELS)
MEAN, DEVIATION = np.array([0, 3.5, 40.0]), np.array([1, 0.5, 30.0])
NAN = float("nan")
Y = np.array([[1, 5, 10], [0, NAN, 70], [NAN, 1, NAN], [0.25, 2, 40]], np.float32)
Z = np.random.default_rng(1).normal(size=Y.shape).astype(np.float32)


def expected_losses(y: Any, z: Any) -> Any:
    standard = (y - MEAN) / DEVIATION
    binary = -y * np.log(1 / (1 + np.exp(-z))) - (1 - y) * np.log(1 / (1 + np.exp(z)))
    return np.where([True, False, False], binary, (z - standard) ** 2)


def test_losses_of_every_kind() -> None:
    expected = np.nan_to_num(expected_losses(Y, Z.astype(np.float64)))
    np.testing.assert_allclose(label_losses(SCHEMA, Y, Z), expected, rtol=1e-5)
    weights = np.abs(np.random.default_rng(2).normal(size=Y.shape)).astype(np.float32)
    weights[3] = [0, 1, 2]
    found = label_losses(SCHEMA, Y, Z, weights)
    np.testing.assert_allclose(found, weights * expected, rtol=1e-5)


def test_a_label_that_a_row_lacks_has_no_gradient() -> None:
    z = tf.Variable(Z)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(
            label_losses(SCHEMA, tf.constant(Y), z, tf.constant(np.full(Y.shape, 3.0)))
        )
    standard = (Y - MEAN) / DEVIATION
    gradient = np.where([True, False, False], 1 / (1 + np.exp(-Z)) - Y, 2 * (Z - standard))
    np.testing.assert_allclose(
        tape.gradient(loss, z), 3 * np.nan_to_num(gradient), rtol=1e-4, atol=1e-6
    )


def test_a_logit_that_is_not_finite_costs_nothing_where_the_label_is_absent() -> None:
    y = tf.constant([[NAN, 5.0, 40.0], [1.0, 5.0, 40.0]])
    z = tf.Variable([[np.inf, 3.0, 0.0], [0.5, np.inf, 0.0]])
    weights = tf.constant([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    with tf.GradientTape() as tape:
        losses = label_losses(SCHEMA, y, z, weights)
    np.testing.assert_allclose(losses, [[0, 0, 0], [np.log1p(np.exp(-0.5)), 0, 0]], rtol=1e-6)
    assert np.isfinite(losses).all()
    del tape


def test_predictions_are_probabilities_and_ratings_in_their_units() -> None:
    expected = np.where([True, False, False], 1 / (1 + np.exp(-Z)), MEAN + DEVIATION * Z)
    np.testing.assert_allclose(predictions(SCHEMA, Z), expected, rtol=1e-5)
    np.testing.assert_array_equal(predictions(BINARY, Z), tf.sigmoid(Z))


def test_the_best_constant_logit_of_a_rating_predicts_its_mean() -> None:
    y = np.array([[1, v, 0] for v in (1.0, 4.0, 4.5)], np.float32)
    grid = np.linspace(-6, 6, 2401, dtype=np.float32)
    costs = [float(tf.reduce_sum(label_losses(SCHEMA, y, np.full(y.shape, z))[:, 1])) for z in grid]
    best = np.full((1, 3), grid[np.argmin(costs)])
    assert float(predictions(SCHEMA, best)[0, 1]) == pytest.approx(y[:, 1].mean(), abs=0.005)


def test_standard_labels() -> None:
    np.testing.assert_allclose(standard_labels(SCHEMA, Y), (Y - MEAN) / DEVIATION, rtol=1e-6)
    np.testing.assert_array_equal(standard_labels(BINARY, Y), Y)


def test_moments_are_those_of_the_ratings() -> None:
    assert label_moments(SCHEMA) == (None, (3.5, 0.25), (40.0, 900.0))
    assert label_moments(BINARY) == ()


def test_ratings_without_moments_are_refused() -> None:
    schema = Schema(features=FEATURES, labels=LABELS, label_kinds={"minutes": "rating"})
    for call in (label_losses, lambda s, y, z: predictions(s, z)):
        with pytest.raises(ValueError, match="`minutes`: mean and variance are not known"):
            call(schema, tf.constant(Y), tf.constant(Z))


def test_what_is_there_and_what_it_counts() -> None:
    labels, weights = present(tf.constant(Y))
    np.testing.assert_array_equal(labels, np.nan_to_num(Y))
    np.testing.assert_array_equal(weights, ~np.isnan(Y))
    given = np.full(Y.shape, 0.5, np.float32)
    np.testing.assert_array_equal(present(tf.constant(Y), given)[1], 0.5 * ~np.isnan(Y))
    np.testing.assert_array_equal(weighted([0.0, 2.0], tf.constant([np.inf, 3.0])), [0, 6])


@pytest.mark.parametrize(
    ("distance", "of_rating"),
    [
        ("soft_labels", lambda t, s: (t - s) ** 2),
        ("logit_mse", lambda t, s: (t - s) ** 2 / 9),
        ("probability_mse", lambda t, s: (t - s) ** 2),
    ],
)
def test_distances_of_ratings_are_between_predictions(distance: Any, of_rating: Any) -> None:
    t, s = np.random.default_rng(0).normal(size=(2, 5, 2))
    found = distillation(
        tf.constant(t), tf.constant(s), distance, temperature=3.0, kinds=("rating", "binary")
    )
    np.testing.assert_allclose(found[:, 0], of_rating(t, s)[:, 0], rtol=1e-9)
    binary = distillation(tf.constant(t), tf.constant(s), distance, temperature=3.0)
    np.testing.assert_array_equal(found[:, 1], binary[:, 1])


def test_the_inner_loop_steps_down_each_label_s_own_loss() -> None:
    rng = np.random.default_rng(3)
    tower = Tower(3, (4,), activation="tanh", seed=1, dtype="float64")
    moments = label_moments(SCHEMA)
    loop = InnerLoop(steps=2, step_size=0.05, label_moments=moments, dtype="float64")
    h = tf.constant(rng.normal(size=(1, 4, 5)))
    labels, weights = present(tf.constant(Y, tf.float64))
    query = tf.constant(rng.normal(size=(1, 6, 5)))
    support = Support(h, labels[None], weights[None])
    found = tower(query, correction=loop.adapt(tower, support)).logits
    share = weights / tf.reduce_sum(weights, 0)
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(share * elementwise(moments, labels, tower(h[0]).logits))
        for v, g in zip(
            tower.trainable_variables,
            tape.gradient(loss, tower.trainable_variables),
            strict=True,
        ):
            v.assign_sub(0.05 * g)
    np.testing.assert_allclose(found, tower(query).logits, atol=1e-9)
    again = InnerLoop.from_config(loop.get_config())
    assert again.label_moments == moments
