"""Training end to end on the shipped KuaiRand sample: learning, killing, refusing."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.recipe import Recipe, optimizer
from qianmo.pipelines.training.run import Run, train
from qianmo.pipelines.training.watch import NotFiniteError

SCHEMA = {
    "features": [
        {"name": "user", "dim": 4},
        {"name": "item", "num_ids": 60, "dim": 4},
        {"kind": "dense", "name": "price"},
    ],
    "labels": ["click"],
    "task_id": "user",
    "group": "kind",
}


def write_rows(path, count, seed, price=None):
    """Rows whose click depends on user and item, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    taste, quality = np.random.default_rng(0).normal(size=(2, 60))
    user, item = rng.integers(0, 60, (2, count))
    click = rng.random(count) < 1 / (1 + np.exp(-2 * (taste[user] + quality[item])))
    columns = {
        "user": user,
        "item": item,
        "price": rng.normal(size=count).astype(np.float32) if price is None else price,
        "kind": np.where(user < 30, "new", "old"),
        "click": click.astype(np.int8),
    }
    pq.write_table(pa.table(columns), path, row_group_size=4096)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 30_000), ("valid", 3_000), ("test", 3_000)):
        write_rows(folder / f"{name}.parquet", count, len(name))
    return folder


def config(data, **changes):
    found = {
        "data": {k: str(data / f"{k}.parquet") for k in ("train", "valid", "test")}
        | {
            "test_support": "",
            "catalogue": "",
            "shuffle_rows": 10_000,
            "chunk_rows": 0,
            "chunk_tasks": 8,
            "chunks_beside": False,
        },
        "schema": SCHEMA,
        "model": {
            "name": "dual_dnn",
            "interactions": {"fm": {}},
            "teacher_units": [16],
            "student_units": [8],
            "dropout": 0.1,
        },
        "train": {
            "seed": 3,
            "batch_size": 64,
            "epochs": 2,
            "optimizer": {"name": "adam", "learning_rate": 0.01},
            "table_optimizer": {"name": "rowwise_adagrad", "learning_rate": 0.05},
            "meta_optimizer": {"name": "adam", "learning_rate": 0.02},
            "monitor": "auc",
            "patience": 2,
            "checkpoint_every": 50,
            "steps_per_call": 10,
            "dtype_policy": "float32",
            "start_from": "",
        },
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        found[section][name] = value
    return found


def weights(model_dir):
    path = tf.train.latest_checkpoint(str(pathlib.Path(model_dir) / run_dir.WEIGHTS))
    reader = tf.train.load_checkpoint(path)
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.startswith("model/")
    }


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    return folder, train(Recipe.from_config(config(data)), folder)


def test_it_learns_and_reports(finished):
    folder, found = finished
    click = found["test"]["student"]["click"]
    assert click["all"]["auc"] > 0.85
    assert click["all"]["gauc"] > 0.75
    assert set(click["group"]) == {"new", "old"}
    assert sum(part["rows"] for part in click["group"].values()) == click["all"]["rows"] == 3000
    losses = [entry["train"]["student_loss"] for entry in found["history"]]
    assert losses[1] < losses[0] < 0.65
    assert found["rows"] == {"train": 30_000, "valid": 3000, "test": 3000}
    assert found["history"][-1]["samples_per_second"] > 0
    assert found["peak_memory_bytes"] > 2**20
    assert found["parameters"]["teacher"]["dense"] > found["parameters"]["student"]["dense"]
    saved = json.loads((folder / "report.json").read_text())
    assert saved["test"] == run_dir.plain(found["test"])
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png") == 6
    assert list((folder / "tensorboard").glob("events*"))


def test_a_trained_model_loads_with_its_scores(finished, data):
    folder, _ = finished
    model, recipe = run_dir.load(folder)
    assert recipe.schema.is_complete
    from qianmo.pipelines.evaluation.scores import evaluate, score

    again = evaluate(score(model, str(data / "test.parquet")), model.schema)
    saved = json.loads((folder / "report.json").read_text())["test"]
    assert again["student"]["click"]["all"]["auc"] == saved["student"]["click"]["all"]["auc"]


def test_a_finished_run_is_not_run_again(finished, data):
    folder, found = finished
    again = train(Recipe.from_config(config(data)), folder)
    assert again["history"] == found["history"]
    with pytest.raises(ValueError, match=r"run of another recipe; they differ in train\.seed"):
        train(Recipe.from_config(config(data, train__seed=4)), folder)


