"""What a calibration brings on rows that it was not fitted on, and which labels it leaves alone."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from qianmo.configs import kuairand_domains
from qianmo.layers import metrics
from qianmo.pipelines import run_dir
from qianmo.pipelines.datasets import kuairand
from qianmo.pipelines.evaluation.calibration import Logits, logits, table
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.preparing import completed
from qianmo.pipelines.training.run import train


def errors(rows: Logits, scores: np.ndarray) -> np.ndarray:
    """|PCOC - 1| of each label and domain, as a mean over the clicks, long views of each label."""
    found = []
    for k in range(len(rows.schema.labels)):
        y, p = rows.labels[:, k], scores[:, k]
        domains = [rows.domain == value for value in np.unique(rows.domain)]
        pcoc = np.array([metrics.pcoc(y[own], p[own]) for own in domains])
        found.append(np.average(np.abs(pcoc - 1), weights=[y[own].sum() for own in domains]))
    return np.array(found)


def test_the_tabs_of_a_later_day_are_calibrated_better(tmp_path: pathlib.Path) -> None:
    kuairand.kuairand(None, tmp_path / "rows")
    config = kuairand_domains.get_config("domain_id")
    for part in ("train", "valid", "test"):
        config.data[part] = str(tmp_path / "rows" / f"{part}.parquet")
    config.model = {"name": "mlp", "units": (32, 16)}
    config.train.epochs = 1
    train(Recipe.from_config(config.to_dict()), tmp_path / "run")
    model, recipe = run_dir.load(tmp_path / "run")

    scaling = logits(model, recipe.data.valid).fitted()["model"]
    rows = logits(model, recipe.data.test)
    before, after = rows.probabilities("model"), rows.probabilities("model", scaling)
    assert (errors(rows, after) < 0.85 * errors(rows, before)).all()
    for k in range(2):
        y = rows.labels[:, k]
        assert metrics.log_loss(y, after[:, k]) < metrics.log_loss(y, before[:, k])
        for value in np.unique(rows.domain):  # the order within a domain stays
            own = rows.domain == value
            auc = metrics.auc(y[own], rows.heads["model"][own, k])
            # Rounding to float32 can tie scores.
            np.testing.assert_allclose(metrics.auc(y[own], after[own, k]), auc, atol=1e-4)


def test_ratings_alone_are_refused_and_among_others_left_as_they_are(
    world: pathlib.Path,
) -> None:
    recipe = run_dir.read_recipe(world / "plain")
    config = recipe.to_config()
    config["schema"] |= {"label_kinds": {"price": "rating"}, "labels": ("click", "price")}
    config["schema"]["features"] = [f for f in config["schema"]["features"] if f["name"] != "price"]
    both = completed(Recipe.from_config(config))
    rows = logits(run_dir.build(both), recipe.data.test)
    scaling = rows.fitted()["model"]
    np.testing.assert_array_equal(scaling.a[:, 1], 1.0)
    assert "a rating, which stays as it is" in table(rows, {"model": scaling})
    config["schema"] |= {"labels": ("price",)}
    alone = completed(Recipe.from_config(config))
    with pytest.raises(ValueError, match=r"The labels \('price',\) are ratings"):
        logits(run_dir.build(alone), recipe.data.test).fitted()


def test_rows_without_any_and_other_heads_are_refused(
    world: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, recipe = run_dir.load(world / "dual")
    with pytest.raises(ValueError, match=r"`heads` should be some of .*Received: \['techer'\]"):
        logits(model, recipe.data.test, ["techer"])
    both = logits(model, recipe.data.test, ["student", "teacher"])
    assert [*both.heads] == ["student", "teacher"]
    assert [*both.fitted()] == ["student", "teacher"]
    empty = tmp_path / "empty.parquet"
    pq.write_table(pq.read_table(recipe.data.test).slice(0, 0), empty)
    with pytest.raises(ValueError, match="no rows"):
        logits(model, str(empty)).fitted()
