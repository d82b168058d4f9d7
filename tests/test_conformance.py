"""What every layer owes: see the table in `conformance.py`."""

from __future__ import annotations

import importlib
import inspect
import json
import pathlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conformance import BATCH, CASES, EXEMPT, PACKAGES, Case

every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def default_policy() -> Iterator[None]:
    yield
    tf_keras.mixed_precision.set_global_policy("float32")


def tensors(inputs: Any, dtype: tf.DType = tf.float32) -> Any:
    """The inputs as tensors, floats in `dtype`."""
    made = tf.nest.map_structure(tf.convert_to_tensor, inputs)
    return tf.nest.map_structure(lambda x: tf.cast(x, dtype) if x.dtype.is_floating else x, made)


def assert_equal(actual: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Same structure, dtypes and (within the tolerance) values."""
    tf.nest.assert_same_structure(actual, expected)
    for a, e in zip(tf.nest.flatten(actual), tf.nest.flatten(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a.numpy(), e.numpy(), rtol=rtol, atol=atol)


def randomise(layer: tf_keras.layers.Layer) -> None:
    """Moves the weights away from zeros and ones, where errors could hide."""
    random = np.random.default_rng(5)
    for weight in layer.trainable_weights:
        weight.assign_add(tf.cast(0.3 * random.normal(size=weight.shape), weight.dtype))


@tf_keras.utils.register_keras_serializable(package="conformance")
class Packed(tf_keras.layers.Layer):
    """Gives a functional model flat inputs and outputs, whatever its layer takes and returns."""

    def __init__(self, case: str, layer: tf_keras.layers.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.case = case
        self.layer = layer

    def call(self, leaves: dict[str, tf.Tensor]) -> list[tf.Tensor]:
        structure = CASES[self.case].inputs()
        packed = tf.nest.pack_sequence_as(structure, tf.nest.flatten(leaves))
        return tf.nest.flatten(self.layer(packed))

    def get_config(self) -> dict[str, Any]:
        layer = tf_keras.layers.serialize(self.layer)
        return {**super().get_config(), "case": self.case, "layer": layer}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Packed:
        return cls(**{**config, "layer": tf_keras.layers.deserialize(config["layer"])})


@every_case
def test_config_through_json_rebuilds_the_layer(name: str) -> None:
    case = CASES[name]
    x = tensors(case.inputs())
    layer = case.make()
    expected = layer(x)
    randomise(layer)
    expected = layer(x)

    described = json.loads(json.dumps(tf_keras.layers.serialize(layer)))
    assert described["registered_name"].startswith("qianmo>")
    again = tf_keras.layers.deserialize(described)
    assert type(again) is type(layer)
    again(x)
    again.set_weights(layer.get_weights())

    assert_equal(again(x), expected)
    assert json.dumps(again.get_config()) == json.dumps(layer.get_config())


@every_case
def test_config_holds_every_argument(name: str) -> None:
    layer = CASES[name].make()
    arguments = inspect.signature(type(layer).__init__).parameters.keys()
    of_keras = inspect.signature(tf_keras.layers.Layer.__init__).parameters.keys()
    assert arguments - of_keras <= layer.get_config().keys()


@every_case
def test_keras_file_gives_the_same_outputs(name: str, tmp_path: pathlib.Path) -> None:
    case = CASES[name]
    # The names sort in the order of the leaves, as Keras flattens dicts by sorted keys.
    leaves = {f"x{i:03}": x for i, x in enumerate(tf.nest.flatten(tensors(case.inputs())))}
    layer = case.make()
    inputs = {
        key: tf_keras.Input(x.shape[1:], name=key, dtype=x.dtype) for key, x in leaves.items()
    }
    model = tf_keras.Model(inputs, Packed(name, layer)(inputs))
    randomise(layer)
    expected = tf.nest.flatten(model(leaves))

    model.save(tmp_path / "model.keras")
    loaded = tf_keras.models.load_model(tmp_path / "model.keras")
    assert_equal(tf.nest.flatten(loaded(leaves)), expected)


@every_case
def test_saved_model_gives_the_same_outputs(name: str, tmp_path: pathlib.Path) -> None:
    x = tensors(CASES[name].inputs())
    module = tf.Module()
    module.layer = CASES[name].make()
    module.layer(x)
    randomise(module.layer)
    module.serve = tf.function(
        lambda *leaves: tf.nest.flatten(module.layer(tf.nest.pack_sequence_as(x, leaves))),
        input_signature=[tf.TensorSpec([None, *t.shape[1:]], t.dtype) for t in tf.nest.flatten(x)],
    )

    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    expected = tf.nest.flatten(module.layer(x))
    assert_equal(loaded.serve(*tf.nest.flatten(x)), expected, rtol=1e-6, atol=1e-6)


@every_case
def test_graph_of_unknown_batch_size_equals_eager(name: str) -> None:
    case = CASES[name]
    layer = case.make()
    x = tensors(case.inputs())
    expected = layer(x)
    signature = tf.nest.map_structure(lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype), x)
    graph = tf.function(lambda x: layer(x), input_signature=[signature])

    assert_equal(graph(x), expected, rtol=1e-6, atol=1e-6)
    first = tf.nest.map_structure(lambda t: t[: BATCH // 2], x)
    assert_equal(graph(first), layer(first), rtol=1e-6, atol=1e-6)


@every_case
def test_bfloat16_policy(name: str) -> None:
    case = CASES[name]
    x = tensors(case.inputs())
    exact = case.make()
    expected = tf.nest.flatten(exact(x))
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    layer = case.make()
    actual = tf.nest.flatten(layer(x))
    layer.set_weights(exact.get_weights())
    actual = tf.nest.flatten(layer(x))

    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        narrows = e.dtype.is_floating and index not in case.float32_outputs
        assert a.dtype == (tf.bfloat16 if narrows else e.dtype)
        scale = float(np.abs(e.numpy()).max(initial=1.0))
        error = np.abs(tf.cast(a, tf.float64).numpy() - tf.cast(e, tf.float64).numpy())
        assert error.max(initial=0.0) <= 0.05 * scale
    assert all(w.dtype == tf.float32 for w in layer.trainable_weights)


def derivatives(case: Case) -> Iterator[tuple[str, float, float]]:
    """Name, automatic and central-difference derivative along a random direction of each tensor."""
    tf_keras.mixed_precision.set_global_policy("float64")
    random = np.random.default_rng(7)
    layer = case.make()
    x = tensors(case.inputs(), tf.float64)
    layer(x)
    randomise(layer)
    leaves = [tf.Variable(t) if t.dtype.is_floating else t for t in tf.nest.flatten(x)]
    cotangents = [
        random.normal(size=y.shape) if y.dtype.is_floating else None
        for y in tf.nest.flatten(layer(x))
    ]

    @tf.function
    def loss() -> tf.Tensor:
        outputs = tf.nest.flatten(layer(tf.nest.pack_sequence_as(x, leaves)))
        pairs = zip(outputs, cotangents, strict=True)
        return tf.add_n([tf.reduce_sum(y * c) for y, c in pairs if c is not None])

    variables = [v for v in leaves if isinstance(v, tf.Variable)] + layer.trainable_weights
    with tf.GradientTape() as tape:
        value = loss()
    step = 1e-6
    for variable, gradient in zip(variables, tape.gradient(value, variables), strict=True):
        direction = random.normal(size=variable.shape)
        if gradient is None:  # an input that the layer does not read
            assert any(variable is v for v in leaves), f"{variable.name} gets no gradient"
            gradient = tf.zeros_like(variable)
        automatic = float(tf.reduce_sum(tf.convert_to_tensor(gradient) * direction))
        variable.assign_add(step * direction)
        above = float(loss())
        variable.assign_sub(2 * step * direction)
        below = float(loss())
        variable.assign_add(step * direction)
        yield variable.name, automatic, (above - below) / (2 * step)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.smooth])
def test_gradients_equal_finite_differences(name: str) -> None:
    for variable, automatic, numeric in derivatives(CASES[name]):
        assert np.isfinite(automatic)
        error = abs(automatic - numeric) / max(abs(automatic), abs(numeric), 1e-3)
        assert error < 1e-5, f"{variable}: {automatic} against {numeric}"


def public_layers() -> set[type[tf_keras.layers.Layer]]:
    """Layer classes that a module of `PACKAGES` defines under a public name."""
    found = set()
    for package in PACKAGES:
        for module in pkgutil.walk_packages(
            importlib.import_module(package).__path__, package + "."
        ):
            for name, cls in inspect.getmembers(
                importlib.import_module(module.name), inspect.isclass
            ):
                is_own = cls.__module__ == module.name and not name.startswith("_")
                if is_own and issubclass(cls, tf_keras.layers.Layer):
                    found.add(cls)
    return found


def test_every_public_layer_is_in_the_table() -> None:
    classes = {f"{cls.__module__}.{cls.__name__}" for cls in public_layers()}
    in_table = {
        f"{cls.__module__}.{cls.__name__}" for cls in (type(c.make()) for c in CASES.values())
    }
    missing = classes - in_table - EXEMPT.keys()
    assert not missing, f"add a row to tests/conformance.py for {sorted(missing)}"
    assert EXEMPT.keys() <= classes - in_table, "an exemption names no layer, or one in the table"


def test_every_public_layer_is_registered() -> None:
    for cls in public_layers():
        assert tf_keras.utils.get_registered_name(cls) == f"qianmo>{cls.__name__}"
