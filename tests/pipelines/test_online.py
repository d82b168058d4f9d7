"""Online updates: what moves and what does not, resuming, streams, and what is published."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis_servers
import tensorflow as tf

from qianmo.configs.base import base_config
from qianmo.export.saved_model import op_types, session
from qianmo.export.store import export_store
from qianmo.layers.metrics import log_loss
from qianmo.pipelines import locks, online, run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.redis_stream import RedisStream
from qianmo.pipelines.data.replay import first_rows
from qianmo.pipelines.data.streams import FolderStream
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.online import Online, Pace, hot_start
from qianmo.pipelines.training.run import train
from qianmo.pipelines.training.watch import NotFiniteError

BATCH = 64
SCHEMA = {
    "features": [
        {"name": "user", "num_ids": 60, "dim": 4},
        {"name": "item", "num_ids": 60, "dim": 4},
        {"name": "seen", "table": "item", "num_ids": 60, "dim": 4, "max_length": 3},
        {"kind": "dense", "name": "price"},
    ],
    "labels": ["click"],
    "task_id": "user",
}


def columns(count, seed):
    """Rows whose click depends on user and item, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    taste, quality = np.random.default_rng(0).normal(size=(2, 60))
    user, item = rng.integers(0, 60, (2, count))
    click = rng.random(count) < 1 / (1 + np.exp(-2 * (taste[user] + quality[item])))
    return {
        "user": user,
        "item": item,
        "seen": [rng.integers(0, 60, n).tolist() for n in rng.integers(0, 4, count)],
        "price": rng.normal(size=count).astype(np.float32),
        "click": click.astype(np.int8),
    }


def write_rows(path, count, seed):
    pq.write_table(pa.table(columns(count, seed)), path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model, and its embeddings and a first graph, published."""
    folder = tmp_path_factory.mktemp("trained")
    write_rows(folder / "train.parquet", 8000, 1)
    config = base_config()
    config.data.train = str(folder / "train.parquet")
    config.schema = SCHEMA
    config.model = {
        "name": "dual_dnn",
        "interactions": {"fm": {}},
        "teacher_units": [16],
        "student_units": [8],
        "dropout": 0.1,
        "hint_weight": 0.1,
        "kd_warmup_steps": 50,
    }
    config.train.epochs = 1
    config.train.batch_size = BATCH
    train(Recipe.from_config(config.to_dict()), folder / "model")
    model, recipe = run_dir.load(folder / "model")
    export_store(model, folder / "served" / "m", first_rows(recipe.schema, recipe.data.train, 50))
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder of rows: 1,000 in five files, one of which is empty."""
    folder = tmp_path_factory.mktemp("rows")
    for number, count in enumerate((300, 100, 0, 500, 100)):
        write_rows(folder / f"{number}.parquet", count, 10 + number)
    return folder


def pace(**changes):
    return Pace(**{"batch_size": BATCH, "checkpoint_rows": 2 * BATCH, **changes})


def updates(trained, folder, rows, learning_rate=None, **changes):
    """Online updates by the rows of a folder; what is published is noted and not written."""
    schema = run_dir.read_recipe(trained / "model").schema
    published = []

    def publish(model, sample, origin):
        published.append(len(sample["user"]))
        return pathlib.Path(str(len(published))), 0.0

    made = Online(
        trained / "model",
        folder,
        lambda position: FolderStream(schema, rows, position),
        publish,
        pace(**changes),
        learning_rate,
    )
    made.run(lambda: False, stop_at_end=True)
    return made, published


def moved(checkpoints):
    """What the newest checkpoint holds, but for the file's own marks."""
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(checkpoints)))
    found = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    return {k: v for k, v in found.items() if k.startswith(("variables/", "optimizer/"))}


@pytest.fixture(scope="module")
def whole(trained, rows, tmp_path_factory):
    """An uninterrupted run, its folder, and the sizes of the samples that were published."""
    folder = tmp_path_factory.mktemp("whole")
    changes = {"checkpoint_rows": BATCH, "publish_rows": 300, "publish_minutes": 0.0}
    made, published = updates(trained, folder, rows, **changes)
    return made, folder, published


