"""Ratings, labels that are absent and label weights, from a table to a served mean."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ml_collections import ConfigDict

from qianmo.configs.base import base_config
from qianmo.pipelines import run_dir
from qianmo.pipelines.evaluation import scores
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import train

USERS, ITEMS = 40, 30


def rows(count: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    taste, quality = np.random.default_rng(7).normal(size=(2, 40))
    user, item = random.integers(0, USERS, count), random.integers(0, ITEMS, count)
    stars = 30 + 5 * (taste[user] + quality[item]) + random.normal(size=count)
    like = (stars > 30).astype(float)
    return pa.table(
        {
            "user": [f"user {u}" for u in user],
            "item": item,
            "stars": stars,
            "like": pa.array(np.where(random.random(count) < 0.3, np.nan, like), from_pandas=True),
            "trust": (random.random(count) < 0.8).astype(np.float32),
        }
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ConfigDict:
    folder = tmp_path_factory.mktemp("rows")
    config = base_config()
    for seed, part in enumerate(("train", "valid", "test")):
        pq.write_table(rows(6000 if part == "train" else 1500, seed), folder / f"{part}.parquet")
        config.data[part] = str(folder / f"{part}.parquet")
    config.schema = {
        "features": [
            {"name": "user", "dtype": "string", "dim": 4},
            {"name": "item", "dim": 4},
        ],
        "labels": ["stars", "like"],
        "label_kinds": {"stars": "rating"},
        "label_weights": {"stars": "trust", "like": 0.5},
        "optional_labels": ["like"],
        "task_id": "user",
        "task_dtype": "string",
    }
    config.model = {"name": "deepfm", "units": (16,)}
    config.train.epochs, config.train.batch_size, config.train.steps_per_call = 6, 128, 1
    config.train.monitor = "rmse"
    for name in ("optimizer", "table_optimizer"):
        config.train[name].learning_rate = 0.02
    return config


@pytest.fixture(scope="module")
def trained(
    config: ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("run") / "model"
    return folder, train(Recipe.from_config(config.to_dict()), folder)


def test_a_rating_is_learned_in_its_own_units(trained: Any, config: ConfigDict) -> None:
    folder, found = trained
    test = pq.read_table(config.data.test)
    own = test["trust"].to_numpy() > 0  # rows of weight 0 for a label do not have it
    stars = test["stars"].to_numpy()[own]
    label = found["test"]["model"]["stars"]["all"]
    assert label["rows"] == own.sum()
    # Guessing the mean has an error of 7; the noise has one of 1.
    assert np.std(stars) > 5
    assert label["rmse"] < 0.4 * np.std(stars)
    assert label["mae"] < label["rmse"]
    assert abs(label["bias"]) < 1
    assert found["history"][0]["monitor"] == found["history"][0]["valid"]["model"]["stars"]["rmse"]
    model, _ = run_dir.load(folder)
    scored = scores.score(model, config.data.test)
    errors = scored.probabilities["model"][own, 0] - stars
    assert label["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-5)


def test_labels_that_are_absent_are_left_out(trained: Any, config: ConfigDict) -> None:
    _, found = trained
    likes = pq.read_table(config.data.test)["like"]
    label = found["test"]["model"]["like"]["all"]
    assert label["rows"] == len(likes) - likes.null_count
    assert label["auc"] > 0.85
    assert found["look"]["train"]["labels"]["like"]["rows"] < 6000


def test_the_report_shows_both_kinds(trained: Any) -> None:
    folder, found = trained
    page = (folder / "report.html").read_text()
    assert "<th>RMSE</th>" in page
    assert "<th>AUC</th>" in page
    text = scores.table(found["test"])
    assert "RMSE" in text
    assert "PCOC" in text


def test_a_metric_of_the_other_kind_is_refused(config: ConfigDict, tmp_path: pathlib.Path) -> None:
    alone = config.copy_and_resolve_references()
    alone.schema = {
        **config.schema.to_dict(),
        "labels": ("stars",),
        "label_weights": {},
        "optional_labels": (),
    }
    alone.train.monitor = "auc"
    with pytest.raises(ValueError, match=r"`train.monitor` auc is defined for no label.*rmse"):
        train(Recipe.from_config(alone.to_dict()), tmp_path / "model")
