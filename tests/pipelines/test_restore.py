"""Weights of one model for another: matched by what they mean, or refused by name."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.training import restore
from qianmo.pipelines.training.preparing import in_order_of

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=7, dim=4),
        Categorical(name="item", num_ids=7, dim=4),
        Dense(name="price", mean=0.0, variance=1.0),
        Dense(name="age", mean=1.0, variance=4.0),
    ),
    labels=("y", "z"),
)
MLP = {"name": "mlp", "units": (6,), "tower_units": (5,)}
DUAL = {
    "name": "dual_dnn",
    "interactions": {"fm": {}},
    "teacher_units": (5,),
    "student_units": (3,),
}


def model(schema: Schema = SCHEMA, seed: int = 1, config: object = MLP) -> Ranker:
    tf_keras.utils.set_random_seed(seed)
    made = zoo.build(schema, config)
    made.build()
    return made


def rows(count: int = 9) -> dict[str, tf.Tensor]:
    random = np.random.default_rng(0)
    return {
        "user": tf.constant(random.integers(0, 7, count)),
        "item": tf.constant(random.integers(0, 7, count)),
        "price": tf.constant(random.normal(size=count), tf.float32),
        "age": tf.constant(random.normal(size=count), tf.float32),
    }


def reversed_schema(*, features: bool = False, labels: bool = False) -> Schema:
    return dataclasses.replace(
        SCHEMA,
        features=SCHEMA.features[::-1] if features else SCHEMA.features,
        labels=SCHEMA.labels[::-1] if labels else SCHEMA.labels,
    )


def scores(made: Ranker) -> dict[str, np.ndarray]:
    logits = made(rows())[made.serving_head].numpy()
    return {label: logits[:, k] for k, label in enumerate(made.schema.labels)}


@pytest.mark.parametrize("config", [MLP, DUAL, {"name": "deepfm"}, {"name": "mmoe"}])
@pytest.mark.parametrize(
    ("features", "labels"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_a_recipe_in_another_order_scores_as_before(
    config: object, features: bool, labels: bool
) -> None:
    there = model(config=config)
    schema = in_order_of(reversed_schema(features=features, labels=labels), there.schema)
    here = model(schema, seed=2, config=config)
    restore.take(restore.match(here, there, "runs/day1"))
    found = scores(here)
    for label, expected in scores(there).items():
        np.testing.assert_array_equal(found[label], expected)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (reversed_schema(features=True), "tables in another order"),
        (
            dataclasses.replace(SCHEMA, features=(*SCHEMA.features[:2], *SCHEMA.features[:1:-1])),
            "the features stand in another order",
        ),
        (
            dataclasses.replace(SCHEMA, features=SCHEMA.features[:3]),
            "`bottom`: feature `age` is only there",
        ),
        (
            dataclasses.replace(
                SCHEMA, features=(*SCHEMA.features, Dense(name="new", mean=0.0, variance=1.0))
            ),
            "`bottom`: feature `new` is only here",
        ),
        (
            dataclasses.replace(
                SCHEMA,
                features=(Categorical(name="user", num_ids=8, dim=4), *SCHEMA.features[1:]),
            ),
            "`embed`: table `user`, `num_ids`: 8 and there 7",
        ),
        (
            dataclasses.replace(
                SCHEMA,
                features=(
                    *SCHEMA.features[:-1],
                    dataclasses.replace(SCHEMA.features[-1], mean=9.0),
                ),
            ),
            r"`bottom`: feature `\w+`: .* 9\.0, .* and there",
        ),
        (
            dataclasses.replace(
                SCHEMA, label_kinds={"z": "rating"}, label_moments={"z": (3.0, 1.0)}
            ),
            r"`tower`: label `z`: \('rating', \(3\.0, 1\.0\)\) and there \('binary', None\)",
        ),
        (dataclasses.replace(SCHEMA, labels=("y", "w")), "`tower`: other labels: .*'w', 'z'"),
    ],
)
def test_what_means_something_else_is_refused(schema: Schema, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        restore.match(model(schema), model(), "runs/day1")
    assert "runs/day1" in str(caught.value)
    assert "train.start_except=" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**MLP, "tower_units": (4,)}, r"`tower`: config.units"),
        ({**MLP, "units": (6, 6)}, r"`bottom`: .*units"),
        ({**MLP, "seam_dim": 3}, r"`bottom`: config.seam_dim: 3 and there 0"),
        ({"name": "deepfm", "units": (6,)}, "`embed`: first-order columns: 2 and there 0"),
    ],
)
def test_another_model_is_refused(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore.match(model(config=config), model(), "runs/day1")


def test_an_interaction_in_another_place_is_refused() -> None:
    first = {**DUAL, "interactions": {"fm": {}, "cin": {"units": (3,)}}}
    second = {**DUAL, "interactions": {"cin": {"units": (3,)}, "fm": {}}}
    with pytest.raises(ValueError, match=r"`bottom`: .*interactions\[0\]"):
        restore.match(model(config=second), model(config=first), "runs/day1")


def test_what_may_differ_is_training_alone() -> None:
    here = model(config={**MLP, "dropout": 0.5, "embedding_l2": 0.1}, seed=5)
    there = model()
    found = restore.match(here, there, "runs/day1")
    assert not found.new
    assert not found.left
    restore.take(found)
    for label, expected in scores(there).items():
        np.testing.assert_array_equal(scores(here)[label], expected)


def test_parts_that_are_named_start_new() -> None:
    teacher = {"name": "teacher_alone", "interactions": {"fm": {}}, "teacher_units": (5,)}
    there, here = model(config=teacher), model(config=DUAL, seed=2)
    before = [v.numpy() for v in here.student_tower.variables]
    with pytest.raises(ValueError, match="`student_tower`: not there"):
        restore.match(here, there, "runs/teacher")
    found = restore.match(here, there, "runs/teacher", ("student_tower",))
    restore.take(found)
    for old, now in zip(before, here.student_tower.variables, strict=True):
        np.testing.assert_array_equal(old, now.numpy())
    np.testing.assert_array_equal(here(rows())["teacher"], there(rows())["model"])
    lines = list(found.lines())
    assert lines[0].startswith("Weights from runs/teacher: embed (")
    assert "  starts new: student_tower (not there)" in lines
    with pytest.raises(ValueError, match="neither model has a part `studnt`"):
        restore.match(here, there, "runs/teacher", ("studnt",))
    with pytest.raises(ValueError, match="`student_tower`: not here"):
        restore.match(there, here, "runs/dual")


def test_a_directory_of_another_build_of_the_model_is_refused(tmp_path: pathlib.Path) -> None:
    weights = tf.train.Checkpoint(model=model(config={**MLP, "units": (6, 6)}))
    tf.train.CheckpointManager(weights, str(tmp_path / run_dir.WEIGHTS), max_to_keep=1).save()
    with pytest.raises(ValueError, match="was written by a version of this package"):
        run_dir.restore(model(), tmp_path)
    with pytest.raises(ValueError, match="cannot be read into the model of"):
        run_dir.restore(model(config={**MLP, "units": (6, 6, 6)}), tmp_path)
