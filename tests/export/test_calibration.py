"""Platt scalings: what is fitted on rows, and that every form serves what was fitted."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from served import ROUNDING, close

from qianmo.export.adapted import ADAPT, by_request_specs, export_adapted
from qianmo.export.calibration import MIN_SLOPE, PRIOR_ROWS, Scaling, calibrated, fit
from qianmo.export.personal_towers import export_personal
from qianmo.export.saved_model import domain_input, export_fed, export_in_graph, session
from qianmo.export.shared_support import brought
from qianmo.export.store import export_fed_store, export_store
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import tower_size
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.ops.library import library

DOMAINS, USERS = 3, 12
SCHEMA = Schema(
    features=(Categorical(name="scene", num_ids=DOMAINS, dim=4),),
    labels=("click", "like"),
    domain="scene",
)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def drawn(z: np.ndarray, a: float, b: float, seed: int) -> np.ndarray:
    """Labels whose logits are a z + b."""
    return (np.random.default_rng(seed).random(z.shape) < sigmoid(a * z + b)).astype(float)


def test_the_scalings_that_made_the_labels_are_found_within_their_error() -> None:
    truth = {1: (0.5, -0.7), 2: (1.0, 0.0), 3: (1.6, 0.9)}
    size = 200_000
    z = np.random.default_rng(0).normal(-1, 1.5, (3 * size, 2))
    domain = np.repeat([1, 2, 3], size)
    labels = np.concatenate([drawn(z[domain == d], *truth[d], seed=d) for d in truth])
    labels[::2, 1] = np.nan
    found = fit(SCHEMA, z, labels, domain)
    assert found.a.shape == found.b.shape == (DOMAINS + 1, 2)
    for place, (a, b) in truth.items():
        for label in (0, 1):
            own = (domain == place) & ~np.isnan(labels[:, label])
            x = np.stack([z[own, label], np.ones(own.sum())], 1)
            p = sigmoid(x @ (a, b))
            error = np.sqrt(np.diag(np.linalg.inv((x.T * (p * (1 - p))) @ x)))
            # 4 standard errors, and what a prior of m rows draws away of a distance below 1.2.
            bound = 4 * error + 1.2 * PRIOR_ROWS / own.sum()
            assert abs(found.a[place, label] - a) < bound[0]
            assert abs(found.b[place, label] - b) < bound[1]


def test_a_domain_of_as_many_rows_as_the_prior_goes_half_of_the_way() -> None:
    # Logits of two values, labels of exact rates: the maximum likelihood is known. The domains'
    # slopes are equal and their shifts small, so that the objective is nearly quadratic.
    def rows(count: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
        z = np.repeat([-1.0, 1.0], count // 2)
        return z, sigmoid(z + shift)  # soft labels

    sizes = {1: 2_000_000, 2: PRIOR_ROWS, 3: 100 * PRIOR_ROWS}
    parts = [rows(sizes[1], 0.0), rows(sizes[2], 0.1), rows(sizes[3], 0.1)]
    z, y = (np.concatenate(part)[:, None].repeat(2, 1) for part in zip(*parts, strict=True))
    found = fit(SCHEMA, z, y, np.repeat([1, 2, 3], list(sizes.values())))
    overall = found.b[0, 0]
    np.testing.assert_allclose(found.a[:, 0], 1.0, atol=2e-3)
    assert 0 < overall < 0.006  # 5 % of the rows are shifted by 0.1
    half = overall + (0.1 - overall) / 2
    assert found.b[2, 0] == pytest.approx(half, abs=2e-3)
    assert found.b[3, 0] == pytest.approx(overall + (0.1 - overall) * 100 / 101, abs=2e-3)


def test_domains_without_rows_and_unknown_ones_have_the_scaling_of_all() -> None:
    z = np.random.default_rng(0).normal(size=(5000, 2))
    domain = np.random.default_rng(1).integers(0, 2, 5000)  # of index 2 and 3 are none
    found = fit(SCHEMA, z, drawn(z, 1, 0.5, 2), domain)
    for place in (2, 3):
        np.testing.assert_array_equal(found.a[place], found.a[0])
        np.testing.assert_array_equal(found.b[place], found.b[0])
    assert not np.array_equal(found.b[1], found.b[0])


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_domain_of_one_class_is_moved_no_further_than_its_rows_say(rate: float) -> None:
    z = np.random.default_rng(0).normal(size=(20_200, 2))
    labels = drawn(z, 1, 0, 3)
    domain = np.repeat([1, 2, 3], [20_000, 100, 100])
    labels[domain == 2] = rate
    found = fit(SCHEMA, z, labels, domain)
    shift = (found.b[2] - found.b[0]) * (1 if rate else -1)
    # Of the gradient, at most 100 rows; of the prior's precision, about m / 5.
    assert ((shift > 0.1) & (shift < 0.5)).all()


@pytest.mark.parametrize(
    ("z", "labels"),
    [
        (np.array([-1.0, 1.0]).repeat(500), np.array([0.0, 1.0]).repeat(500)),
        (np.array([-300.0, 300.0]).repeat(500), np.array([0.0, 1.0]).repeat(500)),
        (np.array([-300.0, 300.0]).repeat(500), np.array([1.0, 0.0]).repeat(500)),
        (np.full(1000, 3.0), np.zeros(1000)),
        (np.full(1000, 1e6), np.ones(1000)),
        (np.full(1000, 1e6), np.zeros(1000)),
        (np.zeros(1), np.ones(1)),
    ],
    ids=["separable", "far", "reversed", "equal", "saturated", "wrong", "one row"],
)
def test_whatever_the_rows_are_the_scaling_is_finite_and_keeps_the_order(
    z: np.ndarray, labels: np.ndarray
) -> None:
    both = np.stack([z, z], 1)
    with np.errstate(all="raise", under="ignore"):
        found = fit(SCHEMA, both, np.stack([labels, labels], 1), np.arange(len(z)) % 4)
    for part in found:
        assert np.isfinite(part).all()
    assert (found.a >= np.float32(MIN_SLOPE)).all()
    assert (np.abs(found.a) < 100).all()
    before, after = (
        np.logaddexp(0, w) - labels * w for w in (z, found.a[0, 0] * z + found.b[0, 0])
    )
    assert after.sum() <= before.sum()


def test_a_label_that_no_row_has_and_a_rating_stay_as_they_are() -> None:
    schema = Schema(
        features=SCHEMA.features,
        labels=("click", "stars", "buy"),
        label_kinds={"stars": "rating"},
        label_moments={"stars": (3.0, 1.0)},
        domain="scene",
    )
    z = np.random.default_rng(0).normal(size=(3000, 3))
    labels = np.stack([drawn(z[:, 0], 1, 1, 1), 3 + z[:, 1], np.full(3000, np.nan)], 1)
    found = fit(schema, z, labels, np.ones(3000))
    np.testing.assert_array_equal(found.a[:, 1:], 1.0)
    np.testing.assert_array_equal(found.b[:, 1:], 0.0)
    assert (found.b[:, 0] > 0.3).all()


def test_without_a_feature_that_tells_the_domain_there_is_one_scaling() -> None:
    schema = Schema(features=(Categorical(name="x", num_ids=3),), labels=("click",), domain="tab")
    z = np.random.default_rng(0).normal(size=(3000, 1))
    found = fit(schema, z, drawn(z, 1, 1, 1), np.zeros(3000))
    assert found.a.shape == (1, 1)
    assert not found.reads_domain


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros((0, 2)), "no rows to fit"),
        ([[0.0, np.nan]], [[0.0, 1.0]], r"row 0 should be finite .*Received: \[0.0, nan\]"),
        ([[0.0, 0.0]], [[0.0, 2.0]], r"`like` should be in \[0, 1\]. Received in row 0: 2.0"),
    ],
)
def test_rows_that_say_nothing_are_refused(logits: object, labels: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(SCHEMA, logits, labels, np.zeros(len(np.asarray(logits))))


def test_each_row_is_scaled_by_its_own_domain() -> None:
    a = np.arange(8, dtype=np.float32).reshape(4, 2)
    scaled = Scaling(a, -a)(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([3, 0]))
    np.testing.assert_array_equal(scaled, [[0.0, 7.0], [0.0, 3.0]])


SERVED = Schema(
    features=(
        Categorical(name="item", num_ids=40, dim=8),
        Categorical(name="scene", num_ids=DOMAINS, dim=8),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click", "like", "stars"),
    label_kinds={"stars": "rating"},
    label_moments={"stars": (3.0, 2.0)},
    task_id="user",
    timestamp="time",
    domain="scene",
)
LABELS = len(SERVED.labels)
ROWS = 300
ONE = Scaling(*np.tile(np.array([1, 0], np.float32)[:, None, None], (DOMAINS + 1, LABELS)))


def columns(size: int = ROWS, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "item": random.integers(0, 40, size),
        "scene": random.integers(-1, DOMAINS + 1, size),  # two values are unknown
        "price": random.normal(size=size).astype(np.float32),
        "user": np.arange(size) % USERS,
        "time": np.arange(1, size + 1),
        "event_id": np.zeros(size, np.int64),
        "click": random.integers(0, 2, size).astype(np.float32),
        "like": random.integers(0, 2, size).astype(np.float32),
        "stars": random.normal(3, 1, size).astype(np.float32),
    }


@pytest.fixture(scope="module")
def model() -> Any:
    tf_keras.utils.set_random_seed(3)
    config = {"name": "mlp", "units": (16,), "tower_units": (6,), "embedding_stddev": 0.5}
    inner = {"steps": 2, "step_size": 0.3, "max_support": 5}
    made = zoo.build(SERVED, {**config, "meta": {"inner": inner, "min_support": 3}})
    made.build()
    return made


@pytest.fixture(scope="module")
def calibration() -> dict[str, Scaling]:
    random = np.random.default_rng(7)
    a = random.uniform(0.3, 3.0, (DOMAINS + 1, LABELS)).astype(np.float32)
    b = random.normal(size=(DOMAINS + 1, LABELS)).astype(np.float32)
    a[:, 2], b[:, 2] = 1.0, 0.0  # of the rating
    return {"model": Scaling(a, b)}


def scaled(logits: Any, scaling: Scaling, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Scores by the scaling's equation, in float64, in the order of the labels."""
    scene = rows["scene"]
    index = np.where((scene >= 0) & (scene < DOMAINS), scene + 1, 0)
    z = np.asarray(logits, np.float64)
    w = scaling.a[index] * z + scaling.b[index]
    mean, variance = SERVED.label_moments["stars"]
    return np.where([False, False, True], mean + variance**0.5 * z, sigmoid(w))


