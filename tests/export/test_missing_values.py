"""Rows without dense values, and domains by name, in served graphs."""

import numpy as np
import pytest
import tensorflow as tf

from qianmo.export.saved_model import export_fed, export_in_graph, session
from qianmo.export.support_rows import FeatureRows
from qianmo.layers.encode import BAD_DENSE
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo

SCHEMA = Schema(
    features=(
        Categorical(name="scene", dtype="string", vocabulary=("home", "search"), dim=4),
        Categorical(name="user", num_ids=20, dim=4),
        Dense(name="price", mean=1.0, variance=2.0, indicator=True),
        Dense(name="age", mean=30.0, variance=90.0, default=18.0),
        Dense(name="depth", mean=2.0, variance=1.0, domains=("search",), indicator=True),
    ),
    labels=("click",),
    domain="scene",
)


def rows(count: int = 60) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    found = {
        "scene": random.choice(np.array([b"home", b"search", b"x"], object), count),
        "user": random.integers(0, 25, count),
    }
    for name in ("price", "age", "depth"):
        values = random.normal(size=count).astype(np.float32)
        found[name] = np.where(random.random(count) < 0.4, np.float32(np.nan), values)
    return found


@pytest.fixture(scope="module")
def model():
    made = zoo.build(SCHEMA, {"name": "mlp", "units": (8,), "embedding_stddev": 0.5})
    made.build()
    return made


@pytest.mark.parametrize("export", [export_in_graph, export_fed])
def test_nan_on_the_wire_is_no_value(model, tmp_path, export):
    inputs = rows()
    folder, worst = export(model, tmp_path / "m", inputs)  # which compares with the Keras model
    assert worst <= 1e-6
    if export is export_in_graph:
        with session(folder) as run:
            given = run("serving_default", inputs)
            infinite = {**inputs, "age": np.full(60, np.inf, np.float32)}
            bad = run("serving_default", infinite)
        assert given["status"].tolist() == [0] * 60
        assert bad["status"].tolist() == [BAD_DENSE] * 60


def test_the_score_depends_on_whether_there_is_a_value(model):
    """The mean and no value differ where an indicator tells them apart, the default does not."""
    one = {name: column[:1] for name, column in rows().items()}
    one["scene"] = np.array([b"search"], object)

    def score(**changes: float) -> float:
        changed = {name: np.float32([value]) for name, value in changes.items()}
        inputs = {name: tf.constant(column) for name, column in {**one, **changed}.items()}
        return float(model.probabilities(inputs)["model"][0, 0])

    assert score(price=np.nan) != score(price=1.0)
    assert score(depth=np.nan) != score(depth=2.0)
    assert score(age=np.nan) == score(age=18.0) != score(age=30.0)


def test_support_rows_hold_the_indicators(model):
    found = FeatureRows(model)
    inputs = {name: tf.constant(column) for name, column in rows().items()}
    packed, _ = found.pack(inputs)
    assert packed.shape == (60, found.dim)
    h = found.hidden(packed[None])[0]
    np.testing.assert_array_equal(h, model.tower_input(inputs, model.serving_head))
