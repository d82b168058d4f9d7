"""KuaiRand clicks and long views: one road with all of it.

    teacher  the cross-domain assembly: shared and each tab's own experts, a gate, star towers
    student  a plain network that the teacher distils; its tower is a meta tower, and it serves

The rows are those of `kuairand_meta`, of the five largest tabs.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs import kuairand_domains, kuairand_meta


def get_config() -> ConfigDict:
    """The recipe. Shuffled rows make the loss of both, chunks of users' rows the episodes."""
    config = kuairand_meta.get_config("kuairand_no_id-meta")
    student: dict[str, Any] = config.model.to_dict()
    whole = {key: student.pop(key) for key in ("embedding_l2", "meta")}
    config.schema.labels = ("is_click", "long_view")
    config.schema.only_domains = kuairand_domains.TABS
    for feature in config.schema.features:
        if feature["name"] == "tab":
            feature["vocabulary"] = kuairand_domains.TABS
    config.model = {
        "name": "distilled",
        "teacher": {**kuairand_domains.MODELS["cross_domain"], "dropout": 0.2},
        "student": student,
        "kd_weight": 5.0,
        **whole,
    }
    config.data.chunks_beside = True
    return config
