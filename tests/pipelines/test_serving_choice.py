"""A tower that adapts chooses its steps and its least support on validation rows."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from qianmo.configs.base import base_config
from qianmo.pipelines import run_dir
from qianmo.pipelines.evaluation import adapted
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import train

TASKS, ROWS = 60, 40


def rows(seed: int, *, taste: float) -> dict[str, pa.Table]:
    """Tasks with a rate of their own, as strong as `taste`; the first half of each is support."""
    random = np.random.default_rng(seed)
    task = np.repeat(np.arange(TASKS) + 1000 * seed, ROWS)
    item = random.integers(0, 20, len(task))
    own = np.repeat(random.normal(size=TASKS) * taste, ROWS)
    logit = own + (item - 10) / 5
    table = pa.table(
        {
            "task": task,
            "item": item,
            "label": (random.random(len(task)) < 1 / (1 + np.exp(-logit))).astype(np.int8),
            "time": np.tile(np.arange(ROWS), TASKS),
        }
    )
    early = table["time"].to_numpy() < ROWS // 2
    return {"all": table, "support": table.filter(early), "query": table.filter(~early)}


def config(folder: pathlib.Path, *, taste: float) -> ConfigDict:
    made = base_config()
    for seed, (part, of) in enumerate((("train", "all"), ("valid", "query"), ("test", "query"))):
        tables = rows(seed, taste=taste)
        pq.write_table(tables[of], folder / f"{part}.parquet")
        made.data[part] = str(folder / f"{part}.parquet")
        if part != "train":
            pq.write_table(tables["support"], folder / f"{part}_support.parquet")
            made.data[f"{part}_support"] = str(folder / f"{part}_support.parquet")
    made.schema = {
        "features": [{"name": "item", "num_ids": 20, "dim": 4}],
        "labels": ["label"],
        "task_id": "task",
        "timestamp": "time",
    }
    inner = {"steps": 2, "step_size": 0.3, "shrinkage": 1.0, "max_support": ROWS // 2}
    made.model = {
        "name": "mlp",
        "units": (8,),
        "seam_dim": 4,
        "meta": {"inner": inner, "weight": 0.0},
    }
    made.train.epochs, made.train.batch_size, made.train.steps_per_call = 2, 64, 1
    made.train.optimizer.learning_rate = made.train.table_optimizer.learning_rate = 0.02
    return made


def test_it_is_chosen_kept_and_served(tmp_path: pathlib.Path) -> None:
    given = config(tmp_path, taste=2.0)
    found = train(Recipe.from_config(given.to_dict()), tmp_path / "model")
    last = found["history"][-1]
    assert last["monitor"] == last["valid"]["adapted"]["label"]["auc"]  # not the plain tower's
    assert last["valid"]["adapted"]["label"]["auc"] > last["valid"]["model"]["label"]["auc"] + 0.05
    chosen = json.loads((tmp_path / "model" / run_dir.SERVING).read_text())
    tried = {k: v for k, v in chosen["tried"].items() if k != "plain"}
    assert set(tried) == {"1", "2", "4", "8"}
    assert chosen["tried"][str(chosen["inner_steps"])] == max(tried.values())
    model, _ = run_dir.load(tmp_path / "model")
    assert model.meta.serving_steps == chosen["inner_steps"]
    assert model.meta.min_support == chosen["min_support"] <= ROWS // 2
    # The report's adapted metrics are those of the choice, on rows that had no part in it.
    again = adapted.with_all_support(model, given.data.test, given.data.test_support)
    assert again["label"]["all"] == found["adapted"]["test"]["adapted"]["label"]["all"]


def test_where_adapting_loses_nothing_is_adapted(tmp_path: pathlib.Path) -> None:
    given = config(tmp_path, taste=0.0)  # what a task has seen is noise
    given.model.meta.inner.step_size = 3.0
    train(Recipe.from_config(given.to_dict()), tmp_path / "model")
    model, _ = run_dir.load(tmp_path / "model")
    assert model.meta.min_support == ROWS // 2 + 1
    found = adapted.measure(model, given.data.test, given.data.test_support)["test"]
    assert found["adapted"]["label"]["all"] == found["plain"]["label"]["all"]


def test_what_the_recipe_says_stays(tmp_path: pathlib.Path) -> None:
    given = config(tmp_path, taste=2.0)
    given.model.meta.min_support = 3
    train(Recipe.from_config(given.to_dict()), tmp_path / "model")
    assert not (tmp_path / "model" / run_dir.SERVING).exists()
    model, _ = run_dir.load(tmp_path / "model")
    assert (model.meta.min_support, model.meta.serving_steps) == (3, None)


def test_towers_of_ratings_choose_by_their_error(tmp_path: pathlib.Path) -> None:
    given = config(tmp_path, taste=2.0)
    given.schema = {**given.schema.to_dict(), "label_kinds": {"label": "rating"}}
    given.train.monitor = "rmse"
    found = train(Recipe.from_config(given.to_dict()), tmp_path / "model")
    test = found["adapted"]["test"]
    assert test["adapted"]["label"]["all"]["rmse"] < test["plain"]["label"]["all"]["rmse"]
    chosen = json.loads((tmp_path / "model" / run_dir.SERVING).read_text())
    assert chosen["tried"][str(chosen["inner_steps"])] == min(chosen["tried"].values())
    assert chosen["min_support"] <= ROWS // 2
    table = adapted.curve_table(found["adapted"]["curve"], "label").splitlines()
    assert table[0].split()[-2:] == ["RMSE", "MAE"]
    assert "nan" not in "".join(table)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_support_needs_rows_and_a_tower_that_adapts(tmp_path: pathlib.Path, part: str) -> None:
    given = config(tmp_path, taste=0.0)
    given.data[part] = ""
    with pytest.raises(ValueError, match=rf"`data.{part}_support` needs `data.{part}`"):
        Recipe.from_config(given.to_dict())
    given = config(tmp_path, taste=0.0)
    given.model = {"name": "mlp"}
    with pytest.raises(ValueError, match=r"_support` needs `model.meta`"):
        Recipe.from_config(given.to_dict())
