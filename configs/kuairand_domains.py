"""KuaiRand's tabs as domains, clicks and long views: one model for all tabs, by many designs.

The users' rates are left out: their priors were taken from the days up to 3 May, some of which the
splits of the benchmark hold out.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import kuairand
from qianmo.configs.base import base_config

TABS = (1, 0, 4, 6, 2)  # by rows; the ten others, with 1.4 % of the rows, are unknown domains
RATES = ("user_click_rate", "user_click_lift", "user_tab_click_rate", "user_long_view_rate")
EXPERT, TOWER = (128, 64), (32,)

# A model of one tab, of one expert and a tower, which can migrate into the assembly.
ONE_EXPERT = {"name": "mlp", "units": EXPERT, "tower_units": TOWER}

MODELS: dict[str, dict[str, Any]] = {
    "no_domain_id": {"name": "mlp", "units": (*EXPERT, *TOWER)},
    "domain_id": {"name": "mlp", "units": (*EXPERT, *TOWER)},
    "wider": {"name": "mlp", "units": (512, 256, 32)},
    "shared_bottom": {
        "name": "shared_bottom",
        "tasks": "domains",
        "units": EXPERT,
        "tower_units": TOWER,
    },
    "mmoe": {"name": "mmoe", "tasks": "domains", "expert_units": EXPERT, "tower_units": TOWER},
    "ple": {
        "name": "ple",
        "tasks": "domains",
        "expert_units": ((128,), (64,)),
        "tower_units": TOWER,
    },
    "star": {"name": "star", "units": (*EXPERT, *TOWER)},
    "star_norm": {"name": "star", "units": (*EXPERT, *TOWER), "norm": True},
    "star_auxiliary": {"name": "star", "units": (*EXPERT, *TOWER), "auxiliary_units": (16,)},
    "cross_domain": {"name": "cross_domain", "expert_units": EXPERT, "tower_units": TOWER},
    "cross_domain_plain_tower": {
        "name": "cross_domain",
        "expert_units": EXPERT,
        "tower_units": TOWER,
        "star_tower": False,
    },
    "ppnet": {"name": "ppnet", "units": (*EXPERT, *TOWER)},
    "epnet": {"name": "epnet", "units": (*EXPERT, *TOWER)},
    "pepnet": {"name": "ppnet", "units": (*EXPERT, *TOWER), "epnet": True},
}


def schema(variant: str = "cross_domain") -> dict[str, Any]:
    """The schema of a variant; that of one tab alone has no domain feature."""
    found = kuairand.schema()
    kind, _, tab = variant.rpartition("_")
    alone = kind in ("single", "expert")
    without = {*RATES, "tab"} if variant == "no_domain_id" or alone else {*RATES}
    found["features"] = [f for f in found["features"] if f["name"] not in without]
    for feature in found["features"]:
        if feature["name"] == "tab":
            feature["vocabulary"] = TABS
    found["labels"] = ("is_click", "long_view")
    found["only_domains"] = (int(tab),) if alone else TABS
    return found


def get_config(variant: str = "cross_domain") -> ConfigDict:
    """The recipe.

    Variants: those of `MODELS`; single_1, single_0, ... of one tab; expert_1, ... the same
    with the parts of the assembly; migrated_1, ... the assembly, begun with such an expert.
    """
    config = base_config()
    config.schema = schema(variant)
    for part in ("train", "valid", "test"):
        config.data[part] = f"runs/kuairand/{part}.parquet"
    kind, _, tab = variant.rpartition("_")
    of_kind = {
        "single": MODELS["no_domain_id"],
        "expert": ONE_EXPERT,
        "migrated": MODELS["cross_domain"],
    }
    model = of_kind[kind] if kind in of_kind else MODELS[variant]
    config.model = {**model, "dropout": 0.2, "embedding_l2": 3e-2}
    config.train.epochs = 2
    if kind in ("single", "expert") and tab != "1":
        config.train.batch_size = 128  # a pass over a small tab is a few batches
    if kind == "migrated":
        place = TABS.index(int(tab))
        config.migrate[f"tab_{tab}"] = {
            "model_dir": f"runs/expert_{tab}",
            "weights": {
                f"bottom/bottom/own/bottom/networks/0/{place}": "bottom/networks/0",
                "tower": "tower",
            },
            "domain": int(tab),
            "learning_rate_factor": 1.0,
        }
    return config
