"""The schema of the columns that `pipelines/datasets/history.py` adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What features of one table agree in.
_TABLE_KEYS = ("dtype", "dim", "vocabulary", "min_count", "num_ids", "hash_buckets")


def features(
    item: Mapping[str, Any], *, prefix: str = "history", lists: bool = True
) -> list[dict[str, Any]]:
    """Features of a user's history.

    Args:
      item: the item's own feature, whose table the lists share.
      prefix: of the columns.
      lists: whether the mean vectors of liked and disliked items are among them, or the rate and
        the count alone.
    """
    table = {key: item[key] for key in _TABLE_KEYS if key in item}
    table["table"] = item.get("table") or item["name"]
    return [
        *(
            {"name": f"{prefix}_{name}", "max_length": 20, "side": "user", **table}
            for name in (("liked", "disliked") if lists else ())
        ),
        *(
            {"kind": "dense", "name": f"{prefix}_{name}", "side": "user"}
            for name in ("rate", "count")
        ),
    ]
