"""Amazon's departments in pairs: retrieval models of two domains fused into one two-tower model.

Users are the same in both domains and share a table; each item belongs to one. What a user bought
in either domain, in the table of the items, is known in both. Variants `<pair>-<model>`, with a
pair such as cloth_sport and a model of `MODELS`, or single_0 or single_1: a plain model of one
domain alone, which knows nothing of the other.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs.base import base_config

# pair -> numbers of users and of items, those of both domains together.
PAIRS = {
    "cloth_sport": (9_928, 73_613),
    "electronic_phone": (3_325, 57_925),
}
DIM = 32
SIDES: dict[str, Any] = {"units": (64,), "item_units": (64,)}
MODELS: dict[str, dict[str, Any]] = {
    "domain_id": SIDES,
    "wider": {"units": (192,), "item_units": (192,)},
    "fused": {**SIDES, "num_shared": 1},
}


def get_config(variant: str = "cloth_sport-fused") -> ConfigDict:
    """The recipe of `<pair>-<model>`."""
    pair, _, model = variant.partition("-")
    alone = model in ("single_0", "single_1")
    if pair not in PAIRS or not (alone or model in MODELS):
        raise ValueError(
            f"The variant should be one of {sorted(PAIRS)}, a -, and one of "
            f"{[*MODELS, 'single_0', 'single_1']}. Received: {variant!r}"
        )
    num_users, num_items = PAIRS[pair]
    config = base_config()
    features = [
        {"name": "user_id", "side": "user", "num_ids": num_users},
        # On the side of the item, since an item belongs to one domain.
        {"name": "domain", "side": "item", "num_ids": 2},
        {"name": "item_id", "side": "item", "num_ids": num_items},
    ]
    for domain in (int(model[-1]),) if alone else (0, 1):
        bought = {"name": f"bought_{domain}", "side": "user", "table": "item_id"}
        features.append({**bought, "num_ids": num_items, "max_length": 20})
    config.schema = {
        "features": [{**f, "dim": DIM} for f in features],
        "labels": ("label",),
        "task_id": "user_id",
        "domain": "domain",
        "only_domains": (int(model[-1]),) if alone else (),
    }
    config.model = {
        "name": "two_tower",
        "item_id": "item_id",
        "dim": DIM,
        "seam_dim": 0,
        "temperature": 0.1,
        "embedding_stddev": 0.1,
        # A user has some eight rows in a domain, an item four: both are soon known by heart.
        "embedding_l2": 1.0,
        "dropout": 0.3,
        **(SIDES if alone else MODELS[model]),
    }
    for part in ("train", "valid", "test"):
        config.data[part] = f"runs/amazon_{pair}/{part}.parquet"
    config.data.catalogue = f"runs/amazon_{pair}/items.parquet"
    config.train.batch_size = 512
    config.train.epochs = 40
    config.train.patience = 3
    config.train.monitor = "ndcg_10"
    return config