def test_steps_move_the_student_alone(trained, rows, whole):
    before, _ = run_dir.load(trained / "model")
    made, folder, published = whole
    after = made.model
    stays = [v for part in ("embed", "bottom", "tower") for v in getattr(after, part).variables]
    assert len(stays) == 1 + 4 + 1  # the tables in one, the tower's two layers and its calls
    for variable in stays:
        same = next(v for v in before.variables if _path(v) == _path(variable))
        np.testing.assert_array_equal(variable, same, err_msg=variable.name)
    for variable in after.student_tower.variables:
        same = next(v for v in before.variables if _path(v) == _path(variable))
        assert np.abs(variable.numpy() - same.numpy()).max() > 1e-4, variable.name
    assert made.rows == 960  # the last 40 wait for others
    assert published == [BATCH] * 3
    # Tables are not in the checkpoints, whose size does not depend on them.
    newest = tf.train.latest_checkpoint(str(folder / "checkpoints"))
    sizes = [int(np.prod(shape)) for _, shape in tf.train.list_variables(newest)]
    assert max(sizes) < after.embed.tables["4"].shape[0] * 4
    report = json.loads((folder / "report.json").read_text())
    assert (report["rows"], report["step"]) == (960, 8000 // BATCH + 960 // BATCH)
    assert [entry["rows"] for entry in report["published"]] == [320, 640, 960]
    # Rows are scored before they are learned: the first batch by the model as it was.
    batch, targets = next(iter(readers.dataset(after.schema, rows, batch_size=BATCH)))
    scores = before.probabilities(batch)["student"][:, 0].numpy()
    first = report["windows"][0]["click"]
    assert first["log_loss"] == pytest.approx(log_loss(targets["labels"][:, 0], scores), abs=1e-6)
    losses = [window["click"]["log_loss"] for window in report["windows"]]
    assert report["totals"]["click"]["log_loss"] == pytest.approx(np.mean(losses))
    assert report["totals"]["click"]["auc"] > 0.7


def _path(variable):
    """A variable's name without the model's, which counts up."""
    return variable.name.split("/", 1)[-1] if "dual" in variable.name else variable.name


def test_it_starts_with_the_weights_and_the_optimisers_state(trained):
    model, step = hot_start(trained / "model", 0.25)
    recipe = run_dir.read_recipe(trained / "model")
    assert step == 8000 // BATCH
    assert float(model.optimizer.learning_rate) == 0.25
    weights = tf.train.latest_checkpoint(str(trained / "model" / "weights"))
    reader = tf.train.load_checkpoint(weights)
    for place, variable in enumerate(model.optimizer._variables):
        if place:  # before the moments stands the count of steps
            key = f"model/optimizer/_variables/{place}/.ATTRIBUTES/VARIABLE_VALUE"
            np.testing.assert_array_equal(variable, reader.get_tensor(key), err_msg=key)
    kernel = model.student_tower.head.kernel
    place = model.optimizer._index_dict[model.optimizer._var_key(kernel)]
    assert np.abs(model.optimizer._momentums[place]).max() > 0
    assert model.optimizer._momentums[place].shape == kernel.shape
    assert float(hot_start(trained / "model")[0].optimizer.learning_rate) == pytest.approx(
        recipe.train.optimizer["learning_rate"]
    )


def test_only_a_dual_dnn_has_a_student(trained, monkeypatch):
    _, recipe = run_dir.load(trained / "model")
    monkeypatch.setattr(run_dir, "load", lambda _: (object(), recipe))
    with pytest.raises(ValueError, match="should hold a `dual_dnn`"):
        hot_start(trained / "model")


def program(trained, folder, *arguments):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "qianmo.pipelines.online",
            f"--model_dir={trained / 'model'}",
            f"--model_base_path={trained / 'served' / 'm'}",
            f"--online_dir={folder}",
            f"--batch_size={BATCH}",
            f"--checkpoint_rows={BATCH}",
            "--publish_rows=400",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process, is_so):
    deadline = time.monotonic() + 300
    while not is_so():
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def done(folder):
    report = folder / "report.json"
    return json.loads(report.read_text())["rows"] if report.exists() else 0


