"""Chunks of a task's consecutive rows: coverage, order, repeatability, and training with them."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from qianmo.layers.schema import Schema
from qianmo.pipelines import run_dir
from qianmo.pipelines.data.chunks import ChunkReader
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import run as training

SCHEMA = {
    "features": [
        {"name": "row", "num_ids": 2000, "dim": 2},
        {"name": "kind", "dtype": "string", "dim": 2},
        {"name": "seen", "max_length": 2, "num_ids": 9, "dim": 2},
        {"kind": "dense", "name": "price"},
    ],
    "labels": ["click"],
    "task_id": "user",
    "timestamp": "time",
}
COUNT = 1000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Users of very different size; rows of the file in no order, many of equal time."""
    random = np.random.default_rng(5)
    user = (40 * random.random(COUNT) ** 1.5).astype(np.int64) - 3
    user[::90] = 50 + np.arange(12) // 3  # four users of three rows
    columns = {
        "row": np.arange(COUNT),
        "kind": np.where(user < 10, "a", "b"),
        "seen": [[int(u) % 9] * (int(u) % 4) for u in user],
        "price": random.normal(size=COUNT),
        "user": user,
        "time": random.integers(0, 200, COUNT),
        "click": (random.random(COUNT) < 0.5).astype(np.int8),
    }
    path: pathlib.Path = tmp_path_factory.mktemp("chunks") / "train.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=300)
    return path


def reader(data: pathlib.Path, rows: int = 7, tasks: int = 5) -> ChunkReader:
    return ChunkReader(Schema.from_config(SCHEMA), data, rows=rows, tasks=tasks)


def drawn(dataset: tf.data.Dataset) -> list[dict[str, Any]]:
    return [
        {name: column.numpy() for part in batch for name, column in part.items()}
        for batch in dataset
    ]


def chunks_of(batch: dict[str, Any]) -> list[Any]:
    """Row numbers of each chunk: neighbours of one user, time not running back."""
    task, time = batch["task_id"], batch["timestamp"]
    ends = np.flatnonzero((task[1:] != task[:-1]) | (time[1:] < time[:-1])) + 1
    return list(np.split(batch["row"], ends))