def raw(rows: Mapping[str, np.ndarray]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(rows[name]) for name in SERVED.input_names}


def answers(folder: pathlib.Path, signature: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    with session(folder) as run:
        found = run(signature, inputs)
    return np.stack([found[label] for label in SERVED.labels], 1)


def inputs_of(names: Iterable[str], rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: rows[name] for name in names}


@pytest.mark.parametrize("export", [export_in_graph, export_store, export_fed, export_fed_store])
def test_a_form_serves_the_scaled_logits_of_keras(
    export: Any, model: Any, calibration: dict[str, Scaling], tmp_path: pathlib.Path
) -> None:
    library()
    folder, worst = export(model, tmp_path / "m", columns(), calibration=calibration)
    assert worst <= 3e-6  # a slope of 3 at most
    fresh = columns(seed=2)
    inputs = inputs_of(SERVED.input_names, fresh)
    if (tmp_path / "m_lookup").exists():
        ids = inputs_of(("item", "scene"), fresh)
        with session(tmp_path / "m_lookup" / "1") as lookup:
            vectors = dict(lookup("serving_default", ids))
        del vectors["status"]
        inputs = {**vectors, "price": fresh["price"], "scene_id": fresh["scene"]}
    expected = scaled(model(raw(fresh))["model"], calibration["model"], fresh)
    for signature in ("serving_default", "model"):
        close(answers(folder, signature, inputs), expected, atol=3 * ROUNDING)
    plain = scaled(model(raw(fresh))["model"], ONE, fresh)
    assert np.abs(expected - plain).max() > 0.1


@pytest.fixture(scope="module")
def adapted(
    model: Any, calibration: dict[str, Scaling], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pathlib.Path]:
    """Versions of the form `adapted`, with and without a calibration."""
    base = tmp_path_factory.mktemp("adapted")
    support = {name: column[: ROWS // 2] for name, column in columns().items()}
    support["user"] %= USERS - 2  # two users have none
    return {
        name: export_adapted(model, base / name, columns(), support, calibration=each)[0]
        for name, each in (("plain", {}), ("calibrated", calibration))
    }


def test_plain_and_adapted_logits_are_scaled_alike(
    adapted: dict[str, pathlib.Path], model: Any, calibration: dict[str, Scaling]
) -> None:
    fresh = columns(seed=2)
    inputs = {**inputs_of((*SERVED.input_names, "user"), fresh), ADAPT: np.ones(ROWS, bool)}
    before, after = (answers(adapted[name], "adapted", inputs) for name in ("plain", "calibrated"))
    logits = np.log(before.astype(np.float64)) - np.log1p(-before.astype(np.float64))
    mean, variance = SERVED.label_moments["stars"]
    logits[:, 2] = (before[:, 2] - mean) / variance**0.5
    # A logit of a float32 probability p is known to 6e-8 / (1 - p), p below 0.99 here.
    assert before[:, :2].max() < 0.99
    close(after, scaled(logits, calibration["model"], fresh), atol=1e-5)
    assert np.abs(after - before).max() > 0.1
    by_plain = answers(
        adapted["calibrated"], "serving_default", inputs_of(SERVED.input_names, fresh)
    )
    none = fresh["user"] >= USERS - 2
    close(after[none], by_plain[none], atol=3 * ROUNDING)
    assert np.abs(after - by_plain).max() > 0.01


def test_adapted_by_request_is_scaled_too(
    adapted: dict[str, pathlib.Path], model: Any, calibration: dict[str, Scaling]
) -> None:
    fresh = columns(seed=2)
    specs = by_request_specs(SERVED, 5)
    given = {**inputs_of((*SERVED.input_names, "user"), fresh), ADAPT: np.ones(ROWS, bool)}
    given |= brought(specs, fresh["user"], {})  # none: the plain score
    expected = scaled(model(raw(fresh))["model"], calibration["model"], fresh)
    found = answers(adapted["calibrated"], "adapted_by_request", given)
    close(found, expected, atol=3 * ROUNDING)


def test_personal_towers_are_scaled(
    model: Any, calibration: dict[str, Scaling], tmp_path: pathlib.Path
) -> None:
    fresh = columns(seed=2)
    h = model.tower_input(raw(fresh), "model")
    size = tower_size(model.tower_of("model").dense_shapes(h.shape[-1]))
    users = np.arange(USERS - 2)
    zeros = np.zeros((len(users), size), np.float32)  # each tower is the shared one
    folder, _ = export_personal(
        model, tmp_path / "m", columns(), users, zeros, calibration=calibration
    )
    expected = scaled(model(raw(fresh))["model"], calibration["model"], fresh)
    given = inputs_of((*SERVED.input_names, "user"), fresh)
    close(answers(folder, "serving_default", given), expected, atol=3 * ROUNDING)
    given.pop("user")
    close(answers(folder, "plain", given), expected, atol=3 * ROUNDING)


def test_without_a_calibration_logits_are_what_they_were(model: Any) -> None:
    logits = tf.zeros([2, LABELS])
    assert calibrated(model, None, logits, {}) is logits
    assert domain_input(model) == ""


def test_a_calibration_of_other_labels_is_refused(model: Any, tmp_path: pathlib.Path) -> None:
    other = Scaling(np.ones((2, LABELS), np.float32), np.ones((2, LABELS), np.float32))
    with pytest.raises(ValueError, match=r"should have shape \(4, 3\).*Received: \(2, 3\)"):
        export_in_graph(model, tmp_path / "m", columns(), calibration={"model": other})
