"""Retrieval end to end on made rows: users of two tastes, ranks against a loop, exports, refusals.

A user's rows are of one half of the items, and of one small shelf for a while: who adapts to the
last rows knows the shelf of the next.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from served import close

from qianmo.configs.base import base_config
from qianmo.export.adapted import ADAPT
from qianmo.export.retrieval import by_request_specs, export_retrieval
from qianmo.export.saved_model import export_fed, op_types, session
from qianmo.export.shared_support import brought
from qianmo.layers.features import Categorical
from qianmo.layers.inner_loop import Support
from qianmo.layers.meta import NO_SUPPORT
from qianmo.layers.schema import Schema
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.replay import first_rows
from qianmo.pipelines.datasets import history, protocols
from qianmo.pipelines.evaluation import retrieval, scores
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

USERS, ITEMS, ROWS, SHELF = 60, 80, 40, 8


def made(folder: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    users, items = [], []
    for user in range(USERS):
        half = user % 2
        for first in range(0, ROWS, 10):
            shelf = half * (ITEMS // 2) + SHELF * rng.integers(0, ITEMS // 2 // SHELF)
            items += (shelf + rng.integers(0, SHELF, 10)).tolist()
            users += [user] * 10
            assert first < ROWS
    time = np.tile(np.arange(ROWS), USERS)
    order = np.argsort(time, kind="stable")
    item = np.array(items)
    table = pa.table(
        {
            "user": np.array(users),
            "item": item,
            "half": np.where(item < ITEMS // 2, "low", "high"),
            "label": np.ones(len(item), np.int8),
            "time": time,
        }
    ).take(order)
    columns = {"task": "user", "item": "item", "time": "time"}
    table = history.last_items(table, **columns, rows=10, name="last")
    parts = protocols.next_items(table, "user", "time")
    parts["items"] = pa.table(
        {"item": np.arange(ITEMS), "half": np.where(np.arange(ITEMS) < ITEMS // 2, "low", "high")}
    )
    for name, part in parts.items():
        pq.write_table(part, folder / f"{name}.parquet")
    return folder


def recipe(folder: pathlib.Path, *, listed: bool, weight: float = 1.0) -> Recipe:
    config = base_config()
    user: list[dict[str, Any]] = [{"name": "user", "num_ids": USERS, "side": "user"}]
    item: list[dict[str, Any]] = [{"name": "item", "num_ids": ITEMS, "side": "item"}]
    if listed:
        user = [
            {"name": "last", "num_ids": ITEMS, "max_length": 10, "side": "user", "table": "item"}
        ]
    else:
        item.append({"name": "half", "dtype": "string", "side": "item"})
    config.schema = {
        "features": [{"dim": 8, **f} for f in [*user, *item]],
        "labels": ("label",),
        "task_id": "user",
        "timestamp": "time",
    }
    config.model = {
        "name": "two_tower",
        "item_id": "item",
        "dim": 8,
        "units": (16,),
        "seam_dim": 8,
        "item_units": (16,),
        "queue_size": 64,
        "embedding_stddev": 0.1,
        "meta": {"inner": {"steps": 3, "step_size": 0.5}, "weight": weight},
    }
    for part in ("train", "valid", "test"):
        config.data[part] = str(folder / f"{part}.parquet")
    config.data.catalogue = str(folder / "items.parquet")
    if listed:
        config.model.support_feature = "last"
    else:
        config.data.test_support = str(folder / "test_support.parquet")
        config.data.chunk_rows, config.data.chunk_tasks = 20, 20
        config.data.chunks_beside = True
    config.train.batch_size = 128
    config.train.epochs = 8
    config.train.patience = 8
    config.train.monitor = "ndcg_10"
    for name in ("optimizer", "table_optimizer"):
        config.train[name].learning_rate = 0.01
    return Recipe.from_config(config.to_dict())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return made(tmp_path_factory.mktemp("rows"))


Trained = tuple[TwoTower, Recipe, dict[str, Any], pathlib.Path]


@pytest.fixture(scope="module", params=[False, True], ids=["tasks", "lists"])
def trained(
    request: pytest.FixtureRequest, data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    folder = tmp_path_factory.mktemp("model")
    report = Run(recipe(data, listed=request.param), folder).train()
    model, read = run_dir.load(folder)
    assert isinstance(model, TwoTower)
    return model, read, report, folder


def test_it_learns_and_adapting_finds_more(trained: Trained) -> None:
    _, _, report, folder = trained
    plain, adapted = (report["test"][head]["label"]["all"] for head in ("model", "adapted"))
    assert plain["rows"] == USERS
    # Any item of the right half would be right in 10 of 40, less those that are known.
    assert plain["hr_10"] > 0.3
    assert adapted["hr_10"] >= plain["hr_10"]
    assert adapted["ndcg_10"] > plain["ndcg_10"]
    assert "ndcg_10" in (folder / "report.html").read_text()
    assert report["history"][-1]["monitor"] > 0.1


def test_ranks_are_those_of_a_loop(trained: Trained, data: pathlib.Path) -> None:
    model, read, report, _ = trained
    train, valid, test, items = (
        pq.read_table(data / f"{part}.parquet").to_pylist()
        for part in ("train", "valid", "test", "items")
    )
    inputs = {"item": tf.range(ITEMS, dtype=tf.int64)}
    if not model.support_feature:
        inputs["half"] = tf.constant([row["half"] for row in items])
    v = model.item_vectors(inputs)[0].numpy()
    ranks = []
    for row in test:
        features = {"user": tf.constant([row["user"]], tf.int64)}
        if model.support_feature:
            features = {
                "last": tf.constant([row["last"]], tf.int64),
                "last_length": tf.constant([len(row["last"])], tf.int64),
            }
        scores = v @ model.user_vectors(features)[0].numpy()[0]
        had = {r["item"] for r in (*train, *valid) if r["user"] == row["user"]} - {row["item"]}
        better = [i for i in range(ITEMS) if i not in had and scores[i] >= scores[row["item"]]]
        ranks.append(len(better))
    hits = np.mean(np.array(ranks) <= 10)
    assert report["test"]["model"]["label"]["all"]["hr_10"] == pytest.approx(hits, abs=1e-9)
    again = retrieval.of_recipe(model, read.data, read.data.test)
    assert again == report["test"]


def test_the_export_answers_as_keras_by_stock_ops(trained: Trained, tmp_path: pathlib.Path) -> None:
    model, read, _, _ = trained
    rows = first_rows(model.schema, read.data.test, 20)
    items = retrieval.item_rows(model, read.data.catalogue)
    folder, worst = export_retrieval(model, tmp_path / "two_tower", rows, items, best=5)
    assert worst <= 1e-6
    _, worst = export_fed(model, tmp_path / "scores", rows)
    assert worst <= 1e-6
    assert not {op for op in op_types(folder) if ">" in op}
    user = {k: v for k, v in rows.items() if k not in ("item", "half")}
    support: dict[str, Any] = {}
    if not model.support_feature:
        six = {"item": np.arange(6), "half": np.full(6, b"low", object)}
        even = {row: six for row in range(0, 20, 2)}
        support = brought(by_request_specs(model), np.arange(20), even)
        support["request_id"] = np.arange(20)  # of a request each
    with session(folder) as run:
        u = run("user", user)["vector"]
        v = run("item", items)["vector"]
        found = run("recommend", user)
        given = {**user, **support, ADAPT: np.ones(20, bool)}
        adapted = run("adapted_user", given)
        best = run("adapted_recommend", given)
        off = run("adapted_user", {**given, ADAPT: np.zeros(20, bool)})
        on = np.arange(20) % 3 > 0
        mixed = run("adapted_user", {**given, ADAPT: on})
        count = "support_count" if support else f"{model.support_feature}_length"
        empty = {**given, count: np.zeros(20, np.int64)}
        none = run("adapted_user", empty)
        plain = run("user", {k: empty[k] for k in user})
        if support:  # rows of one user share what one of them brings
            user_id = rows["user"][:1].repeat(4)
            shared = {name: column[:1].repeat(4, 0) for name, column in given.items()}
            every = run("adapted_user", shared)
            shared |= brought(by_request_specs(model), user_id, {user_id[0]: six})
            once = run("adapted_user", shared)
            assert shared["support_count"].tolist() == [6, 0, 0, 0]
            close(once["vector"], every["vector"])
            assert not once["status"].any()
    assert (none["status"] == NO_SUPPORT).all()
    close(none["vector"], plain["vector"])
    close(off["vector"], u)
    assert not off["status"].any()
    # One kernel and equal shapes: to the bit.
    expected = np.where(on[:, None], adapted["vector"], off["vector"])
    np.testing.assert_array_equal(mixed["vector"], expected)
    np.testing.assert_array_equal(mixed["status"], np.where(on, adapted["status"], 0))
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-5)
    order = np.argsort(-(u @ v.T), 1, kind="stable")[:, :5]
    np.testing.assert_allclose(
        found["score"], np.take_along_axis(u @ v.T, order, 1), rtol=1e-5, atol=1e-6
    )
    # Items whose scores differ by rounding alone may change places.
    first = np.take_along_axis(u @ v.T, found["item"][:, :1], 1)
    close(first[:, 0], (u @ v.T).max(1))
    scores = adapted["vector"] @ v.T
    np.testing.assert_allclose(best["score"][:, 0], scores.max(1), rtol=1e-5)
    if model.support_feature:
        assert not adapted["status"].any()
        assert np.abs(adapted["vector"] - u).max() > 1e-3
        return
    # Rows without support get the plain vector and say so; the others those of the Keras layers.
    np.testing.assert_array_equal(adapted["status"], [0, 8] * 10)
    close(adapted["vector"][1::2], u[1::2])
    state = model.user_state({"user": tf.constant(rows["user"][:1])})
    h = tf.concat([tf.repeat(state, 6, 0), tf.constant(v[:6])], 1)[None]
    ones = tf.ones([1, 6, 1])
    expected, _ = model.adapted_state(state, tf.constant([0]), Support(h, ones, ones))
    np.testing.assert_allclose(adapted["vector"][:1], expected, rtol=1e-5, atol=1e-6)


def test_the_program_measures_what_training_did(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    model, read, report, _ = trained
    found, text, _ = scores.measured(model, read.data, read.data.test)
    assert found == report["test"]
    assert "adapted" in text


def test_rows_that_are_no_positives_are_neither_targets_nor_known(
    trained: Trained, tmp_path: pathlib.Path
) -> None:
    model, read, report, _ = trained
    paths = {}
    for part in ("train", "valid", "test"):
        rows = pq.read_table(getattr(read.data, part))
        shown = rows.set_column(
            rows.schema.get_field_index("label"), "label", pa.array(np.zeros(len(rows), np.int8))
        )
        # Each item of the half that a user does not like was shown, and passed over.
        item = pa.array((rows["item"].to_numpy() + ITEMS // 2) % ITEMS)
        shown = shown.set_column(rows.schema.get_field_index("item"), "item", item)
        paths[part] = str(tmp_path / f"{part}.parquet")
        pq.write_table(pa.concat_tables([rows, shown.cast(rows.schema)]), paths[part])
    data = dataclasses.replace(read.data, **paths)
    assert retrieval.of_recipe(model, data, data.test) == report["test"]
    pq.write_table(pq.read_table(paths["test"]).slice(USERS), paths["test"])
    with pytest.raises(readers.DataError, match="no row has a label above 0"):
        retrieval.of_recipe(model, data, data.test)


def test_what_a_task_has_had_is_read_by_the_schemas_rules(tmp_path: pathlib.Path) -> None:
    item = Categorical(name="item", num_ids=9, side="item", domains=(1,))
    scene = Categorical(name="scene", num_ids=3)
    schema = Schema(
        features=(item, scene),
        labels=("label",),
        optional_labels=("label",),
        task_id="user",
        domain="scene",
    )
    rows = {
        "user": [7, 7, 7, 8, 8],
        "item": [5, 6, 4, None, 3],
        "scene": [1, 1, 1, 2, 1],
        "label": [1, None, 0, 1, 1],  # a row may lack the label, or own no item
    }
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    model = types.SimpleNamespace(schema=schema, item=item)
    items = retrieval.Catalogue(np.arange(9), np.zeros((9, 1), np.float32), np.zeros(9, np.int64))
    found = retrieval.known(model, items, [str(tmp_path / "rows.parquet")])
    assert found.task_id.tolist() == [7, 8]
    assert found.place.tolist() == [5, 3]


def test_many_items_are_scored_in_blocks(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, report, _ = trained
    monkeypatch.setattr(retrieval, "_SCORES", 7 * ITEMS)  # seven rows at a time
    assert retrieval.of_recipe(model, read.data, read.data.test) == report["test"]


def test_an_item_that_the_catalogue_lacks_is_refused_before_training(
    data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    good = recipe(data, listed=False)
    items = pq.read_table(good.data.catalogue)
    own = pq.read_table(good.data.valid)["item"].to_numpy()[0]
    pq.write_table(items.filter(items["item"].to_numpy() != own), tmp_path / "items.parquet")
    lacking = dataclasses.replace(
        good, data=dataclasses.replace(good.data, catalogue=str(tmp_path / "items.parquet"))
    )
    with pytest.raises(readers.DataError, match=rf"item {own} is not in the catalogue"):
        Run(lacking, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_refusals(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    good = recipe(data, listed=False).to_config()
    with pytest.raises(ValueError, match=r"should be ndcg_10 with `data.catalogue`"):
        Recipe.from_config({**good, "train": {**good["train"], "monitor": "auc"}})
    with pytest.raises(ValueError, match="needs the model two_tower"):
        Recipe.from_config({**good, "model": {"name": "mlp", "meta": good["model"]["meta"]}})
    with pytest.raises(ValueError, match=r"two_tower needs `train.dtype_policy` float32"):
        Recipe.from_config({**good, "train": {**good["train"], "dtype_policy": "mixed_bfloat16"}})
    rows = pq.read_table(data / "items.parquet")
    pq.write_table(pa.concat_tables([rows, rows.slice(3, 1)]), tmp_path / "twice.parquet")
    pq.write_table(rows.slice(0, 10), tmp_path / "few.parquet")
    model = run_dir.build(Recipe.from_config(_complete(good)))
    assert isinstance(model, TwoTower)
    with pytest.raises(readers.DataError, match="item 3 stands there twice"):
        retrieval.catalogue(model, str(tmp_path / "twice.parquet"))
    with pytest.raises(readers.DataError, match=r"is not in `data.catalogue`"):
        retrieval.measure(
            model, good["data"]["test"], str(tmp_path / "few.parquet"), [good["data"]["train"]]
        )
    # A run says so before its first step.
    few = {**good["data"], "catalogue": str(tmp_path / "few.parquet")}
    with pytest.raises(readers.DataError, match=r"valid\.parquet, column `item`, row \d+ .*not in"):
        Run(Recipe.from_config({**good, "data": few}), tmp_path / "run")


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    features = [
        {**f, "vocabulary": ["high", "low"]} if f["name"] == "half" else f
        for f in config["schema"]["features"]
    ]
    return {**config, "schema": {**config["schema"], "features": features}}
