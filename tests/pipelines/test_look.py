"""What is seen of rows before the first step: counts, shares, warnings, refusals, drift."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import look, readers, summaries
from qianmo.pipelines.data.readers import DataError

ROWS = 4000
SCHEMA = Schema(
    features=(
        Categorical(name="item", num_ids=30),
        Categorical(name="city", dtype="string", vocabulary=("a", "b"), default="a"),
        Categorical(name="seen", num_ids=30, table="item", max_length=4),
        Dense(name="price", mean=0.0, variance=1.0, indicator=True),
    ),
    labels=("click", "buy"),
    weight="w",
    task_id="user",
    timestamp="at",
)


def block(rows: int = ROWS, seed: int = 0, **changes: Any) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {
        "item": random.integers(0, 30, rows),
        "city": random.choice(np.array([b"a", b"b"], object), rows),
        "seen": random.integers(0, 30, (rows, 4)),
        "seen_length": random.integers(0, 5, rows),
        "price": random.normal(size=rows).astype(np.float32),
        "click": (random.random(rows) < 0.3).astype(np.float32),
        "buy": (random.random(rows) < 0.05).astype(np.float32),
        "w": np.ones(rows, np.float32),
        "user": np.arange(rows) % 100,
        "at": np.arange(rows),
    }
    return {**made, **changes}


def summary(*blocks: dict[str, np.ndarray], schema: Schema = SCHEMA) -> summaries.Summary:
    watched = look.Look(schema)
    for each in blocks:
        watched.observe(each)
    return watched.summary(schema)


def column(found: summaries.Summary, name: str) -> summaries.Column:
    return next(c for c in found.columns if c.name == name)


def test_counts_are_exact_and_shares_those_of_the_rows() -> None:
    first, second = block(seed=1), block(seed=2, at=np.arange(ROWS) + ROWS)
    second["click"][:100] = np.nan
    second["price"][:400] = np.nan
    found = summary(first, second)
    assert found.rows == 2 * ROWS
    clicks = np.concatenate([first["click"], second["click"][100:]])
    assert found.labels["click"]["rows"] == len(clicks)
    assert found.labels["click"]["mean"] == pytest.approx(clicks.mean(), abs=1e-12)
    assert column(found, "price").missing == pytest.approx(400 / (2 * ROWS))
    prices = np.concatenate([first["price"], second["price"][400:]])
    assert column(found, "price").mean == pytest.approx(prices.mean(), abs=1e-6)
    assert column(found, "price").deviation == pytest.approx(prices.std(), abs=1e-6)
    lengths = np.concatenate([first["seen_length"], second["seen_length"]])
    assert column(found, "seen").missing == pytest.approx((lengths == 0).mean())
    assert column(found, "seen").full == pytest.approx((lengths == 4).mean())
    assert column(found, "item").distinct == 30
    assert found.warnings == ["`city` is its default in 51% of the rows"]
    assert summaries.Summary.from_config(json.loads(json.dumps(found.to_config()))) == found


def test_the_sample_is_uniform_over_a_long_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "SAMPLE_ROWS", 2000)
    watched = look.Look(SCHEMA)
    for number in range(20):
        watched.observe(block(1000, number, price=np.full(1000, number, np.float32)))
    sample = watched.sample()["price"]
    assert len(sample) == 2000
    counts = np.bincount(sample.astype(int), minlength=20)
    # 100 rows of each block are expected; their number is hypergeometric, deviation below 10.
    assert np.abs(counts - 100).max() < 50
    assert watched.summary(SCHEMA).rows == 20_000


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"item": np.arange(ROWS) % 300}, "`item`: 90% of the values are unknown to its table"),
        ({"city": np.full(ROWS, b"zz", object)}, "`city`: 100% of the values are unknown"),
        ({"price": np.full(ROWS, 3.0, np.float32)}, "`price` is constant"),
        ({"price": np.full(ROWS, np.nan, np.float32)}, "`price` is missing in 100% of the rows"),
        ({"seen_length": np.zeros(ROWS, np.int64)}, "`seen` is empty in 100% of the rows"),
        ({"buy": (np.arange(ROWS) == 5).astype(np.float32)}, "label `buy` is 0.03% positive"),
        ({"w": (np.arange(ROWS) % 4 == 0).astype(np.float32)}, "75% of the rows have weight 0"),
        ({"at": np.arange(ROWS) // 200}, "100.0% of the rows have a twin of the same `user`, `at`"),
    ],
)
def test_what_is_odd_is_said(changes: dict[str, Any], warning: str) -> None:
    found = summary(block(**changes))
    assert any(each.startswith(warning) for each in found.warnings), found.warnings
    assert f"warning: {warning}" in summaries.table(found)


def test_extreme_values_are_said() -> None:
    rows = 20_000  # one outlier among n rows lies at most sqrt(n) deviations from the mean
    price = np.random.default_rng(0).normal(size=rows).astype(np.float32)
    assert not any("`price`" in each for each in summary(block(rows, price=price)).warnings)
    price[7] = 1e9
    found = summary(block(rows, price=price)).warnings
    assert any("`price` has values 141 standard deviations from its mean" in w for w in found)


def test_leaks_are_suspected_and_ids_are_not() -> None:
    made = block()
    clicks = made["click"] > 0
    leaky = made["price"] * 0.01 + clicks
    found = summary({**made, "price": leaky.astype(np.float32)})
    assert any("`price` alone tells `click` with AUC" in each for each in found.warnings)
    # The row's own item in a list says the label too.
    seen = np.where(clicks[:, None], made["item"][:, None], (made["item"][:, None] + 1) % 30)
    found = summary({**made, "seen": np.repeat(seen, 4, 1), "seen_length": np.full(ROWS, 4)})
    assert any("`seen` alone tells `click`" in each for each in found.warnings)
    # A value of its own for each row tells nothing of other rows.
    wide = Schema(features=(Categorical(name="item", num_ids=ROWS),), labels=("click",))
    found = summary({**made, "item": np.arange(ROWS)}, schema=wide)
    assert column(found, "item").leak["click"] < 0.6
    # A city that decides the label does.
    city = np.where(clicks, b"a", b"b").astype(object)
    found = summary({**made, "city": city})
    assert column(found, "city").leak["click"] == 1


def test_duplicates_are_counted_by_task_time_and_event(monkeypatch: pytest.MonkeyPatch) -> None:
    made = block(at=np.arange(ROWS) // 2 * 2, user=np.arange(ROWS) // 4)
    assert summary(made).tasks == 1.0
    with_event = Schema(
        features=SCHEMA.features,
        labels=SCHEMA.labels,
        task_id="user",
        timestamp="at",
        event_id="event",
    )
    assert summary({**made, "event": np.arange(ROWS) % 2}, schema=with_event).tasks == 0.0
    monkeypatch.setattr(look, "TASK_ROWS", 500)  # only a share of the tasks, but each whole
    assert summary(made).tasks == 1.0
    assert summary(block(user=np.arange(ROWS) // 4)).tasks == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"click": np.zeros(ROWS, np.float32)}, "`click`: it is 0 in all 4,000 rows that count"),
        ({"click": np.ones(ROWS, np.float32)}, "`click`: it is 1 in all 4,000 rows that count"),
        ({"buy": np.full(ROWS, np.nan, np.float32)}, "column `buy`: no row has this label"),
        ({"w": np.zeros(ROWS, np.float32)}, "column `click`: all 4,000 rows have weight 0"),
        (
            {
                "item": np.full(ROWS, 99),
                "city": np.full(ROWS, b"zz", object),
                "seen": np.full((ROWS, 4), 77),
                "price": np.full(ROWS, 1.0, np.float32),
            },
            "no feature tells the rows apart: `item` is unknown, `city` is unknown",
        ),
    ],
)
def test_what_cannot_be_learned_of_is_refused(changes: dict[str, Any], message: str) -> None:
    found = summary(block(**changes))
    with pytest.raises(DataError, match=message):
        summaries.check_learnable(SCHEMA, found, "rows.parquet")
    summaries.check_learnable(SCHEMA, summary(block()), "rows.parquet")


@pytest.mark.parametrize(
    ("roles", "changes", "message"),
    [
        (
            {"label_weights": {"click": "lw"}},
            {"lw": np.zeros(ROWS, np.float32)},
            "`click`: no row has this label, or `lw` is 0",
        ),
        (
            {"domain": "tab", "domain_weights": ((1, 0.0),)},
            {"tab": np.ones(ROWS, np.int64)},
            "`click`: all 4,000 rows have weight 0 in its loss",
        ),
    ],
)
def test_rows_that_all_weigh_nothing_are_refused(
    roles: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    schema = dataclasses.replace(SCHEMA, **roles)
    found = summary(block(**changes), schema=schema)
    with pytest.raises(DataError, match=message):
        summaries.check_learnable(schema, found, "rows.parquet")
    half = {name: np.where(np.arange(ROWS) % 2, 1 - v, v) for name, v in changes.items()}
    half = {name: v.astype(changes[name].dtype) for name, v in half.items()}
    summaries.check_learnable(schema, summary(block(**half), schema=schema), "rows.parquet")


def test_a_label_may_be_switched_off() -> None:
    schema = dataclasses.replace(SCHEMA, label_weights={"buy": 0.0})
    summaries.check_learnable(schema, summary(block(), schema=schema), "rows.parquet")


def test_rows_of_positives_are_enough_where_negatives_are_drawn() -> None:
    found = summary(block(click=np.ones(ROWS, np.float32)))
    summaries.check_learnable(SCHEMA, found, "rows.parquet", positives_alone=True)
    found = summary(block(click=np.zeros(ROWS, np.float32)))
    with pytest.raises(DataError, match="it is 0 in all"):
        summaries.check_learnable(SCHEMA, found, "rows.parquet", positives_alone=True)


def test_drift_is_the_population_stability_index() -> None:
    before = summary(block(seed=1))
    watched = look.Look(SCHEMA)
    price = np.random.default_rng(3).normal(loc=1.0, size=ROWS).astype(np.float32)
    watched.observe(block(seed=2, price=price, city=np.full(ROWS, b"b", object)))
    now = watched.summary(SCHEMA, before)
    found = summaries.drift(before, now)
    assert found["item"] < 0.05
    edges = column(before, "price").edges
    first = block(seed=1)["price"].astype(np.float64)
    p, q = (
        np.append(np.bincount(np.searchsorted(edges, x), minlength=10), 0) / ROWS
        for x in (first, price.astype(np.float64))
    )
    p, q = np.maximum(p, 1e-4), np.maximum(q, 1e-4)
    assert found["price"] == pytest.approx(float(((q - p) * np.log(q / p)).sum()))
    assert found["price"] > 0.25
    assert found["city"] > 0.25
    assert f"{found['price']:.3f}" in summaries.table(now, found)


def test_what_the_reader_leaves_out_is_said(tmp_path: pathlib.Path) -> None:
    lists = Schema(
        features=(Categorical(name="seen", num_ids=9, max_length=2), Dense(name="x")),
        labels=("click",),
        domain="scene",
        only_domains=(1,),
    )
    table = {
        "seen": [[1, 2, 3], [4], [5, 6, 7, 8], []],
        "x": [0.0, 1.0, 2.0, 3.0],
        "click": [0, 1, 1, 0],
        "scene": [1, 1, 1, 2],
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    watched = look.Look(lists)
    for each in readers.blocks(lists, tmp_path / "rows.parquet", tally=watched.tally):
        watched.observe(each)
    text = summaries.table(watched.summary(lists))
    assert "3 rows" in text
    assert "1 of 4 rows are of other domains than (1,) and left out" in text
    assert "lists `seen` are longer than `max_length` 2: 3 values at their start are left" in text
