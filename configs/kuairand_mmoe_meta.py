"""KuaiRand click, like and long view: MMoE, each label with a tower that adapts to the user."""

from __future__ import annotations

from ml_collections import ConfigDict

from qianmo.configs import kuairand_meta


def get_config() -> ConfigDict:
    """The recipe. Each tower adapts on the user's support rows by its own label."""
    config = kuairand_meta.get_config("kuairand_no_id-meta")
    meta = config.model.meta
    config.schema.labels = ("is_click", "is_like", "long_view")
    config.model = {
        "name": "mmoe",
        "num_experts": 3,
        "expert_units": (128, 64),
        "tower_units": (32,),
        "embedding_l2": 3e-2,
        "meta": meta,
    }
    return config
