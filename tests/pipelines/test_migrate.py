"""Experts and tables taken from a trained model of one domain."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from qianmo.configs.base import base_config
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.models.ranker import Ranker, Weight
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.recipe import Migration, Recipe
from qianmo.pipelines.training import migrate
from qianmo.pipelines.training.preparing import completed
from qianmo.pipelines.training.run import Run, train

SCENES = (1, 4)
# By whether scene 4 owns a feature: its experts are layers of their own then.
OWN = {False: "bottom/bottom/own/bottom/networks/0/1", True: "bottom/bottom/own/experts/1/bottom"}
THERE = {False: "bottom/networks/0", True: "bottom"}
LABELS = ("click", "like")


def write(file: pathlib.Path, scenes: tuple[int, ...], users: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    count = 800
    user = random.integers(0, users, count)
    columns = {
        "scene": random.choice(scenes, count),
        "user": user,
        "seen": [random.integers(0, 30, random.integers(0, 4)).tolist() for _ in range(count)],
        "age": random.normal(seed, 1 + seed, count).astype(np.float32),
    }
    if scenes == (4,):
        columns["topic"] = random.integers(0, 5, count)
    for place, label in enumerate(LABELS):
        columns[label] = ((user + place) % 3 == 0).astype(np.int64)
    pq.write_table(pa.table(columns), file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "all").mkdir()
    write(folder / "all" / "scene_1.parquet", (1,), 60, 1)
    write(folder / "all" / "scene_4.parquet", (4,), 40, 2)
    write(folder / "old.parquet", (4,), 50, 3)  # has users that scene 4 lost since
    return folder


def recipe(data: pathlib.Path, model: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = base_config().to_dict()
    features: list[dict[str, Any]] = [
        {"name": "scene", "vocabulary": SCENES, "dim": 4},
        {"name": "user", "dim": 4, "side": "user"},
        {"name": "topic", "dim": 4, "domains": (4,)},
        {"name": "seen", "dim": 4, "max_length": 3},
        {"kind": "dense", "name": "age"},
    ]
    left_out = changes.pop("left_out", ())
    config["schema"] = {
        "features": [f for f in features if f["name"] not in left_out],
        "labels": LABELS,
        "domain": "scene",
    }
    if "scene" in left_out:
        for feature in config["schema"]["features"]:
            feature.pop("domains", None)
    config["data"]["train"] = str(data / changes.pop("rows"))
    config["model"] = {"embedding_stddev": 0.3, **model}
    config["train"] |= {"epochs": 1, "batch_size": 100, **changes}
    return config


@pytest.fixture(scope="module", params=[False, True], ids=["stacked", "owned"])
def case(request: Any, data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Whether scene 4 owns a feature, its trained model's directory, and the whole's recipe."""
    owned = request.param
    folder = tmp_path_factory.mktemp("single") / "model"
    single = {"name": "mlp", "units": (6, 4), "tower_units": (3,), "dropout": 0.1}
    left_out = ("scene",) if owned else ("scene", "topic")
    config = recipe(data, single, rows="old.parquet", left_out=left_out, seed=5)
    train(Recipe.from_config(config), folder)
    whole = {"name": "cross_domain", "expert_units": (6, 4), "tower_units": (3,), "dropout": 0.1}
    config = recipe(data, whole, rows="all", left_out=() if owned else ("topic",))
    config["migrate"]["scene_4"] = {
        "model_dir": str(folder),
        "weights": {OWN[owned]: THERE[owned], "tower": "tower"},
        "domain": 4,
    }
    return owned, folder, config


def changed(config: dict[str, Any], **changes: Any) -> Recipe:
    entry = {**config["migrate"]["scene_4"], **changes}
    return Recipe.from_config({**config, "migrate": {"scene_4": entry}})


def begin(recipe: Recipe) -> tuple[Recipe, Ranker]:
    whole = completed(recipe)
    model = run_dir.build(whole)
    migrate.start(whole, model)
    return whole, model


def some_rows(model: Ranker, data: pathlib.Path, scene: int) -> dict[str, tf.Tensor]:
    schema = dataclasses.replace(model.schema, only_domains=(scene,))
    return next(iter(readers.dataset(schema, data / "all", batch_size=300)))[0]


