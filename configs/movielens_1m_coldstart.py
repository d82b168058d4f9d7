"""MovieLens-1M's new users and new films: a tower that adapts to what a user rated.

Rows as `qianmo-prepare --dataset=movielens_1m --split=melu` makes them. The labels ask whether a
rating is at least 2, 3, 4 and 5, so that 1 + the sum of the probabilities is the mean rating, and
1 + the number of those above 1/2 the median.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import movielens_1m_melu
from qianmo.configs.base import base_config

METHODS = ("meta", "plain")
# What a known user rated has shaped the vectors, so that in training small steps look right.
STEPS = 8
SUPPORT_SIZES = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80)


def get_config(method: str = "meta") -> ConfigDict:
    """The recipe; "plain" trains without episodes and adapts in serving alone."""
    if method not in METHODS:
        raise ValueError(f"The variant should be one of {METHODS}. Received: {method!r}")
    config = base_config()
    schema = movielens_1m_melu.schema(dim=8, ids=("movie_id",))
    # A zip code names a user or two, and a rare director or actor a film or two, whose ratings
    # would be learned by heart. Values left out at random teach row 0 what to expect of new ones;
    # rare ones alone, which are in films that few rated, would teach it too little of a rating.
    more: dict[str, dict[str, Any]] = {
        "director": {"min_count": 40, "drop_rate": 0.5},
        "actor": {"min_count": 40, "drop_rate": 0.5},
        "movie_id": {"drop_rate": 0.4},
    }
    schema["features"] = [
        {**f, **more.get(f["name"], {})} for f in schema["features"] if f["name"] != "zip_code"
    ]
    config.schema = {**schema, "labels": ("at_least_2", "at_least_3", "at_least_4", "at_least_5")}
    meta: dict[str, Any] = {
        "inner": {"steps": STEPS, "step_size": 0.2, "shrinkage": 3.0, "max_support": 100},
        "split": "random",
        "support_sizes": SUPPORT_SIZES,
        "weight": 0.0,
    }
    if method == "meta":
        # A user's taste is linear in the vectors, which learn from episodes what to be alike in.
        meta["inner"] |= {"step_size": 0.7, "rates": "rank_one"}
        meta |= {"weight": 1.0, "gradient_to": "embeddings"}
    config.model = {
        "name": "mlp",
        "units": (),
        "embedding_stddev": 0.03,
        "embedding_l2": 0.01,
        "meta": meta,
    }
    for part in ("train", "test"):
        config.data[part] = f"runs/movielens_1m_melu/{part}.parquet"
    config.data.chunk_rows, config.data.chunk_tasks = 100, 64
    config.train.epochs = 6
    # All stands still at the end: the level of all scores moves with the last steps.
    decay = {"decay": 1.0}
    config.train.optimizer = {"name": "adam", "learning_rate": 5e-3, **decay}
    config.train.table_optimizer = {"name": "sparse_adam", "learning_rate": 1e-2, **decay}
    return config
