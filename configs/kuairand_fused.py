"""KuaiRand: three ways of making one model of several.

- scenes: five tabs, one objective. Experts by tab, one tower for all.
- scenes_objectives: five tabs, clicks and long views. Experts by tab, star towers.
- objectives: the click model and the like model of one tab. Experts and towers by label.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import kuairand_domains as domains

PARTS = {"expert_units": domains.EXPERT, "tower_units": domains.TOWER}
# variant -> what names the schema, its labels, and the model.
VARIANTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    # With one objective the method's authors advise against star towers; a warning says why.
    "scenes": (
        "cross_domain",
        ("is_click",),
        {"name": "cross_domain", "star_tower": False, **PARTS},
    ),
    "scenes_objectives": (
        "cross_domain",
        ("is_click", "long_view"),
        {"name": "cross_domain", **PARTS},
    ),
    # Rows are the same for both, so labels are the tasks, and each has experts of its own.
    "objectives": (
        "single_1",
        ("is_click", "is_like"),
        {"name": "ple", "tasks": "labels", "expert_units": ((128,), (64,)), "tower_units": (32,)},
    ),
}


def get_config(variant: str = "scenes_objectives") -> ConfigDict:
    """The recipe of a variant."""
    if variant not in VARIANTS:
        raise ValueError(f"The variant should be one of {sorted(VARIANTS)}. Received: {variant!r}")
    schema, labels, model = VARIANTS[variant]
    config = domains.get_config(schema)
    config.schema.labels = labels
    config.model = {**model, "dropout": 0.2, "embedding_l2": 3e-2}
    return config
