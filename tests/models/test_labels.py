"""Ratings, label weights and labels that a row lacks, in the models' losses and answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=6, dim=4, side="user"),
        Categorical(name="item", num_ids=8, dim=4, side="item"),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click", "stars"),
    label_kinds={"stars": "rating"},
    label_moments={"stars": (3.0, 1.44)},
    task_id="user",
    timestamp="time",
)
WEIGHTED = dataclasses.replace(SCHEMA, label_weights={"click": 2.0, "stars": "seconds"})
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "units": (6,)},
    "mmoe": {"name": "mmoe", "num_experts": 2, "expert_units": (6,), "tower_units": (4,)},
    "dual_dnn": {
        "name": "dual_dnn",
        "interactions": {"fm": {}},
        "teacher_units": (6,),
        "student_units": (4,),
        "kd_weight": 0.5,
        "hint_weight": 0.1,
    },
    "meta": {
        "name": "mlp",
        "units": (6,),
        "seam_dim": 5,
        "tower_units": (4,),
        "meta": {"inner": {"steps": 1, "step_size": 0.1}},
    },
}
every_model = pytest.mark.parametrize("name", MODELS)


def rows(count: int = 40) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(2)
    features = {
        "user": rng.integers(0, 6, count),
        "item": rng.integers(0, 8, count),
        "price": rng.normal(size=count).astype(np.float32),
    }
    stars = 3 + np.sin(features["item"]) + features["price"]
    targets = {
        "labels": np.stack([rng.integers(0, 2, count), stars], 1).astype(np.float32),
        "weight": np.ones(count, np.float32),
        "task_id": features["user"],
        "timestamp": np.arange(count),
    }
    return tf.nest.map_structure(tf.constant, (features, targets))


def built(name: str, schema: Schema = SCHEMA) -> Any:
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(schema, {"embedding_stddev": 0.5, **MODELS[name]})
    model.build()
    model.compile(*(tf_keras.optimizers.SGD(0.1) for _ in range(3)))
    return model


def moved(name: str, schema: Schema, targets: dict[str, Any]) -> list[Any]:
    """The weights after a step."""
    model = built(name, schema)
    model.train_step((rows()[0], targets))
    return [v.numpy() for v in model.trainable_variables]


@every_model
def test_ratings_are_learned_and_predicted_in_their_units(name: str) -> None:
    model = built(name)
    model.compile(*(tf_keras.optimizers.Adam(0.02) for _ in range(3)))
    data = tf.data.Dataset.from_tensors(rows()).repeat(150)
    model.fit(data, epochs=1, steps_per_epoch=150, verbose=0)
    features, targets = rows()
    found = model.predict_step((features, targets))
    logits = model(features)
    stars = targets["labels"].numpy()[:, 1]
    for head in model.head_names:
        np.testing.assert_array_equal(found[head][:, 0], tf.sigmoid(logits[head][:, 0]))
        np.testing.assert_allclose(found[head][:, 1], 3 + 1.2 * logits[head][:, 1], rtol=1e-5)
        # A constant is off by the labels' deviation.
        assert np.sqrt(np.mean((found[head][:, 1] - stars) ** 2)) < 0.6 * stars.std()


@every_model
def test_a_label_of_weight_0_is_one_that_the_row_does_not_have(name: str) -> None:
    _, targets = rows()
    weights = np.random.default_rng(4).uniform(0.5, 2, (40, 2)).astype(np.float32)
    weights[::3, 1], weights[::5, 0] = 0, 0
    absent = np.where(weights > 0, targets["labels"], np.nan)
    first = moved(name, WEIGHTED, {**targets, "label_weights": tf.constant(weights)})
    second = moved(
        name,
        WEIGHTED,
        {**targets, "labels": tf.constant(absent), "label_weights": tf.ones([40, 2])},
    )
    third = moved(
        name,
        WEIGHTED,
        {**targets, "labels": tf.constant(absent), "label_weights": tf.constant(weights)},
    )
    for a, b in zip(first, third, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(np.isfinite(values).all() for values in first)


def test_label_weights_multiply_the_labels_losses() -> None:
    model = built("dual_dnn", WEIGHTED)
    features, targets = rows()
    weights = np.random.default_rng(4).uniform(0, 2, (40, 2)).astype(np.float32)
    targets["label_weights"] = tf.constant(weights)
    embedded = model.embed(model.encode(features))
    heads = model.heads(embedded, model.head_names)
    terms = model.loss_terms(heads, targets)
    y = targets["labels"].numpy()
    z = {head: output.logits.numpy() for head, output in heads.items()}

    def expected(logits: Any) -> Any:
        click = np.logaddexp(0, logits[:, 0]) - y[:, 0] * logits[:, 0]
        stars = (logits[:, 1] - (y[:, 1] - 3) / 1.2) ** 2
        return weights[:, 0] * click + weights[:, 1] * stars

    np.testing.assert_allclose(terms["student_loss"], expected(z["student"]), rtol=1e-4)
    np.testing.assert_allclose(terms["teacher_loss"], expected(z["teacher"]), rtol=1e-4)
    p, q = (1 / (1 + np.exp(-z[head][:, 0])) for head in ("teacher", "student"))
    stars = (z["teacher"][:, 1] - z["student"][:, 1]) ** 2
    distance = 0.5 * (weights[:, 0] * (p - q) ** 2 + weights[:, 1] * stars)
    np.testing.assert_allclose(terms["kd"], distance, rtol=1e-4)


def test_weights_that_are_declared_and_not_there_are_refused() -> None:
    model = built("mlp", WEIGHTED)
    with pytest.raises(ValueError, match=r"should have `label_weights`.*Received: \['labels', "):
        model.train_step(rows())


def test_a_model_whose_ratings_were_not_counted_is_refused() -> None:
    schema = dataclasses.replace(SCHEMA, label_moments={})
    model = zoo.build(schema, MODELS["mlp"])
    with pytest.raises(ValueError, match="`stars`: mean and variance are not known"):
        model.predict_step(rows()[0])
    with pytest.raises(ValueError, match="`stars`: mean and variance are not known"):
        zoo.build(schema, MODELS["meta"])


def test_a_rating_is_no_label_of_a_two_tower_model() -> None:
    schema = dataclasses.replace(SCHEMA, labels=("stars",))
    with pytest.raises(ValueError, match="Received: `stars`, a rating"):
        zoo.build(schema, {"name": "two_tower", "item_id": "item"})
