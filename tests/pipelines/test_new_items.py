"""First vectors for new items, from a model directory to a model directory."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zygote

from qianmo.configs.base import base_config
from qianmo.pipelines import run_dir
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

ITEMS, KNOWN = 40, 30


def made(folder: pathlib.Path) -> pathlib.Path:
    rng = np.random.default_rng(0)
    item = rng.integers(0, KNOWN, 3000)
    table = {
        "item": item,
        "kind": item % 4,
        "user": rng.integers(0, 20, len(item)),
        "label": (rng.random(len(item)) < np.where(item % 2, 0.8, 0.2)).astype(np.int8),
        "time": np.arange(len(item)),
    }
    pq.write_table(pa.table(table), folder / "train.parquet")
    items = pa.table({"item": np.arange(ITEMS), "kind": np.arange(ITEMS) % 4})
    pq.write_table(items, folder / "items.parquet")
    return folder


def test_the_program_fills_the_rows_of_new_items_alone(
    tmp_path: pathlib.Path, programs: zygote.Zygote
) -> None:
    data = made(tmp_path)
    config = base_config()
    config.schema = {
        "features": [
            {"name": "user", "num_ids": 20, "dim": 4, "side": "user"},
            {"name": "item", "num_ids": ITEMS, "dim": 4, "side": "item"},
            {"name": "kind", "dim": 4, "side": "item"},
        ],
        "labels": ("label",),
        "timestamp": "time",
    }
    config.data.train = str(data / "train.parquet")
    config.model = {"name": "mlp", "units": (8,)}
    config.train.epochs = 1
    Run(Recipe.from_config(config.to_dict()), tmp_path / "known").train()
    done = programs.run(
        "cold_items",
        f"--model_dir={tmp_path / 'known'}",
        "--item_id=item",
        f"--items={data / 'items.parquet'}",
        f"--output={tmp_path / 'filled'}",
        "--rows=5",
    )
    assert done.code == 0, done.stderr
    assert "first vectors of 10 new items" in done.stdout
    (before, _), (after, recipe) = (run_dir.load(tmp_path / name) for name in ("known", "filled"))
    assert recipe.data.train == config.data.train
    table, first, end_row = before.embed.rows("item")
    old, new = (m.embed.rows("item")[0].numpy()[first:end_row] for m in (before, after))
    assert np.flatnonzero((old != new).any(1)).tolist() == list(range(1 + KNOWN, 1 + ITEMS))
    # Items of one kind have one vector, since nothing else is known of them.
    np.testing.assert_array_equal(new[1 + 30], new[1 + 34])
    assert table.shape[1] == 4
