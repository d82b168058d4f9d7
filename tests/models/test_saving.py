"""Every model of the zoo through a `.keras` file and a SavedModel, as a Keras user saves it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
import zoo_cases
from zoo_cases import CONFIGS, batch, schema_of, tensors

from qianmo.layers.features import Dense
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.models import zoo

META: dict[str, Any] = {
    "inner": {"steps": 2, "rates": "rank_one", "shrinkage": 3.0},
    "split": "random",
    "support_sizes": (1, 2),
}
RATED = dataclasses.replace(
    zoo_cases.SCHEMA,
    label_kinds={"like": "rating"},
    label_moments={"like": (3.5, 1.5)},
    label_weights={"like": 2.0},
)
OF_DOMAINS = dataclasses.replace(
    zoo_cases.SIDES,
    features=(
        *zoo_cases.SIDES.features,
        dataclasses.replace(zoo_cases.SCHEMA.features[2], side="item"),
    ),
    domain="scene",
)
# case -> schema and config
CASES: dict[str, tuple[Schema, dict[str, Any]]] = {
    **{name: (schema_of(name), config) for name, config in CONFIGS.items()},
    "meta": (zoo_cases.SCHEMA, {**CONFIGS["mlp"], "seam_dim": 5, "meta": META}),
    "lr of ids alone, with meta": (
        dataclasses.replace(zoo_cases.SCHEMA, features=zoo_cases.SCHEMA.features[2:5:2]),
        {"name": "lr", "meta": META},
    ),
    "dual_dnn with meta": (zoo_cases.SCHEMA, {**CONFIGS["dual_dnn"], "meta": META}),
    "star with norm and meta": (
        zoo_cases.SCHEMA,
        {**CONFIGS["star"], "norm": True, "dropout": 0.5, "meta": META},
    ),
    "ratings": (RATED, {**CONFIGS["mmoe"], "meta": META}),
    "two_tower with meta": (zoo_cases.SIDES, {**CONFIGS["two_tower"], "meta": META}),
    "two_tower of domains": (OF_DOMAINS, {**CONFIGS["two_tower"], "num_shared": 1}),
}


@pytest.fixture(autouse=True)
def default_policy() -> Iterator[None]:
    yield
    tf_keras.mixed_precision.set_global_policy("float32")


def trained(name: str) -> tuple[Any, dict[str, tf.Tensor], dict[str, tf.Tensor]]:
    """A model that was compiled and took a step, so that nothing stands at its start."""
    schema, config = CASES[name]
    model = zoo_cases.built(schema, config)
    features, targets = batch(schema)
    targets["label_weights"] = np.ones_like(targets["labels"])
    model.compile(tf_keras.optimizers.Adam(0.01), SparseAdam(0.01), tf_keras.optimizers.Adam(0.01))
    model.train_step((tensors(features), tensors(targets)))
    return model, tensors(features), tensors(targets)


def weights(model: Any) -> list[Any]:
    """The model's variables without those of its running means."""
    of_means = {v.ref() for mean in model.metrics for v in mean.variables}
    return [v.numpy() for v in model.variables if v.ref() not in of_means]


@pytest.mark.parametrize("name", CASES)
def test_a_keras_file_holds_the_whole_model(name: str, tmp_path: pathlib.Path) -> None:
    model, features, targets = trained(name)
    model.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert type(loaded) is type(model)
    assert loaded.schema == model.schema
    for ours, theirs in zip(weights(loaded), weights(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    expected, found = model(features), loaded(features)
    assert expected.keys() == found.keys()
    for head, logits in expected.items():
        np.testing.assert_array_equal(found[head], logits)
    # What it learns by is there too: a step on equal optimisers moves it as it moves the first.
    for one in (model, loaded):
        one.compile(*(tf_keras.optimizers.SGD(0.1) for _ in range(3)))
        one.train_step((features, targets))
    for ours, theirs in zip(weights(loaded), weights(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert loaded.ranker_config() == model.ranker_config()


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_of_keras_answers_as_the_model(name: str, tmp_path: pathlib.Path) -> None:
    model, features, _ = trained(name)
    model.save(tmp_path / "model", save_format="tf")
    loaded = tf_keras.models.load_model(tmp_path / "model", compile=False)
    found = loaded(features)
    for head, logits in model(features).items():
        # A graph may regroup sums: within float32 rounding of logits that are below 100.
        np.testing.assert_allclose(found[head], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["keras", "tf"])
def test_a_compiled_model_is_loaded_to_be_compiled_again(form: str, tmp_path: pathlib.Path) -> None:
    model, features, targets = trained("dual_dnn with meta")
    path = tmp_path / ("model.keras" if form == "keras" else "model")
    model.save(path, save_format=form)
    loaded = tf_keras.models.load_model(path)
    np.testing.assert_allclose(
        loaded(features)["student"], model(features)["student"], rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match="`table_optimizer` should be"):
        loaded.compile(tf_keras.optimizers.SGD(0.1))
    loaded.compile(*(tf_keras.optimizers.SGD(0.1) for _ in range(3)))
    assert np.isfinite(loaded.train_step((features, targets))["loss"])


def test_a_file_keeps_its_dtype_policy(tmp_path: pathlib.Path) -> None:
    """In a process of any policy."""
    schema, config = CASES["meta"]
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = zoo_cases.built(schema, config)
    features = tensors(batch(schema)[0])
    expected = model(features)["model"]
    model.save(tmp_path / "model.keras")
    tf_keras.mixed_precision.set_global_policy("float32")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(features)["model"], expected)
    exact = zoo_cases.built(schema, config)
    exact.set_weights(model.get_weights())
    assert np.abs(exact(features)["model"] - expected).max() > 1e-4


def test_raw_numbers_are_standardised_before_they_narrow() -> None:
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    schema = Schema(features=(Dense(name="price", mean=1000.0, variance=1.0),), labels=("y",))
    model = zoo.build(schema, {"name": "mlp", "units": ()})
    model.build()
    model.tower.head.kernel.assign([[1.0]])
    assert model({"price": tf.constant([1001.0, 1003.0])})["model"].numpy().tolist() == [[1], [3]]
