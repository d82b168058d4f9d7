"""Values that a row may lack: defaults, missing dense values, optional labels, label weights."""

from __future__ import annotations

import dataclasses
import decimal
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from row_files import WRITERS, Row

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, replay, statistics

each_format = pytest.mark.parametrize("extension", ["parquet", "csv", "tfrecord"])

SCHEMA = Schema.from_config(
    {
        "features": [
            {"name": "user", "default": -1},
            {"name": "city", "dtype": "string", "default": "nowhere"},
            {"name": "seen", "max_length": 3, "default": []},
            {"kind": "dense", "name": "price", "default": 2.0},
            {"kind": "dense", "name": "age", "indicator": True},
        ],
        "labels": ["click", "buy", "stars"],
        "label_kinds": {"stars": "rating"},
        "label_weights": {"click": 2.0, "stars": "trust"},
        "optional_labels": ["buy", "stars"],
    }
)
NONE = None
ROWS: list[Row] = [
    {"user": 5, "city": "Rome", "seen": [1, 2], "price": 1.5, "age": 30.0}
    | {"click": 1, "buy": 0, "stars": 5.0, "trust": 0.5},
    {"user": NONE, "city": NONE, "seen": NONE, "price": NONE, "age": NONE}
    | {"click": 0, "buy": NONE, "stars": -3.5, "trust": 1.0},
    {"user": 7, "city": "Oslo", "seen": [4], "price": 4.5, "age": 50.0}
    | {"click": 0, "buy": 1, "stars": NONE, "trust": 1.0},
    {"user": 5, "city": "Rome", "seen": [1], "price": 1.0, "age": 40.0}
    | {"click": 1, "buy": 1, "stars": 1e6, "trust": 0.0},
]


def read(schema: Schema, path: pathlib.Path) -> dict[str, Any]:
    blocks = list(readers.blocks(schema, path))
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


@each_format
def test_a_null_is_read_as_the_default(tmp_path: pathlib.Path, extension: str) -> None:
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, ROWS)
    block = read(SCHEMA, file)
    assert block["user"].tolist() == [5, -1, 7, 5]
    assert block["city"].tolist() == [b"Rome", b"nowhere", b"Oslo", b"Rome"]
    assert block["seen"].tolist() == [[1, 2, 0], [0, 0, 0], [4, 0, 0], [1, 0, 0]]
    assert block["seen_length"].tolist() == [2, 0, 1, 1]
    # Dense values stay NaN: the model puts the default or the mean there.
    np.testing.assert_array_equal(block["price"], np.float32([1.5, np.nan, 4.5, 1.0]))
    np.testing.assert_array_equal(block["age"], np.float32([30, np.nan, 50, 40]))


@each_format
def test_labels_and_their_weights(tmp_path: pathlib.Path, extension: str) -> None:
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, ROWS)
    data = readers.dataset(SCHEMA, file, batch_size=4)
    _, targets = next(iter(data))
    nan = np.nan
    expected = [[1, 0, 5], [0, nan, -3.5], [0, 1, nan], [1, 1, nan]]  # the last weighs 0
    np.testing.assert_array_equal(targets["labels"], np.float32(expected))
    weights = [[2, 1, 0.5], [2, 0, 1], [2, 1, 0], [2, 1, 0]]
    np.testing.assert_array_equal(targets["label_weights"], np.float32(weights))
    assert data.element_spec[1]["label_weights"].shape.as_list() == [None, 3]
    assert targets["weight"].numpy().tolist() == [1] * 4


