"""Graphs whose embeddings lie in a store, through the session loader."""

from __future__ import annotations

import pathlib
import shutil
import time

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conformance import CASES
from tensorflow_serving.apis import prediction_log_pb2

from qianmo.export import embedding_shards as shards
from qianmo.export import store
from qianmo.export.embedding_shards import StoreError
from qianmo.export.saved_model import ExportError, Rows, op_types, session
from qianmo.export.store import export_store
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.models.ranker import Ranker

MODELS = [name for name in CASES if name.startswith("model ")]
OWN_OPS = {"Qianmo>EmbeddingStoreHandle", "Qianmo>EmbeddingStoreOpen", "Qianmo>EmbeddingLookup"}
SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=50, dim=8),
        Categorical(name="item", num_ids=40, dim=4),
        Categorical(name="seen", num_ids=40, dim=4, table="item", max_length=3, pooling="sqrtn"),
        Dense(name="price", mean=1.0, variance=2.0),
    ),
    labels=("click",),
)


def rows(count: int = 100) -> Rows:
    rng = np.random.default_rng(0)
    return {
        "user": rng.integers(-2, 55, count),
        "item": rng.integers(-2, 45, count),
        "seen": rng.integers(-2, 45, (count, 3)),
        "seen_length": rng.integers(0, 4, count),
        "price": rng.normal(size=count).astype(np.float32),
    }


def model(seed: int = 1, stddev: float = 1.0) -> Ranker:
    tf_keras.utils.set_random_seed(seed)
    config = {"name": "mlp", "units": (8,), "embedding_stddev": stddev, "embedding_seed": seed}
    made = zoo.build(SCHEMA, config)
    made({k: tf.constant(v) for k, v in rows(2).items()})
    return made


def scores(made: Ranker) -> np.ndarray:
    return tf.sigmoid(made({k: tf.constant(v) for k, v in rows().items()})["model"])[:, 0].numpy()


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_served_as_keras_scores_it(name: str, tmp_path: pathlib.Path) -> None:
    made = CASES[name].make()
    batch = {k: np.concatenate([v] * 2) for k, v in CASES[name].inputs().items()}
    made({k: tf.constant(v) for k, v in batch.items()})
    folder, worst = export_store(made, tmp_path / "m", batch, heads=made.head_names)
    assert 0 <= worst <= 1e-6
    assert {op for op in op_types(folder) if ">" in op} == OWN_OPS
    tables = {tuple(table.shape) for table in made.embed.tables.values()}
    kept = tf.train.list_variables(str(folder / "variables/variables"))
    assert not tables & {tuple(shape) for _, shape in kept}
    record = next(iter(tf.data.TFRecordDataset(str(next(folder.glob("assets.extra/*warmup*"))))))
    log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
    assert log.predict_log.request.model_spec.signature_name == "serving_default"


def test_graph_and_embeddings_ship_apart(tmp_path: pathlib.Path) -> None:
    made = model()
    export_store(made, tmp_path / "m", rows())
    embeddings = tmp_path / "m_embeddings"
    assert names(embeddings) == ["1", "CURRENT"]
    # The graph alone: the dense layers moved, the tables did not.
    for variable in made.bottom.trainable_variables:
        variable.assign_add(tf.ones_like(variable) / 10)
    second, worst = export_store(made, tmp_path / "m", rows(), embedding_version=1)
    assert second.name == "2"
    assert worst <= 1e-6
    assert names(embeddings) == ["1", "CURRENT"]
    # The embeddings alone: rows of the same space moved. Both folders move as one.
    before = scores(made)
    for table in made.embed.tables.values():
        table.assign(table * 0.5)
    shards.write(embeddings, 2, store.tables(made), space=1)
    after = scores(made)
    third, worst = export_store(made, tmp_path / "m", rows(), changes_of=2)
    assert (third.name, names(embeddings)) == ("3", ["1", "2", "3", "CURRENT"])
    assert worst <= 1e-6
    table = made.embed.tables["8"]
    table.scatter_nd_update([[3], [7]], tf.ones([2, 8]))
    export_store(made, tmp_path / "m", rows(), changes_of=3)
    changed = scores(made)
    assert [p.name for p in (embeddings / "4").glob("*changed*")] == ["user-changed-4.rows"]
    shards.publish(embeddings, 1)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for folder in (tmp_path / "m", embeddings):
        shutil.move(folder, moved)
    with session(moved / "m" / "2") as run:
        np.testing.assert_allclose(run("serving_default", rows())["click"], before, atol=1e-6)
        shards.publish(moved / "m_embeddings", 2)
        time.sleep(0.5)
        np.testing.assert_allclose(run("serving_default", rows())["click"], after, atol=1e-6)
        shards.publish(moved / "m_embeddings", 4)
        time.sleep(0.5)
        np.testing.assert_allclose(run("serving_default", rows())["click"], changed, atol=1e-6)
    assert min(np.abs(before - after).max(), np.abs(changed - after).max()) > 0.01


