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
# Sizes of the steps by which an ordinary model is fine-tuned in serving, found on `valid`.
FINE_TUNED = {"new_users": 0.1, "all_users": 0.03}
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
    fine_tuned: float,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Features and model of a method, whatever the data.

    Args:
      name: one of METHODS.
      features: of the plain model.
      item: feature of the item.
      stop_at_seam: whether the meta gradient stops at the tower seam.
      personal: features that the gates of PPNet and POSO read.
      fine_tuned: size of the steps by which the plain model adapts in serving.
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
    elif name == "plain":
        inner = {"steps": 3, "step_size": fine_tuned, "shrinkage": 3.0}
        model["meta"] = {"inner": inner, "weight": 0.0}
    return features, model


def parts(model: dict[str, Any]) -> tuple[str, ...]:
    """The parts of the data that a model reads: support too, if its tower adapts."""
    support = ("valid_support", "test_support") if "meta" in model else ()
    return ("train", "valid", "test", *support)


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
    )
    config.schema = schema
    config.model = {**model, "embedding_l2": 1e-2}
    for part in parts(model):
        config.data[part] = f"runs/movielens_1m_{protocol}/{part}.parquet"
    config.train.batch_size = 1024
    # A model that is told a user's rate learns the user's id slowly.
    config.train.epochs, config.train.patience = 8, 2
    if name.endswith("meta"):
        config.data.chunk_rows, config.data.chunk_tasks = 40, 100
        config.data.chunks_beside = not is_new
    return config
