"""MovieLens-1M, three ages of users as domains, one objective: whether a film has 4 or 5 stars.

Variants: those of `MODELS`; single_0, single_1 and single_2 of one age alone. The domain stands for
the user's age, which is no other feature.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from qianmo.configs import kuairand_domains, movielens_1m
from qianmo.configs.base import base_config

DOMAINS = (0, 1, 2)
# With one objective the method's authors advise against star towers.
MODELS = {
    "no_domain_id": kuairand_domains.MODELS["no_domain_id"],
    "domain_id": kuairand_domains.MODELS["domain_id"],
    "wider": kuairand_domains.MODELS["wider"],
    "shared_bottom": kuairand_domains.MODELS["shared_bottom"],
    "mmoe": kuairand_domains.MODELS["mmoe"],
    "ple": kuairand_domains.MODELS["ple"],
    "star": kuairand_domains.MODELS["star"],
    "cross_domain": kuairand_domains.MODELS["cross_domain_plain_tower"],
}


def get_config(variant: str = "cross_domain") -> ConfigDict:
    """The recipe."""
    kind, _, domain = variant.rpartition("_")
    alone = kind == "single"
    config = base_config()
    schema = movielens_1m.schema()
    features = [f for f in schema["features"] if f["name"] != "age"]
    if variant != "no_domain_id" and not alone:
        features.append({"name": "age_group", "side": "user", "num_ids": len(DOMAINS), "dim": 16})
    schema |= {
        "features": features,
        "domain": "age_group",
        "only_domains": (int(domain),) if alone else (),
    }
    config.schema = schema
    model = MODELS["no_domain_id" if alone else variant]
    config.model = {**model, "dropout": 0.2, "embedding_l2": 3e-3}
    for part in ("train", "valid", "test"):
        config.data[part] = f"runs/movielens_1m_ages/{part}.parquet"
    config.data.shuffle_rows = 2**20  # all of them, which lie in the file by time
    config.train.batch_size = 4096
    config.train.epochs = 10
    for optimizer in (config.train.optimizer, config.train.table_optimizer):
        optimizer.learning_rate = 3e-3
    return config
