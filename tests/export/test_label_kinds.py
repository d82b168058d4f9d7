"""Ratings beside binary labels, and tasks that are named by strings, in every form that serves."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from served import close

from qianmo.export.adapted import (
    ADAPT,
    by_request_specs,
    export_adapted,
    rows_by_task,
)
from qianmo.export.personal_towers import SHARED_TOWER, WEIGHTS, export_personal, fine_tune
from qianmo.export.retrieval import by_request_specs as retrieval_specs
from qianmo.export.retrieval import export_retrieval
from qianmo.export.saved_model import (
    BAD_SCORE,
    STATUS,
    ExportError,
    Rows,
    answer,
    check_parity,
    export_fed,
    export_in_graph,
    session,
)
from qianmo.export.shared_support import BAD_SUPPORT, brought
from qianmo.export.store import export_store
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import Support
from qianmo.layers.meta import NO_SUPPORT
from qianmo.layers.schema import Schema
from qianmo.layers.task_key import task_key
from qianmo.models import zoo
from qianmo.ops.library import library
from qianmo.ops.support_store import BAD_LABEL, SupportStore
from qianmo.pipelines.serving.clients import Client
from qianmo.pipelines.serving.server import ModelServer

SCHEMA = Schema(
    features=(
        Categorical(name="item", num_ids=40, dim=8),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click", "stars", "paid"),
    label_kinds={"stars": "rating", "paid": "rating"},
    label_moments={"stars": (3.2, 1.7), "paid": (-20.0, 9.0)},
    task_id="user",
    task_dtype="string",
    timestamp="time",
)
MEAN, SCALE = np.array([0, 3.2, -20]), np.array([1, 1.7**0.5, 3])
UNITS = np.abs(MEAN) + 4 * SCALE  # of the rounding of ratings, as the exporter counts it
UNITS[0] = 1
USERS = np.array([b"anna", b"ben", "çelik".encode(), b"", b"\xff\x01"], object)
MOST = 5


def columns(size: int = 40, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "item": random.integers(0, 40, size),
        "price": random.normal(size=size).astype(np.float32),
        "user": USERS[np.arange(size) % len(USERS)],
        "time": np.arange(1, size + 1),
        "event_id": np.zeros(size, np.int64),
        "click": random.integers(0, 2, size).astype(np.float32),
        "stars": random.integers(-1, 6, size).astype(np.float32),  # of which -1 is one
        "paid": (-20 + 3 * random.normal(size=size)).astype(np.float32),
    }


ROWS, SUPPORT = columns(seed=2), columns()
SUPPORT["stars"][::7] = np.nan  # rows without this label
KNOWN = ROWS["user"] != USERS[0]
SUPPORT = {name: column[SUPPORT["user"] != USERS[0]] for name, column in SUPPORT.items()}


@pytest.fixture(scope="module")
def model() -> Any:
    tf_keras.utils.set_random_seed(3)
    config = {"name": "mlp", "units": (16,), "tower_units": (6,), "embedding_stddev": 0.5}
    inner = {"steps": 2, "step_size": 0.005, "shrinkage": 1.0, "max_support": MOST}
    made = zoo.build(SCHEMA, {**config, "meta": {"inner": inner}})
    made.build()
    return made


def predicted(logits: np.ndarray) -> np.ndarray:
    """What logits say, by NumPy."""
    found = MEAN + SCALE * logits
    found[:, 0] = 1 / (1 + np.exp(-logits[:, 0]))
    return found


def answered(answers: Rows) -> np.ndarray:
    return np.stack([answers[label] for label in SCHEMA.labels], 1)


def same(found: Rows, expected: np.ndarray) -> None:
    close(answered(found) / UNITS, expected / UNITS)


def features(rows: Rows = ROWS) -> dict[str, np.ndarray]:
    return {name: rows[name] for name in SCHEMA.input_names}


def logits(model: Any, rows: Rows = ROWS) -> np.ndarray:
    return model({k: tf.constant(v) for k, v in features(rows).items()})["model"].numpy()


def adapted(model: Any) -> np.ndarray:
    """Adapted predictions, by the layers alone, one user at a time."""
    h, own = (
        model.tower_input({k: tf.constant(v) for k, v in features(rows).items()}, "model")
        for rows in (ROWS, SUPPORT)
    )
    found = logits(model)
    for user in USERS[1:]:
        rows, mine = (np.flatnonzero(x["user"] == user) for x in (SUPPORT, ROWS))
        rows = rows[-MOST:]
        labels = np.stack([SUPPORT[label][rows] for label in SCHEMA.labels], 1)
        there = ~np.isnan(labels)
        labels = np.where(there, labels, 0).astype(np.float32)
        support = Support(*(x[None] for x in (tf.gather(own, rows), labels, there.astype("f4"))))
        correction = model.meta.inner.adapt(model.tower, support)
        z = model.tower(tf.gather(h, mine)[None], correction=correction).logits[0].numpy()
        found[mine] = np.where(there.any(0), z, found[mine])
    return predicted(found)


@pytest.mark.parametrize("export", [export_in_graph, export_fed, export_store])
def test_ratings_are_served_in_their_own_units(
    model: Any, export: Any, tmp_path: pathlib.Path
) -> None:
    library()
    folder, worst = export(model, tmp_path / "m", features())
    assert worst <= 1e-6
    inputs = features()
    if export is export_fed:
        with session(tmp_path / "m_lookup" / "1") as run:
            inputs["item"] = run("serving_default", {"item": ROWS["item"]})["item"]
    with session(folder) as run:
        answers = run("serving_default", inputs)
    same(answers, predicted(logits(model)))
    assert not answers[STATUS].any()
    assert np.ptp(answers["stars"]) > 0.1


def test_a_rating_that_is_not_finite_is_answered_as_0_with_a_status() -> None:
    z = tf.constant([[0.0, 0.0, 0.0], [0.0, np.inf, 1.0], [0.0, 1.0, np.nan], [0.0, 0.0, -3e38]])
    found = answer(SCHEMA, z, tf.zeros([4], tf.int32))
    assert found[STATUS].numpy().tolist() == [0, BAD_SCORE, BAD_SCORE, BAD_SCORE]
    same(found, [[0.5, 3.2, -20], [0.5, 0, -17], [0.5, 3.2 + 1.7**0.5, 0], [0.5, 3.2, 0]])


def test_ratings_are_compared_in_units_of_their_deviation() -> None:
    expected = np.array([[0.5, 3.0, -20.0]])
    for off, label in (([0, 0, 3e-5], ""), ([0, 0, 4e-5], "row 0"), ([2e-6, 0, 0], "row 0")):
        served = dict(zip(SCHEMA.labels, (expected + off).T, strict=True))
        rows = {name: column[:1] for name, column in features().items()}
        if not label:
            assert 0 < check_parity(served, expected, SCHEMA, rows, "s") < 1e-6
            continue
        with pytest.raises(ExportError, match=label):
            check_parity(served, expected, SCHEMA, rows, "s")


@pytest.mark.parametrize("where", ["table", "features"])
def test_towers_adapt_to_ratings_of_tasks_with_names(
    model: Any, tmp_path: pathlib.Path, where: str
) -> None:
    store = None
    if where == "features":
        store = SupportStore("test_label_kinds", 3, 3, MOST)
    folder, worst = export_adapted(
        model,
        tmp_path / "m",
        ROWS,
        SUPPORT,
        store=store,
        keep="hidden" if store is None else "features",
    )
    assert worst <= 1e-6
    asked = {**features(), "user": ROWS["user"], ADAPT: np.ones(len(KNOWN), bool)}
    support = rows_by_task(SCHEMA, SUPPORT)
    expected = adapted(model)
    assert np.abs((expected - predicted(logits(model)))[KNOWN] / UNITS).max(0).min() > 1e-4
    with session(folder) as run:
        by_table = run("adapted", asked)
        own = brought(by_request_specs(SCHEMA, MOST), ROWS["user"], support)
        by_request = run("adapted_by_request", {**asked, **own})
        for answers in (by_table, by_request):
            same(answers, expected)
            np.testing.assert_array_equal(answers[STATUS], np.where(KNOWN, 0, NO_SUPPORT))
        put = {name: column[:4].copy() for name, column in SUPPORT.items()}
        put["user"], put["event_id"] = np.array([b"anna"] * 4, object), np.arange(4)
        put["stars"][:] = [-1, np.nan, np.inf, 5]
        put["click"][3] = 7
        status = run("put_support", put)[STATUS]
        assert status.tolist() == [0, 0, BAD_LABEL, BAD_LABEL]
        assert not run("adapted", asked)[STATUS].any()
        bad = {**asked, **{name: column.copy() for name, column in own.items()}}
        first = int(np.flatnonzero(own["support_count"])[0])
        bad["support_stars"][first, 0] = np.inf
        found = run("adapted_by_request", bad)[STATUS] == BAD_SUPPORT
        np.testing.assert_array_equal(found, ROWS["user"] == ROWS["user"][first])
    if store is not None:
        store.close()
        return
    with ModelServer({"m": folder.parent}, port=0, rest_api_port=0) as server:
        client = Client(f"127.0.0.1:{server.port}", "m")
        given = {**features(), "user": ROWS["user"]}
        same(client.predict_adapted(given, "user", support), expected)
        text = {user.decode(): rows for user, rows in support.items() if user != b"\xff\x01"}
        there = np.isin(ROWS["user"], [user.encode() for user in text])
        found = client.predict_adapted(given, "user", text)
        close((answered(found) / UNITS)[there], (expected / UNITS)[there])
        client.close()


def test_towers_of_adgroups_with_names(model: Any, tmp_path: pathlib.Path) -> None:
    ids, towers = fine_tune(model, model.meta.inner, SUPPORT)
    assert ids.tolist() == sorted(USERS[1:])
    folder, _ = export_personal(model, tmp_path / "m", ROWS, ids, towers)
    asked = {**features(), "user": ROWS["user"]}
    expected = adapted(model)
    with session(folder) as run:
        answers = run("serving_default", asked)
        same(answers, expected)
        np.testing.assert_array_equal(answers[STATUS], np.where(KNOWN, 0, SHARED_TOWER))
        put = {"user": np.array([b"anna"], object), WEIGHTS: towers[:1]}
        assert run("put_towers", put)[STATUS].tolist() == [0]
        assert not run("serving_default", asked)[STATUS].any()
        assert run("expire_towers", {"user": put["user"]})[STATUS].tolist() == [0]
        assert run("stats", {"user": put["user"]})["towers"].tolist() == [len(ids)]


def test_users_with_names_share_support_in_retrieval(tmp_path: pathlib.Path) -> None:
    schema = Schema(
        features=(
            Categorical(name="user", dtype="string", hash_buckets=30, dim=8, side="user"),
            Categorical(name="item", num_ids=40, dim=8, side="item"),
        ),
        labels=("click",),
        task_id="user",
        task_dtype="string",
        timestamp="time",
    )
    config = {"name": "two_tower", "item_id": "item", "dim": 8, "units": (16,), "item_units": (8,)}
    inner = {"steps": 2, "step_size": 0.3, "max_support": MOST}
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(schema, {**config, "meta": {"inner": inner}, "seam_dim": 8})
    model.build()
    folder, worst = export_retrieval(model, tmp_path / "m", ROWS, {"item": np.arange(40)}, best=3)
    assert worst <= 1e-6
    support = {user: {"item": np.arange(3)} for user in USERS[1:]}
    own = brought(retrieval_specs(model), ROWS["user"], support)
    with session(folder) as run:
        asked = {"user": ROWS["user"], ADAPT: np.ones(len(KNOWN), bool), **own}
        status = run("adapted_user", asked)[STATUS]
    np.testing.assert_array_equal(status, np.where(KNOWN, 0, NO_SUPPORT))


def test_task_keys_are_those_of_farmhash() -> None:
    # Fingerprint64 of "anna" and "ben", and of what no text is.
    keys = task_key(tf.constant([b"anna", b"ben", b"\xff\x01"])).numpy().tolist()
    assert keys[:2] == [-5132957809857035456, 1957371472601595288]
    assert len(set(keys)) == 3
