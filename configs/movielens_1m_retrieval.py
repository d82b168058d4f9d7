"""MovieLens-1M, the next film of each user: two towers whose user's side adapts.

Variants `<use>-<method>`. The uses, both of one task a user:

    users     the user's id is a feature; support are the user's last 20 rows before the ones to be
              found, as an hourly job would fetch them
    sequence  the user is the last 20 films, which are also the support: no job, and no user's id

The methods: "fine_tune" trains an ordinary model and adapts in serving alone, "meta" trains for it.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import movielens_1m
from qianmo.configs.base import base_config

USES = ("users", "sequence")
METHODS = ("fine_tune", "meta")
ROWS = "runs/movielens_1m_next_item"
DIM = 32
# Who is known by a list has moved with it already: a step by the same films should be small.
STEP_SIZES = {"users": 0.1, "sequence": 0.01}
# The film has its id alone where films of the list are support, which no row describes.
FEATURES = {
    "users": (
        "user_id",
        "gender",
        "age",
        "occupation",
        "movie_id",
        "first_genre",
        "genres",
        "year",
    ),
    "sequence": ("gender", "age", "occupation", "movie_id"),
}
WATCHED = {"name": "watched", "side": "user", "num_ids": 3953, "max_length": 20}


def get_config(variant: str = "users-meta") -> ConfigDict:
    """The recipe of `<use>-<method>`."""
    use, _, method = variant.partition("-")
    if use not in USES or method not in METHODS:
        raise ValueError(
            f"The variant should be one of {USES}, a -, and one of {METHODS}. Received: {variant!r}"
        )
    config = base_config()
    schema = movielens_1m.schema()
    features = [f for f in schema["features"] if f["name"] in FEATURES[use]]
    if use == "sequence":
        features.append({**WATCHED, "table": "movie_id"})
    schema["features"] = [{**f, "dim": DIM} for f in features]
    config.schema = schema
    meta: dict[str, Any] = {
        "inner": {"steps": 3, "step_size": STEP_SIZES[use], "shrinkage": 3.0},
        "weight": 1.0 if method == "meta" else 0.0,
        # A user whose id is a feature is known by heart: only the tower learns from episodes.
        "gradient_to": "tower" if use == "users" else "bottom",
    }
    if method == "meta":
        meta["inner"]["rates"] = "rank_one"
        meta["support_sizes"] = (1, 2, 3, 5, 8, 12, 20)
    config.model = {
        "name": "two_tower",
        "item_id": "movie_id",
        "dim": DIM,
        "units": (128,),
        "seam_dim": 64,
        "item_units": (128,),
        "temperature": 0.05,
        "embedding_l2": 1e-3,
        "meta": meta,
    }
    if use == "sequence":
        config.model.support_feature = "watched"
    for part in ("train", "valid", "test"):
        config.data[part] = f"{ROWS}/{part}.parquet"
    config.data.catalogue = f"{ROWS}/items.parquet"
    if use == "users":
        config.data.test_support = f"{ROWS}/test_support.parquet"
        if method == "meta":
            config.data.chunk_rows, config.data.chunk_tasks = 40, 25
            config.data.chunks_beside = True
    config.data.shuffle_rows = 2**20  # all of them, which lie in the file by time
    config.train.batch_size = 1024
    config.train.epochs = 8
    for optimizer in (config.train.optimizer, config.train.table_optimizer):
        optimizer.learning_rate = 3e-3
    config.train.monitor = "ndcg_10"
    return config