def test_label_weights_are_a_target_only_where_they_are_declared(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.parquet"
    WRITERS["parquet"](file, ROWS)
    plain = dataclasses.replace(SCHEMA, label_weights={})
    _, targets = next(iter(readers.dataset(plain, file, batch_size=4)))
    assert set(targets) == {"labels", "weight"}
    assert targets["labels"][3, 2] == 1e6
    # A number of 0 takes the label out of the loss, and leaves it to the metrics.
    mute = dataclasses.replace(SCHEMA, label_weights={"click": 0.0})
    _, targets = next(iter(readers.dataset(mute, file, batch_size=4)))
    assert targets["labels"][:, 0].numpy().tolist() == [1, 0, 0, 1]
    assert targets["label_weights"][:, 0].numpy().tolist() == [0] * 4


@each_format
def test_moments_are_those_of_the_values_that_are_there(
    tmp_path: pathlib.Path, extension: str
) -> None:
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, ROWS)
    schema = statistics.complete(SCHEMA, file)
    price, age = schema.dense
    assert (price.mean, price.variance) == pytest.approx((7 / 3, np.var([1.5, 4.5, 1.0])))
    assert (age.mean, age.variance) == pytest.approx((40, 200 / 3))
    assert schema.label_moments == {"stars": pytest.approx((0.75, 4.25**2))}  # of 5 and -3.5
    # A default is a value of its own.
    assert schema.categorical[0].vocabulary == (5, -1, 7)
    assert schema.categorical[1].vocabulary == ("Rome", "Oslo", "nowhere")
    assert schema.is_complete
    assert statistics.inherit(SCHEMA, schema) == schema


def test_nothing_but_nulls(tmp_path: pathlib.Path) -> None:
    """A column of which Parquet knows no type, as a writer makes it when nothing is there."""
    file = tmp_path / "a.parquet"
    rows = [{**row, **dict.fromkeys(("user", "city", "seen", "price", "buy"))} for row in ROWS]
    WRITERS["parquet"](file, rows)
    assert pa.types.is_null(pq.read_schema(file).field("price").type)
    block = read(SCHEMA, file)
    assert block["user"].tolist() == [-1] * 4
    assert block["city"].tolist() == [b"nowhere"] * 4
    assert block["seen_length"].tolist() == [0] * 4
    assert np.isnan(block["price"]).all()
    assert np.isnan(block["buy"]).all()
    with pytest.raises(readers.DataError, match="column `price`: no row has a value"):
        statistics.complete(SCHEMA, file)


