"""History columns: values row by row, and that no row sees its own label or a later one."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qianmo.configs import history as history_config
from qianmo.configs import movielens_1m as movielens_1m_config
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.datasets import history, movielens_1m, protocols

COLUMNS = [f"history_{name}" for name in ("liked", "disliked", "rate", "count")]
SUPPORT = {"task": "user", "item": "item", "label": "label", "rate": 0.4}
ROLES = {**SUPPORT, "time": "day"}


def rows(count: int, seed: int, users: int = 9) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "user": random.integers(0, users, count) * 5,
            "item": random.integers(0, 50, count),
            "label": random.choice([0.0, 0.25, 0.5, 1.0], count),
            "day": np.sort(random.integers(0, 12, count)),
        }
    )


def said(known: list[dict[str, Any]]) -> list[Any]:
    labels = [row["label"] for row in known]
    return [
        [row["item"] for row in known if row["label"] > 0.5],
        [row["item"] for row in known if row["label"] < 0.5],
        pytest.approx((sum(labels) + 5 * 0.4) / (len(known) + 5), rel=1e-6),
        pytest.approx(np.log(1 + len(known)), rel=1e-6),
    ]


@pytest.mark.parametrize("ties", ["excluded", "by_row"])
def test_earlier_rows_one_by_one(ties: protocols.Ties) -> None:
    table = rows(600, 1)
    plain = table.to_pylist()
    lengths = set()
    for sizes in ((20,), history.RANDOM_SIZES):
        made = history.from_earlier_rows(table, **ROLES, ties=ties, sizes=sizes, seed=3)
        assert made.select(table.column_names).equals(table)
        for i, row in enumerate(made.to_pylist()):
            known = [
                r
                for r in plain[:i]
                if r["user"] == row["user"] and (ties == "by_row" or r["day"] < row["day"])
            ]
            size = round(np.expm1(row["history_count"]))
            if len(known) > 20:
                lengths.add((sizes, size))
            assert size == min(20, len(known)) or sizes != (20,)
            assert size in (*history.RANDOM_SIZES, len(known))
            assert [row[name] for name in COLUMNS] == said(known[len(known) - size :])
    assert len(lengths) == 1 + len(history.RANDOM_SIZES)


@pytest.mark.parametrize("size", [0, 1, 7, 20])
def test_support_rows_one_by_one(size: int) -> None:
    table, support = rows(100, 1, users=12), rows(150, 2)
    made = history.from_support(table, support, **SUPPORT, rows=size).to_pylist()
    lengths = set()
    for row in made:
        known = [r for r in support.to_pylist() if r["user"] == row["user"]]
        known = known[max(len(known) - size, 0) :]
        lengths.add(len(known))
        assert [row[name] for name in COLUMNS] == said(known)
    assert min(lengths) == 0
    assert max(lengths) == size


def test_labels_to_be_scored_are_in_no_feature() -> None:
    def flipped(table: pa.Table, first: int = 0) -> pa.Table:
        labels = table["label"].to_numpy().copy()
        labels[first:] = 1 - labels[first:]
        return table.set_column(2, "label", pa.array(labels))

    parts = {"train": rows(400, 1), "test": rows(100, 2), "test_support": rows(200, 3)}
    was = history.add(parts, **ROLES, sizes=history.RANDOM_SIZES)
    now = history.add(
        {**parts, "test": flipped(parts["test"])}, **ROLES, sizes=history.RANDOM_SIZES
    )
    for name in parts:
        assert now[name].select(COLUMNS).equals(was[name].select(COLUMNS))
    # A training row knows no label of its time, itself included, or of what comes after it; what
    # comes before it, yes. By row, it knows those of its time that stand before it.
    days = parts["train"]["day"].to_numpy()
    first = int(np.searchsorted(days, days[200], "right"))
    assert first > 205
    for ties, same in (("excluded", first), ("by_row", 201)):
        arguments = {**ROLES, "sizes": history.RANDOM_SIZES, "ties": ties}
        before, after = (
            history.add({**parts, "train": train}, **arguments)["train"].select(COLUMNS)
            for train in (parts["train"], flipped(parts["train"], 200))
        )
        assert after.slice(0, same).equals(before.slice(0, same))
        assert not after.slice(same).equals(before.slice(same))
    now = history.add({**parts, "train": flipped(parts["train"])}, **ROLES)
    assert now["test"].equals(was["test"])
    now = history.add({**parts, "test_support": flipped(parts["test_support"])}, **ROLES)
    assert not now["test"].select(COLUMNS).equals(was["test"].select(COLUMNS))


@pytest.mark.skipif(
    "QIANMO_MOVIELENS_1M" not in os.environ,
    reason="QIANMO_MOVIELENS_1M: folder of ml-1m, which may not be shipped",
)
def test_a_recipe_reads_the_histories_of_new_users(tmp_path: pathlib.Path) -> None:
    source = os.environ["QIANMO_MOVIELENS_1M"]
    with pytest.raises(ValueError, match="`support_history` needs a split with support"):
        movielens_1m.movielens_1m(source, tmp_path / "time", support_history=True)
    movielens_1m.movielens_1m(source, tmp_path / "made", split="new_users", support_history=True)
    made = tmp_path / "made"
    config = movielens_1m_config.schema()
    item = next(f for f in config["features"] if f["name"] == "movie_id")
    config["features"] += history_config.features(item)
    schema = statistics.complete(Schema.from_config(config), made / "train.parquet")
    assert schema.tables["movie_id"].num_rows == 3954
    assert {f.name for f in schema.categorical if f.table == "movie_id"} == {
        "movie_id",
        "history_liked",
        "history_disliked",
    }
    block = next(readers.blocks(schema, made / "test.parquet"))
    lengths = block["history_liked_length"] + block["history_disliked_length"]
    assert lengths.max() == 20  # fewer where the 20th row shares its second with the next
    assert 0.5 < (lengths == 20).mean() < 1
    sizes = np.expm1(pq.read_table(made / "train.parquet")["history_count"].to_numpy()).round()
    common = {size for size in history.RANDOM_SIZES if (sizes == size).mean() > 0.08}
    assert common == set(history.RANDOM_SIZES)
    without = history_config.features(item, lists=False)
    assert [f["name"] for f in without] == ["history_rate", "history_count"]


def test_the_last_items_of_each_row() -> None:
    users, times = [7, 5, 7, 7, 5, 7, 7], [1, 1, 2, 2, 2, 3, 3]
    table = pa.table({"user": users, "time": times, "film": [1, 2, 3, 4, 5, 6, 7]})
    arguments = {"task": "user", "item": "film", "time": "time", "rows": 2, "name": "watched"}
    strict = history.last_items(table, **arguments)["watched"].to_pylist()
    assert strict == [[], [], [1], [1], [2], [3, 4], [3, 4]]
    by_row = history.last_items(table, **arguments, ties="by_row")["watched"].to_pylist()
    assert by_row == [[], [], [1], [1, 3], [2], [3, 4], [4, 6]]