def test_killed_and_started_again_it_ends_with_the_same_weights(finished, data, tmp_path):
    asked = tmp_path / "config.json"
    asked.write_text(json.dumps(config(data)))
    program = (
        "import json, sys\n"
        "from qianmo.pipelines.recipe import Recipe\n"
        "from qianmo.pipelines.training.run import train\n"
        f"train(Recipe.from_config(json.load(open({str(asked)!r}))), {str(tmp_path / 'model')!r})\n"
    )
    started = [sys.executable, "-c", program]
    kills = 0
    for number in (1, 4):  # killed once early, once later, after so many checkpoints
        process = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            done = [
                int(p.stem.split("-")[1]) for p in (tmp_path / "model").glob("checkpoints/*.index")
            ]
            if max(done, default=0) >= number:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2
    subprocess.run(started, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected, found = weights(finished[0]), weights(tmp_path / "model")
    assert len(expected) > 5
    assert set(expected) == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_columns(data, tmp_path, capsys):
    price = np.zeros(1000, np.float32)
    price[700] = 3e38
    write_rows(tmp_path / "train.parquet", 1000, 1, price)
    changed = config(tmp_path, data__valid="", data__test="", train__seed=5)
    changed["schema"] = {
        **SCHEMA,
        "features": [
            *SCHEMA["features"][:2],
            {"kind": "dense", "name": "price", "mean": 0.0, "variance": 1e-30},
        ],
    }
    with pytest.raises(NotFiniteError) as caught:
        train(Recipe.from_config(changed), tmp_path / "model")
    message, printed = str(caught.value), capsys.readouterr().out
    assert "\n" not in message
    step = int(message.split("at step ")[1].split()[0])
    assert step > 0  # so that it is not the first batch by chance
    assert f"batch {step}" in message
    assert "price: min 0.0, max 3.0000000054977558e+38, not finite 0" in printed
    assert not list((tmp_path / "model" / "checkpoints").glob("*.index"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train__batchsize": 3},
            r"config.train: unknown key `batchsize`; did you mean `batch_size`",
        ),
        ({"train__batch_size": 0}, r"`train.batch_size` should be >= 1"),
        ({"train__monitor": "ndcg"}, r"`train.monitor` should be"),
        ({"model__name": "deepfn"}, r"`model.name` should be one of"),
        (
            {"train__optimizer": {"name": "adam", "learning_rate": 1.0, "momentun": 1}},
            r"`train.optimizer`: .*momentun",
        ),
        (
            {"train__optimizer": {"name": "adam", "learning_rate": -1.0}},
            r"`train.optimizer.learning_rate` should be > 0\. Received: -1.0",
        ),
        (
            {"train__table_optimizer": {"name": "sgd"}},
            r"`train.table_optimizer.learning_rate` should be > 0\. Received: None",
        ),
        (
            {"train__optimizer": {"name": "adam", "learning_rate": 1.0, "decay": 252}},
            r"`train.optimizer.decay` should be a share of the run in \[0, 1\]",
        ),
        (
            {"train__optimizer": {"name": "adam", "learning_rate": 1.0, "decay_steps": 252}},
            r"`train.optimizer.decay_steps` is now `decay`, a share of the run's steps",
        ),
        ({"train__monitor_head": "model"}, r"`train.monitor_head` should be one of"),
        ({"train__start_except": ["embed"]}, r"`train.start_except` needs `train.start_from`"),
        ({"train__optimizer": {"name": "adom"}}, r"`train.optimizer.name` should be one of"),
        ({"data__train": "nowhere.parquet"}, r"nowhere.parquet"),
    ],
)
def test_refusals(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(Recipe.from_config(config(data, **changes)), tmp_path / "model")


def test_a_learning_rate_decays():
    config = {"name": "sgd", "learning_rate": 0.5, "decay": 0.5}
    made = optimizer(config, "train.optimizer", steps=4)
    weight = tf.Variable(1.0)
    weights = []
    for _ in range(4):
        made.apply_gradients([(tf.constant(1.0), weight)])
        weights.append(weight.numpy())
    np.testing.assert_allclose(weights, [0.5, 0.25, 0.25, 0.25], atol=1e-6)
    assert optimizer(config, "train.optimizer").learning_rate == 0.5  # of no run: it stays


def test_a_mistake_leaves_nothing_that_stands_in_the_way(data, tmp_path):
    with pytest.raises(ValueError, match="unknown argument"):
        train(Recipe.from_config(config(data, model__student_unit=[4])), tmp_path / "model")
    with pytest.raises(ValueError, match=r"nowhere\.csv"):
        train(Recipe.from_config(config(data, data__valid="nowhere.csv")), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_run_starts_from_another_with_its_vocabularies(finished, data, tmp_path):
    folder, _ = finished
    write_rows(tmp_path / "train.parquet", 2000, 9)
    for name in ("valid", "test"):
        (tmp_path / f"{name}.parquet").symlink_to(data / f"{name}.parquet")
    frozen = {"train__start_from": str(folder), "model__teacher_frozen": True, "train__epochs": 1}
    fresh = Run(Recipe.from_config(config(tmp_path, **frozen)), tmp_path / "fresh")
    assert int(fresh.model.optimizer.iterations) == 0  # weights are taken over, moments are not
    np.testing.assert_array_equal(
        fresh.model.student_tower.head.kernel, run_dir.load(folder)[0].student_tower.head.kernel
    )
    train(Recipe.from_config(config(tmp_path, **frozen)), tmp_path / "model")
    before, after = (run_dir.load(f)[0] for f in (folder, tmp_path / "model"))
    assert after.schema == before.schema
    np.testing.assert_array_equal(after.embed.tables["4"], before.embed.tables["4"])
    alone = {**frozen, "train__start_from": ""}
    with pytest.raises(ValueError, match=r"needs `train\.start_from`"):
        train(Recipe.from_config(config(tmp_path, **alone)), tmp_path / "other")
    other = config(tmp_path, **frozen)
    other["schema"] = {
        **SCHEMA,
        "features": [
            {**f, "dim": 4, "num_ids": 61} if f["name"] == "item" else f for f in SCHEMA["features"]
        ],
    }
    with pytest.raises(ValueError, match=r"`embed`: table `item`, `num_ids`: 61 and there 60"):
        train(Recipe.from_config(other), tmp_path / "other")


def test_one_class_in_the_validation_rows_is_refused_before_training(data, tmp_path):
    one = pq.read_table(data / "valid.parquet").slice(0, 50)
    one = one.set_column(one.schema.get_field_index("click"), "click", pa.array([1] * 50))
    pq.write_table(one, tmp_path / "valid.parquet")
    write_rows(tmp_path / "train.parquet", 2000, 9)
    changed = config(tmp_path, data__test="", model__hint_weight=0.1, train__epochs=3)
    for monitor in ("auc", "gauc"):
        changed["train"]["monitor"] = monitor
        with pytest.raises(readers.DataError, match=f"`train.monitor` {monitor} is defined for no"):
            train(Recipe.from_config(changed), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    changed["train"]["monitor"] = "log_loss"
    found = train(Recipe.from_config(changed), tmp_path / "model")
    assert all(e["monitor"] is not None for e in found["history"])
    assert "hint" in found["history"][0]["train"]
    json.loads((tmp_path / "model" / "report.json").read_text(), parse_constant=pytest.fail)
    run_dir.load(tmp_path / "model")


def test_a_label_without_a_metric_does_not_switch_early_stopping_off(data, tmp_path, capsys):
    for part in ("train", "valid"):
        table = pq.read_table(data / f"{part}.parquet").slice(0, 2000)
        buys = np.arange(len(table)) % 50 == 0 if part == "train" else np.zeros(len(table), bool)
        table = table.append_column("buy", pa.array(buys.astype(np.int8)))
        pq.write_table(table, tmp_path / f"{part}.parquet")
    changed = config(tmp_path, data__test="", train__epochs=6, train__patience=1)
    changed["schema"] = {**SCHEMA, "labels": ["click", "buy"]}
    changed["train"]["optimizer"]["learning_rate"] = 0.1  # so that it soon overfits
    found = train(Recipe.from_config(changed), tmp_path / "model")
    monitors = [e["monitor"] for e in found["history"]]
    clicks = [e["valid"]["student"]["click"]["auc"] for e in found["history"]]
    assert monitors == clicks
    assert len(monitors) < 6
    assert clicks[-1] < max(clicks)
    assert capsys.readouterr().out.count("auc of ['buy'] is not defined") == 1


def test_a_bad_row_met_while_training_names_file_column_and_row(data, tmp_path):
    write_rows(tmp_path / "train.parquet", 600, 1)
    rows = pq.read_table(tmp_path / "train.parquet")
    labels = rows.column("click").to_numpy().astype(np.float32)
    labels[417] = np.nan
    place = rows.schema.get_field_index("click")
    pq.write_table(
        rows.set_column(place, "click", pa.array(labels, from_pandas=False)),
        tmp_path / "train.parquet",
    )
    changed = config(tmp_path, data__valid="", data__test="", train__epochs=1)
    # Nothing is to be counted, so that the row is first met in the middle of training.
    changed["schema"] = {
        "features": [
            {"name": "user", "num_ids": 60, "dim": 4},
            {"name": "item", "num_ids": 60, "dim": 4},
        ],
        "labels": ["click"],
    }
    with pytest.raises(readers.DataError, match=r"train\.parquet.*click.*417") as caught:
        train(Recipe.from_config(changed), tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_short_run_can_be_asked_for_again(data, tmp_path):
    write_rows(tmp_path / "train.parquet", 100, 1)
    short = config(tmp_path, data__valid="", data__test="", train__epochs=1)
    train(Recipe.from_config(short), tmp_path / "model")  # too short for a speed: null in the JSON
    again = train(Recipe.from_config(short), tmp_path / "model")
    assert again["history"][0]["samples_per_second"] is None


def test_the_program_takes_a_recipe_and_overrides(data, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({config(data)!r})\n"
    )
    command = [sys.executable, "-m", "qianmo.pipelines.train", f"--config={recipe}"]
    command += [f"--model_dir={tmp_path / 'model'}", "--config.train.epochs=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "samples/s" in done.stderr
    assert "valid student click AUC" in done.stdout
    wrong = subprocess.run(
        [*command, "--config.train.epoks=1"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode != 0
    assert "epoks" in wrong.stderr
