"""The rows that `qianmo-prepare --dataset=kuairand` makes; clicks are the label."""

from __future__ import annotations

from typing import Any

# Rare ids share the out-of-vocabulary row: their own would hold noise. Videos are counted in the
# histories too, where each impression stands up to 20 times.
USERS: dict[str, dict[str, Any]] = {
    "user_id": {"min_count": 3},
    "is_live_streamer": {},
    "is_video_author": {},
    "follow_user_num_range": {"dtype": "string"},
    "fans_user_num_range": {"dtype": "string"},
    "friend_user_num_range": {"dtype": "string"},
    "user_active_degree": {"dtype": "string"},
    "register_days_range": {"dtype": "string"},
    **{f"onehot_feat{i}": {"min_count": 5} for i in range(18)},
    "watched": {"max_length": 20, "table": "video_id", "min_count": 10},
}
ITEMS: dict[str, dict[str, Any]] = {
    "video_id": {"min_count": 10},
    "author_id": {"min_count": 5},
    "music_id": {"min_count": 5},
    "music_type": {},
    "video_type": {"dtype": "string"},
    "upload_type": {"dtype": "string"},
    "tag": {},
    "tags": {"max_length": 3, "table": "tag", "keep": "first"},
    "duration_bucket": {},
}
CONTEXT: dict[str, dict[str, Any]] = {"tab": {}, "hour": {}}


def schema() -> dict[str, Any]:
    """The schema, as plain data for `Schema.from_config`."""
    features: list[dict[str, Any]] = [
        {"name": name, "dim": 16, "side": side, **values}
        for side, group in (("user", USERS), ("item", ITEMS), ("context", CONTEXT))
        for name, values in group.items()
    ]
    dense = {"register_days": "user", "log_num_history": "user", "log_duration": "item"}
    features += [{"kind": "dense", "name": name, "side": side} for name, side in dense.items()]
    return {
        "features": features,
        "labels": ("is_click",),
        "timestamp": "time_ms",
        "task_id": "user_id",
        "domain": "tab",
        "group": "history_group",
    }
