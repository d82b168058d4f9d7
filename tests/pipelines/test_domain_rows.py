"""Rows of several domains: what a domain owns, labels that it lacks, and models of one domain."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from row_files import WRITERS, Row, write_parquet, write_tfrecord

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.evaluation import scores

SCHEMA = Schema.from_config(
    {
        "features": [
            {"name": "scene", "vocabulary": [1, 4]},
            {"name": "user"},
            {"name": "topic", "dtype": "string", "domains": [4]},
            {"name": "seen", "max_length": 2, "domains": [4]},
            {"kind": "dense", "name": "price", "domains": [1]},
        ],
        "labels": ["click", "buy"],
        "domain": "scene",
        "label_domains": {"buy": [1]},
    }
)
ROWS: list[Row] = [
    {"user": 5, "scene": 1, "price": 1.0, "click": 0, "buy": 1},
    {"user": 6, "scene": 4, "topic": "a", "seen": [1, 2, 3], "click": 1},
    {"user": 7, "scene": 1, "price": 3.0, "click": 1, "buy": 0},
    {"user": 8, "scene": 9, "click": 1},
    {"user": 9, "scene": 4, "topic": "b", "seen": [4], "click": 0, "buy": 1},  # passed over
]


each_format = pytest.mark.parametrize("extension", ["parquet", "csv", "tfrecord"])


def read(schema: Schema, path: pathlib.Path) -> dict[str, Any]:
    blocks = list(readers.blocks(schema, path))
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


@each_format
def test_what_a_domain_lacks_reads_as_padding(tmp_path: pathlib.Path, extension: str) -> None:
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, ROWS)
    found = read(SCHEMA, file)
    assert found["user"].tolist() == [5, 6, 7, 8, 9]
    assert found["topic"].tolist() == [b"", b"a", b"", b"", b"b"]
    assert found["seen"].tolist() == [[0, 0], [2, 3], [0, 0], [0, 0], [4, 0]]
    assert found["seen_length"].tolist() == [0, 2, 0, 0, 1]
    assert found["price"].tolist() == [1, 0, 3, 0, 0]
    assert found["click"].tolist() == [0, 1, 1, 1, 0]
    np.testing.assert_array_equal(found["buy"], [1, np.nan, 0, np.nan, np.nan])
    _, targets = next(iter(readers.dataset(SCHEMA, file, batch_size=5)))
    np.testing.assert_array_equal(np.isnan(targets["labels"]).any(1), [False, True] * 2 + [True])


@each_format
@pytest.mark.parametrize(
    ("row", "change", "column", "message"),
    [
        (1, {"price": 2.0}, "price", r"belongs to domains \(1,\) and should be absent .* domain 4"),
        (3, {"topic": "a"}, "topic", "domain 9. Received: '?b?'a'"),
        (0, {"seen": [3]}, "seen", "should be absent"),
        (2, {"price": None}, "price", "is null or absent"),
        (4, {"topic": None}, "topic", "is null or absent"),
        (2, {"buy": None}, "buy", "is null or absent"),
        (2, {"scene": None}, "scene", "is null or absent|is absent"),
    ],
)
def test_rows_that_do_not_fit_their_domain_are_refused(
    tmp_path: pathlib.Path,
    extension: str,
    row: int,
    change: Row,
    column: str,
    message: str,
) -> None:
    rows = [dict(r) for r in ROWS]
    rows[row].update(change)
    rows[row] = {name: value for name, value in rows[row].items() if value is not None}
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    with pytest.raises(readers.DataError, match=rf"column `{column}`, row {row} .*{message}"):
        read(SCHEMA, file)


def test_nan_is_no_value_of_another_domain(tmp_path: pathlib.Path) -> None:
    rows = [{**row, "price": row.get("price", float("nan"))} for row in ROWS]
    write_parquet(tmp_path / "a.parquet", rows)
    assert pq.read_table(tmp_path / "a.parquet")["price"].null_count == 0
    assert read(SCHEMA, tmp_path)["price"].tolist() == [1, 0, 3, 0, 0]


def test_a_row_of_two_domains_is_refused(tmp_path: pathlib.Path) -> None:
    table = pa.table({"scene": [[1, 4]], "user": [1], "click": [0], "buy": [1], "price": [1.0]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(readers.DataError, match=r"`scene`, row 0 .* should be int64\. Found: list"):
        read(SCHEMA, tmp_path)


def test_each_domain_may_have_a_source_of_its_own_columns(tmp_path: pathlib.Path) -> None:
    for name, writer in (("one.parquet", write_parquet), ("two.tfrecord", write_tfrecord)):
        writer(tmp_path / name, [r for r in ROWS if r["scene"] == (1 if "one" in name else 4)])
    assert "topic" not in pq.read_schema(tmp_path / "one.parquet").names
    found = read(SCHEMA, tmp_path)
    assert found["user"].tolist() == [5, 7, 6, 9]
    assert found["topic"].tolist() == [b"", b"", b"a", b"b"]


def test_statistics_of_what_a_domain_owns_are_those_of_its_rows(tmp_path: pathlib.Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    known = {f.name: f for f in statistics.complete(SCHEMA, tmp_path).features}
    assert known["topic"].vocabulary == ("a", "b")
    assert known["seen"].vocabulary == (2, 3, 4)
    assert (known["price"].mean, known["price"].variance) == (2.0, 1.0)


def test_a_domain_without_training_rows_is_an_unknown_one(tmp_path: pathlib.Path) -> None:
    write_parquet(tmp_path / "a.parquet", [row for row in ROWS if row["scene"] != 1])
    config = SCHEMA.to_config()
    shared = [f for f in config["features"] if f["name"] != "price"]
    schema = Schema.from_config({**config, "features": shared})
    found = statistics.without_empty_domains(schema, tmp_path)
    assert found.domain_feature.vocabulary == (4,)
    assert found.num_domains == 1
    with pytest.raises(readers.DataError, match=r"`price` belongs to domains \(1,\)"):
        statistics.without_empty_domains(SCHEMA, tmp_path)
    write_parquet(tmp_path / "b.parquet", ROWS)
    assert statistics.without_empty_domains(SCHEMA, tmp_path) == SCHEMA


def test_a_model_of_one_domain_reads_its_rows_alone(tmp_path: pathlib.Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    one = dataclasses.replace(SCHEMA, only_domains=(4, 9))
    assert read(one, tmp_path)["user"].tolist() == [6, 8, 9]
    assert readers.count_rows(one, tmp_path) == 3
    assert readers.count_rows(SCHEMA, tmp_path) == 5
    none = dataclasses.replace(SCHEMA, only_domains=(2,))
    with pytest.raises(readers.DataError, match=r"no rows of domains \(2,\)"):
        read(none, tmp_path)


def test_domains_are_mixed_by_their_weights(tmp_path: pathlib.Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS)
    mixed = dataclasses.replace(SCHEMA, domain_weights=((4, 0.5), (9, 0)))
    _, targets = next(iter(readers.dataset(mixed, tmp_path, batch_size=5)))
    assert targets["weight"].numpy().tolist() == [1, 0.5, 1, 0, 0.5]
    assert targets["weight"].dtype == tf.float32


def test_metrics_leave_out_rows_without_the_label() -> None:
    labels = np.array([[1.0, 0], [0, np.nan], [1, 1], [0, np.nan]])
    scored = scores.Scored({"model": np.full((4, 2), 0.5)}, labels, {})
    found = scores.evaluate(scored, SCHEMA)["model"]
    assert (found["click"]["all"]["rows"], found["buy"]["all"]["rows"]) == (4, 2)
    assert found["buy"]["all"]["log_loss"] == pytest.approx(np.log(2))
