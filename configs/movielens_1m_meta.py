"""MovieLens-1M likes: towers that adapt to each user, and what they should be better than.

Protocols, as `qianmo-prepare --dataset=movielens_1m --split=<protocol>` makes them:

    new_users  users that training has not seen; no user id among the features, and no zip code,
               which nearly tells the user: a model that learns users by heart leaves its tower
               nothing to adapt to
    all_users  the last rows of every user; the user id is a feature
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import history, movielens_1m
from qianmo.configs.base import base_config

PROTOCOLS = ("new_users", "all_users")
METHODS = ("plain", "ppnet", "poso", "meta", "rate", "history", "history_meta")
SUPPORT_SIZES = (1, 2, 3, 5, 8, 12, 20)
# Passes over the rows, those that were best on rows of the training users, cut off as the test rows
# are. A model that is told a user's rate learns the user's id slowly.
PASSES = {
    "new_users": dict(plain=2, ppnet=3, poso=3, meta=3, rate=2, history=2, history_meta=3),
    "all_users": dict(plain=3, ppnet=6, poso=6, meta=3, rate=6, history=6, history_meta=3),
}
# How an ordinary model is fine-tuned in serving, found there too: steps, their size, least support.
FINE_TUNED = {"new_users": (5, 0.1, 5), "all_users": (3, 0.03, 5)}
# Steps of a meta tower in serving, found there too, where more than in training are better.
SERVING_STEPS = {"all_users": 12}
META: dict[str, Any] = {
    "inner": {"steps": 3, "step_size": 0.1, "rates": "rank_one", "shrinkage": 3.0},
    "support_sizes": SUPPORT_SIZES,
    "weight": 1.0,
}


def protocol_and_method(variant: str, protocols: tuple[str, ...]) -> tuple[str, str]:
    """The parts of `<protocol>-<method>`."""
    protocol, _, name = variant.partition("-")
    if protocol not in protocols or name not in METHODS:
        raise ValueError(
            f"The variant should be one of {protocols}, a -, and one of {METHODS}. "
            f"Received: {variant!r}"
        )
    return protocol, name


def method(
    name: str,
    features: list[dict[str, Any]],
    item: str,
    *,
    stop_at_seam: bool,
    personal: tuple[str, ...],
    fine_tuned: tuple[int, float, int],
    serving_steps: int | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Features and model of a method, whatever the data.

    Args:
      name: one of METHODS.
      features: of the plain model.
      item: feature of the item.
      stop_at_seam: whether the meta gradient stops at the tower seam.
      personal: features that the gates of PPNet and POSO read.
      fine_tuned: how the plain model adapts in serving: steps, their size, least support.
      serving_steps: those of the meta tower without history features, where they differ.
    """
    items = next(f for f in features if f["name"] == item)
    features = list(features)
    if name in ("history", "history_meta", "rate"):
        features += history.features(items, lists=name != "rate")
    if name in ("ppnet", "poso"):
        return features, {"name": name, "units": (256, 128, 64), "gate_features": personal}
    model: dict[str, Any] = {
        "name": "mlp",
        "units": (256, 128),
        "seam_dim": 64,
        "tower_units": (64,),
    }
    if name.endswith("meta"):
        model["meta"] = {**META, "gradient_to": "tower" if stop_at_seam else "bottom"}
        if name == "meta" and serving_steps:
            model["meta"]["serving_steps"] = serving_steps
    elif name == "plain":
        steps, size, least = fine_tuned
        inner = {"steps": steps, "step_size": size, "shrinkage": 3.0}
        model["meta"] = {"inner": inner, "weight": 0.0, "min_support": least}
    return features, model


def get_config(variant: str = "new_users-meta") -> ConfigDict:
    """The recipe of `<protocol>-<method>`."""
    protocol, name = protocol_and_method(variant, PROTOCOLS)
    config = base_config()
    schema = movielens_1m.schema()
    is_new = protocol == "new_users"
    left_out = ("user_id", "zip_code") if is_new else ()
    features = [f for f in schema["features"] if f["name"] not in left_out]
    users = tuple(f["name"] for f in features if f["side"] == "user")
    schema["features"], model = method(
        name,
        features,
        "movie_id",
        stop_at_seam=not is_new,
        personal=users if is_new else ("user_id",),
        fine_tuned=FINE_TUNED[protocol],
        serving_steps=SERVING_STEPS.get(protocol),
    )
    config.schema = schema
    config.model = {**model, "embedding_l2": 1e-2}
    for part in ("train", "test"):
        config.data[part] = f"runs/movielens_1m_{protocol}/{part}.parquet"
    config.train.batch_size = 1024
    config.train.epochs = PASSES[protocol][name]
    if name.endswith("meta"):
        config.data.chunk_rows, config.data.chunk_tasks = 40, 100
        config.data.chunks_beside = not is_new
    return config
