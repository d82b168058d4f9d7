"""The rows that `qianmo-prepare --dataset=kuairand` makes; clicks are the label.

`user_id` is no feature: with seven rows a user its vectors learn the training rows by heart and
cost AUC on later days. The user's rates and histories say the same of users who came later.
"""

from __future__ import annotations

from typing import Any

# Rare ids share the out-of-vocabulary row: their own would hold noise. Videos are counted in the
# histories too, where each impression stands up to 20 times.
USERS: dict[str, dict[str, Any]] = {
    "follow_user_num_range": {"dtype": "string"},
    "fans_user_num_range": {"dtype": "string"},
    "user_active_degree": {"dtype": "string"},
    "watched": {"max_length": 20, "table": "video_id", "min_count": 10},
    "long_watched": {"max_length": 20, "table": "video_id", "min_count": 10},
}
ITEMS: dict[str, dict[str, Any]] = {
    "video_id": {"min_count": 10},
    "video_type": {"dtype": "string"},
    "upload_type": {"dtype": "string"},
    "tag": {},
    "tags": {"max_length": 3, "table": "tag", "keep": "first"},
    "duration_bucket": {},
}
CONTEXT: dict[str, dict[str, Any]] = {"tab": {}, "hour": {}}
DENSE = {
    "register_days": "user",
    "log_num_history": "user",
    "user_click_rate": "user",
    "user_click_lift": "user",
    "user_tab_click_rate": "context",
    "user_long_view_rate": "user",
    "log_user_rows": "user",
    "log_duration": "item",
}


def schema() -> dict[str, Any]:
    """The schema, as plain data for `Schema.from_config`."""
    features: list[dict[str, Any]] = [
        {"name": name, "dim": 16, "side": side, **values}
        for side, group in (("user", USERS), ("item", ITEMS), ("context", CONTEXT))
        for name, values in group.items()
    ]
    features += [{"kind": "dense", "name": name, "side": side} for name, side in DENSE.items()]
    return {
        "features": features,
        "labels": ("is_click",),
        "timestamp": "time_ms",
        "task_id": "user_id",
        "domain": "tab",
        "group": "history_group",
    }
