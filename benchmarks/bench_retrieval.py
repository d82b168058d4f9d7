"""The next film of each user, found by two towers: plain, fine-tuned in serving, meta-trained.

MovieLens-1M, the last row of every user; its film is ranked among all 3,706 but those the user is
known to have rated. Both uses of `configs/movielens_1m_retrieval.py`. The plain and the adapted
vectors of a row come from the same weights.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import common
import numpy as np
import pyarrow.parquet as pq
import tf_keras

from qianmo.configs import movielens_1m_retrieval
from qianmo.layers import metrics
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

NAME = "retrieval"
SEEDS = (1,)  # three make a claim; one tells whether it is worth making
EPOCHS = 2
PARTS = ("train", "valid", "test", "test_support", "items")
LEAST_HR_100 = 0.1783  # torch-rechub's better two-tower model, on the last film of each user
METRICS = ("hr_10", "ndcg_10", "hr_100")
METHODS = {"fine_tune": "ordinary training", "meta": "meta-trained"}
HEADS = {"model": "plain", "adapted": "adapted"}
USES = {"users": "user id; support: last 20 rows", "sequence": "last 20 films; support: the same"}


def popularity(folder: pathlib.Path) -> dict[str, float]:
    """What the most watched films that a user does not know would find."""
    parts = {
        name: pq.read_table(folder / f"{name}.parquet", columns=["user_id", "movie_id"])
        for name in ("train", "valid", "test")
    }
    user, film = (
        {name: part[c].to_numpy().astype(np.int64) for name, part in parts.items()}
        for c in ("user_id", "movie_id")
    )
    counts = np.bincount(film["train"], minlength=3953).astype(np.float64)
    scores = np.tile(counts, (6041, 1))
    for name in ("train", "valid"):
        scores[user[name], film[name]] = -np.inf
    scores[user["test"], film["test"]] = counts[film["test"]]
    return metrics.retrieval(metrics.ranks(scores[user["test"]], film["test"]), retrieval.SIZES)


def unit(folder: pathlib.Path, variant: str, seed: int, *, quick: bool) -> Mapping[str, Any]:
    """Trains one recipe; returns head -> metrics of the test rows."""
    config = movielens_1m_retrieval.get_config(variant)
    paths = {part: str(folder / f"{part}.parquet") for part in PARTS}
    config.data.train, config.data.catalogue = paths["train"], paths["items"]
    config.data.valid = config.data.test = config.data.test_support = ""
    config.train.seed = seed
    config.train.epochs = EPOCHS
    if quick:
        config.train.epochs = 1
        config.data.train = paths["test_support"]
    tf_keras.backend.clear_session()
    with common.model_dir() as temporary:
        trained = Run(Recipe.from_config(config.to_dict()), temporary)
        trained.train()
    return measured(trained.model, paths)


def measured(model: Any, paths: Mapping[str, str]) -> Mapping[str, Any]:
    """Head -> metrics of the test rows; what users have had in validation is known too."""
    known = [paths["train"], paths["valid"]]
    report = retrieval.measure(model, paths["test"], paths["items"], known, paths["test_support"])
    return {head: common.test_metrics({"test": report}, head) for head in HEADS}


def run(*, quick: bool) -> dict[str, Any]:
    """All uses and methods."""
    folder = common.movielens_1m("next_item", ties="by_row")
    found = popularity(folder)
    rows = [{"user": "", "training": "popularity", "vectors": ""} | _shown([found])]
    values: dict[tuple[str, str, str], list[Mapping[str, float]]] = {}
    for seed in SEEDS:
        for use in USES:
            for method in METHODS:
                variant = f"{use}-{method}"
                make = functools.partial(unit, folder, variant, seed, quick=quick)
                heads = make() if quick else common.kept(NAME, f"{variant} {seed}", make)
                for head, metrics_of_head in heads.items():
                    values.setdefault((use, method, head), []).append(metrics_of_head)
    for (use, method, head), seeds in values.items():
        named = {"user": USES[use], "training": METHODS[method], "vectors": HEADS[head]}
        rows.append(named | _shown(seeds))

    def mean(use: str, method: str, head: str, metric: str) -> float:
        return float(np.mean([found[metric] for found in values[use, method, head]]))

    targets = {}
    for use in USES:
        plain = mean(use, "fine_tune", "model", "ndcg_10")
        targets[f"{USES[use]}: HR@100, plain"] = common.target(
            mean(use, "fine_tune", "model", "hr_100"), LEAST_HR_100
        )
        for method in METHODS:
            targets[f"{USES[use]}: NDCG@10 of {METHODS[method]}, adapted, over plain"] = (
                common.target(mean(use, method, "adapted", "ndcg_10") - plain, 0.0)
            )
    if not quick:
        common.finished(NAME)
    return {"data_sha256": common.sha256(folder), "rows": rows, "targets": targets}


def _shown(seeds: list[Mapping[str, float]]) -> dict[str, str]:
    titles = {"hr_10": "HR@10", "ndcg_10": "NDCG@10", "hr_100": "HR@100"}
    return {titles[m]: common.shown([found[m] for found in seeds]) for m in METRICS}