def test_killed_and_started_again_it_takes_the_same_steps(trained, rows, whole, tmp_path):
    growing = tmp_path / "growing"
    growing.mkdir()
    for number in range(3):
        shutil.copy(rows / f"{number}.parquet", growing)
    killed = program(trained, tmp_path / "online", f"--folder={growing}")
    until(killed, lambda: done(tmp_path / "online") >= 3 * BATCH)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    again = program(trained, tmp_path / "online", f"--folder={growing}")
    for number in (3, 4):
        shutil.copy(rows / f"{number}.parquet", growing / f".{number}")
        os.rename(growing / f".{number}", growing / f"{number}.parquet")
    until(again, lambda: done(tmp_path / "online") == 960)
    again.terminate()
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err[-3000:]
    assert "Going on after" in out
    expected, found = (moved(f / "checkpoints") for f in (whole[1], tmp_path / "online"))
    assert set(expected) == set(found)
    assert len(expected) > 10
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # What was published last is what was learned, and no embeddings were written for it.
    served = trained / "served"
    version = max(int(p.name) for p in (served / "m").iterdir() if p.name.isdigit())
    assert version > 2
    assert [p.name for p in (served / "m_embeddings").glob("[0-9]*")] == ["1"]
    folder = served / "m" / str(version)
    assert "Qianmo>EmbeddingLookup" in op_types(folder)
    origin = json.loads((folder / "assets.extra/origin.json").read_text())
    assert origin["weights"] == run_dir.fingerprint(trained / "model")
    assert origin["data"]["train"]["rows"] == 8000
    moved_by = origin["online"]
    newest = tf.train.latest_checkpoint(str(tmp_path / "online" / "checkpoints"))
    assert moved_by["checkpoint"] == run_dir.checkpoint_fingerprint(newest)
    assert (moved_by["stream"], moved_by["rows"]) == (str(growing), 960)
    position = moved_by["position"]
    assert (position["file"], position["rows"]) == ("4.parquet", 60)
    assert position["passed"] == [f"{number}.parquet" for number in range(5)]
    model = whole[0].model
    batch = first_rows(model.schema, rows, 200)
    scores = model.probabilities({k: tf.constant(v) for k, v in batch.items()})["student"].numpy()
    with session(folder) as run:
        served_scores = run("serving_default", batch)["click"]
    np.testing.assert_allclose(served_scores, scores[:, 0], atol=1e-6)


def test_a_second_process_and_other_weights_are_refused(trained, rows, whole, monkeypatch):
    with (
        locks.alone(whole[1], "updates its student"),
        pytest.raises(ValueError, match="updates its student there"),
        locks.alone(whole[1], "updates its student"),
    ):
        pass
    monkeypatch.setattr(run_dir, "fingerprint", lambda _: "another")
    with pytest.raises(ValueError, match="holds updates of other weights"):
        updates(trained, whole[1], rows)


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_before_it(trained, rows, tmp_path):
    with pytest.raises(NotFiniteError, match=r"rows that end at row 128 of 0\.parquet of"):
        updates(trained, tmp_path, rows, learning_rate=1e38, checkpoint_rows=BATCH)
    assert done(tmp_path) == BATCH
    newest = moved(tmp_path / "checkpoints")
    assert len(newest) > 10


def test_the_whole_model_can_be_published_too(trained, tmp_path):
    model, recipe = run_dir.load(trained / "model")
    sample = first_rows(recipe.schema, recipe.data.train, 50)
    values = types.SimpleNamespace(model_base_path=str(tmp_path / "m"), form="in_graph")
    folder, worst = online._publisher(values)(model, sample, {"weights": "abc"})
    assert worst <= 1e-6
    assert json.loads((folder / "assets.extra/origin.json").read_text())["weights"] == "abc"
    assert not [op for op in op_types(folder) if ">" in op]
    values = types.SimpleNamespace(
        model_base_path=str(tmp_path / "m"),
        model_dir="runs/m",
        form="store",
        embedding_store=None,
        embedding_version=None,
        embedding_redis="",
    )
    with pytest.raises(ValueError, match="no embeddings are published there"):
        online._publisher(values)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    """A Redis server of its own: its address, and a client."""
    if redis_servers.MISSING:
        pytest.skip(redis_servers.REASON)
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as started:
        yield started.url("0"), started.client()


def add(client, key, path):
    """Adds a file's rows to a stream."""
    for row in pq.read_table(path).to_pylist():
        fields = {**row, "seen": "|".join(map(str, row["seen"])), "price": repr(row["price"])}
        client.xadd(key, fields)


def test_a_redis_stream_gives_the_same_steps_after_a_crash(
    trained, rows, whole, tmp_path, redis_server
):
    url, client = redis_server
    schema = run_dir.read_recipe(trained / "model").schema

    def go_on(stopped):
        made = Online(
            trained / "model",
            tmp_path / "online",
            lambda position: RedisStream(schema, url, "rows", "group", position),
            lambda model, sample, origin: (pathlib.Path("1"), 0.0),
            pace(),
        )
        made.run(stopped, stop_at_end=True)

    class CrashError(Exception):
        pass

    looks = iter(range(100))

    def crash():
        if next(looks) == 5:  # 320 rows were learned, 256 written down
            raise CrashError
        return False

    for number in (0, 1, 2):
        add(client, "rows", rows / f"{number}.parquet")
    with pytest.raises(CrashError):
        go_on(crash)
    pending = client.xpending("rows", "group")
    assert pending["pending"] == 64
    for number in (3, 4):
        add(client, "rows", rows / f"{number}.parquet")
    go_on(lambda: False)
    assert client.xpending("rows", "group")["pending"] == 40  # too few for a step
    assert client.xlen("rows") == 1000
    expected, found = (moved(f / "checkpoints") for f in (whole[1], tmp_path / "online"))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
