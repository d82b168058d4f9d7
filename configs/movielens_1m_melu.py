"""The rows that `qianmo-prepare --dataset=movielens_1m --split=melu` makes; how a film is rated."""

from __future__ import annotations

from typing import Any

# MeLU's features.
FEATURES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("item", {"name": "rate", "dtype": "string"}),
    ("item", {"name": "genre", "dtype": "string", "max_length": 7, "keep": "first"}),
    ("item", {"name": "director", "dtype": "string", "max_length": 12, "keep": "first"}),
    ("item", {"name": "actor", "dtype": "string", "max_length": 4, "keep": "first"}),
    ("user", {"name": "gender", "dtype": "string"}),
    ("user", {"name": "age"}),
    ("user", {"name": "occupation"}),
    ("user", {"name": "zip_code", "dtype": "string"}),
)


def schema(*, dim: int = 32, ids: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema, as plain data for `Schema.from_config`.

    Args:
      dim: width of each vector.
      ids: which of movie_id and user_id are features too; cold ones share the row 0.
    """
    sides = {"movie_id": "item", "user_id": "user"}
    features = [*FEATURES, *((sides[name], {"name": name}) for name in ids)]
    return {
        "features": [{"dim": dim, "side": side, **values} for side, values in features],
        "labels": ("label",),
        "timestamp": "timestamp",
        "task_id": "task",
        "group": "state",
    }