def test_retrained_embeddings_never_meet_an_old_graph(tmp_path: pathlib.Path) -> None:
    old, new = model(1), model(2)
    expected = {1: scores(old), 2: scores(new)}
    first, _ = export_store(old, tmp_path / "m", rows())
    second, _ = export_store(new, tmp_path / "m", rows())
    embeddings = tmp_path / "m_embeddings"
    assert names(embeddings) == ["1", "2", "CURRENT"]
    shards.publish(embeddings, 1)
    with session(first) as of_first, session(second) as of_second:
        for published in (1, 2, 1):
            shards.publish(embeddings, published)
            time.sleep(0.3)
            for run, space in ((of_first, 1), (of_second, 2)):
                found = run("serving_default", rows())["click"]
                np.testing.assert_allclose(found, expected[space], atol=1e-6)
    shards.publish(embeddings, 2)
    refusing, _ = export_store(
        old, tmp_path / "m", rows(), embedding_version=1, on_mismatch="refuse"
    )
    message = "accepts embedding versions of space 1, and CURRENT names 2"
    refused = pytest.raises(tf.errors.FailedPreconditionError, match=message)
    with refused, session(refusing):
        pass


def test_other_embeddings_than_the_models_are_refused(tmp_path: pathlib.Path) -> None:
    export_store(model(1), tmp_path / "m", rows())
    with pytest.raises(ExportError, match="rows differ from the Keras model"):
        export_store(model(2), tmp_path / "m", rows(), embedding_version=1)
    with pytest.raises(ExportError, match="rows differ from the Keras model"):
        export_store(model(2), tmp_path / "m", rows(), dtype="int8")
    with pytest.raises(ExportError, match="Received: 1 and 1"):
        export_store(model(1), tmp_path / "m", rows(), embedding_version=1, changes_of=1)
    with pytest.raises(StoreError, match="7/MANIFEST: No such file"):
        export_store(model(2), tmp_path / "m", rows(), embedding_version=7)
    assert {"1"} == {name for name in names(tmp_path / "m") if name.isdigit()}
    assert names(tmp_path / "m_embeddings") == ["1", "CURRENT"]


def test_smaller_dtypes_need_a_stated_tolerance(tmp_path: pathlib.Path) -> None:
    made = model(stddev=0.1)
    worst = {}
    for dtype in ("float16", "bfloat16", "int8"):
        _, worst[dtype] = export_store(made, tmp_path / dtype, rows(), dtype=dtype, tolerance=0.01)
    assert 1e-6 < worst["float16"] < worst["bfloat16"] < 0.01
    assert 1e-6 < worst["int8"] < 0.01
    sizes = {
        dtype: sum(p.stat().st_size - 4096 for p in tmp_path.glob(f"{dtype}_embeddings/1/*.rows"))
        for dtype in worst
    }
    assert sizes == {
        "float16": 2 * (51 * 8 + 41 * 4),
        "bfloat16": 2 * (51 * 8 + 41 * 4),
        "int8": 51 * 12 + 41 * 8,
    }