def test_scores_are_equal_before_the_first_step(
    case: Any, data: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    owned, folder, config = case
    run = Run(Recipe.from_config(config), tmp_path / "model")
    printed = capsys.readouterr().out
    assert "largest difference of logits before the first step: 0.0e+00" in printed
    assert f"{OWN[owned]}/" in printed
    assert f"/kernel [{8 + 4 * owned + 1}, 6] <- {THERE[owned]}/" in printed
    assert "tower/leaves/0/kernels starts as it would" in printed
    assert "table user: 50 of 60 values" in printed
    # By the parts alone, without the gate that the comparison moves.
    other, _ = run_dir.load(folder)
    features = some_rows(run.model, data, 4)
    embedded = run.model.embed(run.model.encode(features))
    own = run.model.bottom.bottom.own(embedded)
    h = tf.concat([own, tf.fill([own.shape[0], 1], 2.0)], 1)
    expected = other(features)["model"]
    assert len(np.unique(expected)) > 50
    np.testing.assert_array_equal(run.model.tower(h).logits, expected)
    assert run.model.bottom.bottom.gate.only is None  # the gate is as it was


def test_tables_are_taken_by_raw_value(case: Any, data: pathlib.Path) -> None:
    _, folder, config = case
    whole, model = begin(Recipe.from_config(config))
    other, _ = run_dir.load(folder)
    mine, theirs = (m.schema.tables["user"].vocabulary or () for m in (model, other))
    assert set(theirs) <= set(mine)  # of which the last ten are lost in scene 4's rows of today
    values, first, end = model.embed.rows("user")
    source, start, _ = other.embed.rows("user")
    for row, value in enumerate(mine, 1):
        expected = source[start + (theirs.index(value) + 1 if value in theirs else 0)]
        np.testing.assert_array_equal(values[first + row], expected)
    assert end - first == len(mine) + 1
    scene, first, end = model.embed.rows("scene")
    untouched, _, _ = run_dir.build(whole).embed.rows("scene")
    np.testing.assert_array_equal(scene[first:end], untouched[first:end])
    ages = [m.schema.dense[0] for m in (model, other)]
    assert (ages[0].mean, ages[0].variance) == (ages[1].mean, ages[1].variance)


def test_what_was_taken_is_frozen_slow_or_free(
    case: Any, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    owned, _, config = case
    sgd = {"name": "sgd", "learning_rate": 0.5}
    config = {**config, "train": {**config["train"], "optimizer": sgd}}
    moves = {}
    for factor in (0.0, 0.25, 1.0):
        run = Run(changed(config, learning_rate_factor=factor), tmp_path / str(factor))
        (plan,) = migrate.plans(run.recipe, run.model)
        before = [weight.value.numpy() for _, weight, _, _ in plan.weights]
        gate = run.model.bottom.bottom.gate.dense.kernel
        was = gate.numpy()
        step = run.model.train_step if owned else tf.function(run.model.train_step)
        step(next(iter(run._dataset(0, 0))))
        assert (gate.numpy() != was).any()
        pairs = zip(plan.weights, before, strict=True)
        moves[factor] = [weight.value.numpy() - value for (_, weight, _, _), value in pairs]
    assert not any(move.any() for move in moves[0.0])
    for slow, free in zip(moves[0.25], moves[1.0], strict=True):
        assert free.any()
        np.testing.assert_allclose(slow, 0.25 * free, rtol=1e-3, atol=1e-6)


def test_a_place_of_stacked_weights_is_assigned_under_any_policy() -> None:
    layer = DomainMLP(2, (3,), dtype="mixed_bfloat16")
    layer((tf.zeros([1, 4]), tf.constant([1])))
    Weight(layer.kernels[0], 1).assign(tf.fill([4, 3], 0.3))
    np.testing.assert_array_equal(layer.kernels[0][1], np.full([4, 3], 0.3, np.float32))
    assert (layer.kernels[0][0].numpy() != 0.3).all()


@pytest.mark.parametrize("case", [False], ids=["stacked"], indirect=True)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"bottom/own": "bottom"}}, r"bottom holds no `own`; it holds before, bottom"),
        ({"weights": {"tower": "bottom"}}, r"bottom/.* has no place here: tower/.* is missing"),
        ({"weights": {"tower/head/bias": "tower/mlp/_layers/0/bias"}}, r"is \[2\], and .* \[3\]"),
        (
            {"weights": {"tower": "tower", "tower/head": "tower/head"}},
            "`migrate.scene_4` and `migrate.scene_4` both start tower/head",
        ),
        ({"tables": ("scene",)}, "table `scene` should be in both models"),
        ({"model_dir": "nowhere"}, r"nowhere holds no recipe\.json"),
        ({"weights": {}}, "`weights` should map places"),
        ({"learning_rate_factor": -1.0}, "`learning_rate_factor` should be >= 0"),
        ({"factor": 1.0}, "config.migrate.scene_4: unknown key `factor`"),
    ],
)
def test_refusals(case: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        begin(changed(case[2], **changes))  # a wrong entry, or one that does not fit


@pytest.mark.parametrize("case", [False], ids=["stacked"], indirect=True)
def test_where_no_scores_can_be_compared_labels_and_features_are(case: Any) -> None:
    config = case[2]
    begin(changed(config, tables=()))
    schema = config["schema"]
    others = {
        r"writes \['click', 'like'\], and this schema has \['like', 'click'\]": {
            **schema,
            "labels": schema["labels"][::-1],
        },
        r"reads \['user', 'seen', 'age'\], and this schema \['age', 'seen', 'user', 'scene'\]": {
            **schema,
            "features": schema["features"][::-1],
        },
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            begin(changed({**config, "schema": other}, tables=()))


def test_scores_that_differ_are_refused(case: Any, data: pathlib.Path) -> None:
    owned, _, config = case
    whole = completed(Recipe.from_config(config))
    model = run_dir.build(whole)
    (plan,) = migrate.plans(whole, model)
    migrate.take(model, plan)
    assert migrate.compare(whole, model, plan) == ("logits", 0.0)
    plan.weights[0][1].assign(plan.weights[0][1].value + 0.1)
    with pytest.raises(ValueError, match=r"before the first step logits differ by .* from those"):
        migrate.compare(whole, model, plan)
    if owned:  # features in another order have the same shapes
        features = config["schema"]["features"]
        swapped = [features[i] for i in (0, 2, 1, 3, 4)]
        other = Recipe.from_config({**config, "schema": {**config["schema"], "features": swapped}})
        with pytest.raises(ValueError, match=r"logits differ by"):
            begin(other)
    without = dataclasses.replace(plan, tables={})
    assert migrate.compare(whole, model, without) is None
    assert isinstance(whole.migrate["scene_4"], Migration)
    assert run_dir.plain(Recipe.from_config(whole.to_config()).to_config()) == run_dir.plain(
        whole.to_config()
    )