def test_each_epoch_holds_each_row_once_in_runs_of_one_task(data: pathlib.Path) -> None:
    table = pq.read_table(data)
    user, time = table["user"].to_numpy(), table["time"].to_numpy()
    own = {u: sorted(np.flatnonzero(user == u), key=lambda i: time[i]) for u in np.unique(user)}
    assert min(map(len, own.values())) < 7 < max(map(len, own.values()))
    chunks = reader(data)
    expected = sum(-(-len(rows) // 7) for rows in own.values())
    assert chunks.num_batches() == -(-expected // 5)
    cuts = []
    for epoch in (0, 1):
        batches = drawn(chunks.dataset(seed=1, epoch=epoch))
        assert len(batches) == chunks.num_batches()
        np.testing.assert_array_equal(
            np.sort(np.concatenate([b["row"] for b in batches])), np.arange(COUNT)
        )
        found = [rows.tolist() for batch in batches for rows in chunks_of(batch)]
        assert sum(len(rows) == 7 for rows in found) > 30
        for rows in found:
            mine = own[user[rows[0]]]
            start = mine.index(rows[0])
            assert rows == mine[start : start + len(rows)]
        cuts.append({rows[0] for rows in found})
        for batch in batches:
            np.testing.assert_array_equal(batch["task_id"], user[batch["row"]])
            np.testing.assert_array_equal(batch["kind"] == b"a", user[batch["row"]] < 10)
            np.testing.assert_array_equal(
                batch["seen_length"], np.minimum(user[batch["row"]] % 4, 2)
            )
            np.testing.assert_array_equal(
                batch["labels"][:, 0], table["click"].to_numpy()[batch["row"]]
            )
            assert (
                batch["original"].tolist() == batch["episode"].tolist() == [1.0] * len(batch["row"])
            )
    assert cuts[0] != cuts[1]


def test_chunks_of_one_task_seldom_meet(data: pathlib.Path) -> None:
    met, chunks = 0, reader(data, rows=2, tasks=10)
    for batch in drawn(chunks.dataset(seed=1)):
        _, rows = np.unique(batch["task_id"], return_counts=True)
        met += (rows > 2).sum()
    assert chunks.num_batches() > 50
    assert met < 5  # of 500; by chance it would be every tenth


def test_the_draw_depends_on_seed_and_epoch_alone_and_can_be_gone_on_with(
    data: pathlib.Path,
) -> None:
    chunks = reader(data)
    for shuffled in (0, 64):
        whole = drawn(chunks.dataset(seed=1, shuffled_rows=shuffled))
        assert len(whole) == chunks.num_batches(shuffled)
        again = drawn(reader(data).dataset(seed=1, shuffled_rows=shuffled, skip_batches=11))
        assert len(again) == len(whole) - 11
        for batch, same in zip(whole[11:], again, strict=True):
            for name, column in batch.items():
                np.testing.assert_array_equal(same[name], column)
        for other in ({"seed": 2}, {"seed": 1, "epoch": 1}):
            first = drawn(chunks.dataset(**other, shuffled_rows=shuffled))[0]
            assert first["row"].tolist() != whole[0]["row"].tolist()


def test_chunks_stand_beside_shuffled_rows(data: pathlib.Path) -> None:
    chunks = reader(data)
    batches = drawn(chunks.dataset(seed=1, shuffled_rows=10))
    assert len(batches) == 100 > 2 * chunks.num_batches()  # the chunks come round again
    original = np.concatenate([batch["row"][batch["original"] == 1] for batch in batches])
    np.testing.assert_array_equal(np.sort(original), np.arange(COUNT))
    assert (np.diff(original) == 1).mean() < 0.02
    passes = []
    for batch in batches:
        np.testing.assert_array_equal(batch["episode"], 1 - batch["original"])
        passes.append(batch["row"][batch["episode"] == 1])
    size = chunks.num_batches()
    for turn in (0, 1):
        rows = np.concatenate(passes[turn * size : (turn + 1) * size])
        np.testing.assert_array_equal(np.sort(rows), np.arange(COUNT))
    assert passes[0].tolist() != passes[size].tolist()


def test_without_a_time_a_tasks_rows_keep_the_files_order(data: pathlib.Path) -> None:
    schema = {**SCHEMA, "timestamp": ""}
    user = pq.read_table(data)["user"].to_numpy()
    chunks = ChunkReader(Schema.from_config(schema), data, rows=7, tasks=1)
    batches = [batch["row"] for batch in drawn(chunks.dataset(seed=1))]
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(COUNT))
    for rows in batches:
        own = np.flatnonzero(user == user[rows[0]])
        first = int(np.searchsorted(own, rows[0]))
        assert rows.tolist() == own[first : first + len(rows)].tolist()
    # A recipe needs no time either, where support is drawn at random.
    meta = {"split": "random", "inner": {"steps": 1}}
    recipe = config(data)
    recipe["model"] = {**recipe["model"], "meta": meta}
    assert not Recipe.from_config({**recipe, "schema": schema}).schema.timestamp
    recipe["model"]["meta"] = {**meta, "split": "time"}
    with pytest.raises(ValueError, match=r"`data.chunk_rows` needs `schema\.timestamp`"):
        Recipe.from_config({**recipe, "schema": schema})


def test_refusals(data: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="`rows` of chunks should be >= 1"):
        reader(data, rows=0)
    with pytest.raises(ValueError, match="`tasks` of chunks should be >= 1"):
        reader(data, tasks=0)
    untasked = Schema.from_config({**SCHEMA, "task_id": ""})
    with pytest.raises(ValueError, match=r"`schema\.task_id`, the column they are cut by"):
        ChunkReader(untasked, data, rows=2, tasks=2)
    for role in ("task_id", "timestamp"):
        with pytest.raises(ValueError, match=rf"`data.chunk_rows` needs `schema.{role}`"):
            Recipe.from_config({**config(data), "schema": {**SCHEMA, role: ""}})
    for key, value in (("chunk_rows", -1), ("chunk_tasks", 0)):
        with pytest.raises(ValueError, match=rf"`data.{key}` should be >="):
            Recipe.from_config(config(data, **{key: value}))


def config(data: pathlib.Path, **changes: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": str(data),
            "valid": "",
            "test": "",
            "test_support": "",
            "catalogue": "",
            "shuffle_rows": 500,
            "chunk_rows": 7,
            "chunk_tasks": 5,
            "chunks_beside": False,
            **changes,
        },
        "schema": SCHEMA,
        "model": {"name": "mlp", "units": [4], "dropout": 0.1},
        "train": {
            "seed": 3,
            "batch_size": 32,
            "epochs": 2,
            "optimizer": {"name": "adam", "learning_rate": 0.01},
            "table_optimizer": {"name": "sparse_adam", "learning_rate": 0.05},
            "meta_optimizer": {"name": "adam", "learning_rate": 0.02},
            "monitor": "auc",
            "patience": 2,
            "checkpoint_every": 8,
            "steps_per_call": 4,
            "dtype_policy": "float32",
            "start_from": "",
        },
    }


class KilledError(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    data: pathlib.Path, tmp_path: pathlib.Path, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_config(config(data, chunks_beside=beside))
    found = training.train(recipe, tmp_path / "whole")
    assert found["rows"]["train"] == COUNT
    assert found["history"][1]["train"]["loss"] < found["history"][0]["train"]["loss"]
    run = training.Run(recipe, tmp_path / "stopped")
    assert run.batches == (32 if beside else reader(data).num_batches())
    assert found["history"][-1]["step"] == 2 * run.batches
    saved = []

    def save() -> None:
        saved.append(tf.train.CheckpointManager.save(run.checkpoints))
        if len(saved) == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(run.checkpoints, "save", save)
        with pytest.raises(KilledError):
            run.train()
    assert 0 < int(run.position.batch) < run.batches
    training.train(recipe, tmp_path / "stopped")
    whole, stopped = (run_dir.load(tmp_path / name)[0] for name in ("whole", "stopped"))
    assert len(whole.weights) > 4
    for one, other in zip(whole.weights, stopped.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy(), err_msg=one.name)
