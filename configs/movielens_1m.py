"""The rows that `qianmo-prepare --dataset=movielens_1m` makes; whether a film is liked."""

from __future__ import annotations

from typing import Any

FEATURES: tuple[tuple[str, dict[str, Any]], ...] = (
    # The publisher numbers users from 1 to 6040 and films from 1 to 3952.
    ("user", {"name": "user_id", "num_ids": 6041}),
    ("item", {"name": "movie_id", "num_ids": 3953}),
    ("user", {"name": "gender", "dtype": "string"}),
    ("user", {"name": "age"}),
    ("user", {"name": "occupation"}),
    ("user", {"name": "zip_code", "dtype": "string"}),
    ("item", {"name": "first_genre", "dtype": "string"}),
    ("item", {"name": "genres", "dtype": "string", "max_length": 6, "keep": "first"}),
    ("item", {"name": "year"}),
)


def schema() -> dict[str, Any]:
    """The schema, as plain data for `Schema.from_config`."""
    return {
        "features": [{"dim": 16, "side": side, **values} for side, values in FEATURES],
        "labels": ("label",),
        "timestamp": "timestamp",
        "task_id": "user_id",
    }