def test_a_default_out_of_the_range_of_a_narrow_type(tmp_path: pathlib.Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    table = table.set_column(0, "user", pa.array([5, None, 7, 5], pa.uint8()))
    city = pa.array(["Rome", None, "Oslo", "Rome"], pa.large_string()).dictionary_encode()
    table = table.set_column(1, "city", city)
    price = pa.array([1, None, 4, 1], pa.int8())
    table = table.set_column(3, "price", price)
    age = [None if age is None else decimal.Decimal(age) for age in ("30", None, "50", "40")]
    table = table.set_column(4, "age", pa.array(age, pa.decimal128(9, 2)))
    pq.write_table(table, tmp_path / "a.parquet")
    block = read(SCHEMA, tmp_path / "a.parquet")
    assert block["user"].tolist() == [5, -1, 7, 5]
    assert block["city"].tolist() == [b"Rome", b"nowhere", b"Oslo", b"Rome"]
    np.testing.assert_array_equal(block["price"], np.float32([1, np.nan, 4, 1]))
    np.testing.assert_array_equal(block["age"], np.float32([30, np.nan, 50, 40]))


def test_nulls_within_lists_are_left_out_where_null_lists_are_empty(tmp_path: pathlib.Path) -> None:
    seen = [[None, 3, None, 4, 5], [None], None, [], [1, None, 2]]
    table = pa.table({"seen": pa.array(seen, pa.list_(pa.int64())), "y": [0] * 5})
    pq.write_table(table, tmp_path / "a.parquet")
    config = {"name": "seen", "max_length": 2, "default": []}
    schema = Schema.from_config({"features": [config], "labels": ["y"]})
    block = read(schema, tmp_path / "a.parquet")
    assert block["seen"].tolist() == [[4, 5], [0, 0], [0, 0], [0, 0], [1, 2]]
    assert block["seen_length"].tolist() == [2, 0, 0, 0, 2]


def test_nan_in_a_file_is_no_value(tmp_path: pathlib.Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    for name in ("price", "age", "buy"):
        column = pa.array([1.0, float("nan"), 0.5, 0.0])
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, tmp_path / "a.parquet")
    block = read(SCHEMA, tmp_path / "a.parquet")
    for name in ("price", "age", "buy"):
        assert np.isnan(block[name]).tolist() == [False, True, False, False]


FAULTS = {
    "null task": ("user", None, "Give it a value, or give the feature a `default`."),
    "null dense": ("price", None, "Give it a value, or give the feature a `default`."),
    "NaN": ("price", float("nan"), "Received: nan. Give it a value, or give the feature a `defau"),
    "null label": ("click", None, "Give it a value, or name the label in `optional_labels`."),
    "NaN label": ("click", float("nan"), "Received: nan. Give it a value, or name the label in"),
    "null rating": ("stars", None, "is null or absent. Give it a value, or name the label"),
    "null label weight": ("trust", None, "Give it a value, 0 where the row does not have the lab"),
    "negative label weight": ("trust", -1.0, "should be finite and >= 0. Received: -1.0. Correct"),
    "null weight": ("weight", None, "is null or absent. Give it a value."),
    "null event": ("event", None, "is null or absent. Give it a value."),
    "infinite rating": ("stars", float("inf"), "should be a finite number. Received: inf"),
}


@each_format
@pytest.mark.parametrize("case", FAULTS)
def test_what_the_schema_does_not_allow_is_refused_with_its_remedy(
    tmp_path: pathlib.Path, extension: str, case: str
) -> None:
    column, value, message = FAULTS[case]
    schema = Schema.from_config(
        {
            "features": [{"name": "user"}, {"kind": "dense", "name": "price"}],
            "labels": ["click", "stars"],
            "label_kinds": {"stars": "rating"},
            "label_weights": {"click": "trust"},
            "weight": "weight",
            "task_id": "user",
            "timestamp": "time",
            "event_id": "event",
        }
    )
    good = {"user": 1, "price": 0.5, "click": 1.0, "stars": 4.0, "trust": 1.0, "weight": 1.0}
    rows = [good | {"time": 7, "event": i} for i in range(3)]
    rows[1] = {**rows[1], column: value}
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    with pytest.raises(readers.DataError) as error:
        read(schema, file)
    assert f"{file}, column `{column}`, row 1 (counted from 0): " in str(error.value)
    assert message in str(error.value)


@each_format
def test_an_infinite_value_is_refused_where_none_is_allowed(
    tmp_path: pathlib.Path, extension: str
) -> None:
    rows = [dict(row) for row in ROWS]
    rows[2]["age"] = float("inf")
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    with pytest.raises(readers.DataError, match=r"`age`, row 2 .*should be a finite number"):
        read(SCHEMA, file)


def test_a_label_weight_belongs_to_the_labels_domains(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(
        {
            "features": [{"name": "scene", "vocabulary": [1, 2]}],
            "labels": ["click", "buy"],
            "domain": "scene",
            "label_domains": {"buy": [2]},
            "label_weights": {"buy": "trust"},
        }
    )
    rows = [
        {"scene": 1, "click": 1, "buy": None, "trust": None},
        {"scene": 2, "click": 0, "buy": 1, "trust": 0.25},
    ]
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    _, targets = next(iter(readers.dataset(schema, tmp_path, batch_size=2)))
    assert targets["label_weights"].numpy().tolist() == [[1, 0], [1, 0.25]]


def test_a_column_of_two_roles_needs_a_value_where_one_of_them_does(tmp_path: pathlib.Path) -> None:
    """A missing price is read; a missing weight is not, and they are one column."""
    config = {"features": [{"kind": "dense", "name": "price", "indicator": True}], "labels": ["y"]}
    WRITERS["parquet"](tmp_path / "a.parquet", [{"price": 1.0, "y": 1}, {"price": None, "y": 0}])
    assert len(read(Schema.from_config(config), tmp_path)["price"]) == 2
    with pytest.raises(readers.DataError, match=r"`price`, row 1 .*is null or absent"):
        read(Schema.from_config({**config, "weight": "price"}), tmp_path)


def test_what_a_support_row_lacks_is_told_from_every_value(tmp_path: pathlib.Path) -> None:
    good = {"user": 1, "stars": 3.5, "y": 1}
    config = {"features": [{"name": "user"}], "labels": ["stars", "y"]}
    config |= {"label_kinds": {"stars": "rating"}, "optional_labels": ["stars", "y"]}
    schema = Schema.from_config(config)
    rows = [good, {**good, "stars": None}, {**good, "stars": -1.0}, {**good, "y": None}]
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    found = replay.columns(schema, str(tmp_path))
    np.testing.assert_array_equal(found["stars"], [3.5, np.nan, -1, 3.5])
    assert found["y"].tolist() == [1, 1, 1, -1]
