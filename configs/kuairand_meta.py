"""KuaiRand clicks: towers that adapt to each user, and what they should be better than.

Features are ids and attributes alone: the rates and histories of `kuairand` say by themselves what
a tower would learn from support rows. The rows are those of

    qianmo-prepare --dataset=kuairand --support_history
"""

from __future__ import annotations

from ml_collections import ConfigDict

from qianmo.configs import kuairand
from qianmo.configs.base import base_config
from qianmo.configs.movielens_1m_meta import method, parts, protocol_and_method

# With the user's id among the features, and without.
PROTOCOLS = ("kuairand_id", "kuairand_no_id")
# Sizes of the steps by which an ordinary model is fine-tuned in serving, found on `valid`.
FINE_TUNED = {"kuairand_id": 0.01, "kuairand_no_id": 0.03}


def get_config(variant: str = "kuairand_no_id-meta") -> ConfigDict:
    """The recipe of `<protocol>-<method>`."""
    protocol, name = protocol_and_method(variant, PROTOCOLS)
    config = base_config()
    schema = kuairand.schema()
    past = ("watched", "long_watched")
    features = [
        f
        for f in schema["features"]
        if f["name"] not in past and (f.get("kind") != "dense" or f["name"] == "log_duration")
    ]
    users = tuple(f["name"] for f in features if f["side"] == "user")
    has_id = protocol == "kuairand_id"
    if has_id:
        features.insert(0, {"name": "user_id", "dim": 16, "side": "user"})
    schema["features"], model = method(
        name,
        features,
        "video_id",
        stop_at_seam=has_id,
        personal=("user_id",) if has_id else users,
        fine_tuned=FINE_TUNED[protocol],
    )
    config.schema = schema
    config.model = {**model, "embedding_l2": 3e-2}
    for part in parts(model):
        config.data[part] = f"runs/kuairand_meta/{part}.parquet"
    config.train.batch_size = 512
    config.train.epochs = 4
    if name.endswith("meta"):
        config.data.chunk_rows, config.data.chunk_tasks = 40, 100
        config.data.chunks_beside = has_id
    return config
