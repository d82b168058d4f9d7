"""KuaiRand's tabs made more different: features and labels that some tabs alone have.

What the other tabs' rows have of them is withheld (`withheld` of the benchmark `domains_apart`), as
if the tabs' models had come from teams of their own. A plain model of all tabs can then read the
features that all share, or take nothing for what a row lacks.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from qianmo.configs import kuairand_domains as domains

FEATURES: dict[str, tuple[int, ...]] = {
    "watched": (1, 4),
    "long_watched": (0, 6, 2),
    "tags": (4, 2),
    "register_days": (1,),
}
LABELS: dict[str, tuple[int, ...]] = {"long_view": (1, 4, 2)}  # clicks are of all tabs
VARIANTS = {
    "shared": "domain_id",  # the features that all tabs share
    "filled": "domain_id",  # all, zeros where a row's tab lacks them
    "wider": "wider",  # the same, as many weights as the assembly
    "cross_domain": "cross_domain",
}


def get_config(variant: str = "cross_domain") -> ConfigDict:
    """The recipe. Variants: those of `VARIANTS`, and single_1, single_0, ... of one tab."""
    config = domains.get_config(VARIANTS.get(variant, variant))
    tab = int(variant.removeprefix("single_")) if variant.startswith("single_") else None
    features = []
    for feature in config.schema.features:
        owners = FEATURES.get(feature["name"])
        if owners and tab is None:
            if variant == "shared":
                continue
            feature["domains"] = owners
        if not owners or tab is None or tab in owners:
            features.append(feature)
    config.schema.features = features
    if tab is None:
        config.schema.label_domains = LABELS
    else:
        names = [name for name in config.schema.labels if tab in LABELS.get(name, (tab,))]
        config.schema.labels = tuple(names)
    for part in ("train", "valid", "test"):
        folder = "apart" if tab is None else f"apart_{tab}"
        config.data[part] = f"runs/benchmarks/domains_kuairand/{folder}/{part}.parquet"
    return config
