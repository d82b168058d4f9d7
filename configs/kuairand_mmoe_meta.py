"""KuaiRand click, like and long view: MMoE, each label with a tower that adapts to the user.

Variants: "fine_tune" trains an ordinary model and adapts in serving alone, "meta" trains for it.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from qianmo.configs import kuairand_meta

METHODS = {"fine_tune": "plain", "meta": "meta"}  # and the variant of `kuairand_meta`


def get_config(variant: str = "meta") -> ConfigDict:
    """The recipe. Each tower adapts on the user's support rows by its own label."""
    if variant not in METHODS:
        raise ValueError(f"The variant should be one of {tuple(METHODS)}. Received: {variant!r}")
    config = kuairand_meta.get_config(f"kuairand_no_id-{METHODS[variant]}")
    meta = config.model.meta
    if variant == "fine_tune":  # of three labels, longer steps than those of clicks alone
        meta.inner.steps, meta.inner.step_size = 5, 0.1
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
