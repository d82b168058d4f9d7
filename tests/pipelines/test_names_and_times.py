"""Tasks and domains by name, times of any type, event ids, and groups of GAUC."""

from __future__ import annotations

import datetime
import itertools
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from row_files import WRITERS, Row

from qianmo.layers.schema import Schema
from qianmo.layers.task_key import task_key
from qianmo.pipelines.data import keys, readers, statistics
from qianmo.pipelines.data.chunks import ChunkReader

each_format = pytest.mark.parametrize("extension", ["parquet", "csv", "tfrecord"])


def schema_of(**more: Any) -> Schema:
    features = more.pop("features", [{"name": "item"}])
    return Schema.from_config({"features": features, "labels": ["y"], **more})


def read(schema: Schema, path: pathlib.Path, **arguments: Any) -> dict[str, Any]:
    blocks = list(readers.blocks(schema, path, **arguments))
    return {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}


def only_batch(schema: Schema, path: pathlib.Path, **arguments: Any) -> Any:
    with readers.own_errors():
        (batch,) = readers.dataset(schema, path, batch_size=10_000, **arguments)
    return batch


NAMES = ["anna", "ben", "", "京", "ben", "anna\0", "[UNK]"]


@each_format
def test_tasks_may_have_names(tmp_path: pathlib.Path, extension: str) -> None:
    rows: list[Row] = [{"user": name, "item": 1, "y": 0} for name in NAMES if name != ""]
    names = [row["user"] for row in rows]
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    for features in ([{"name": "item"}], [{"name": "user", "dtype": "string"}]):
        schema = schema_of(features=features, task_id="user", task_dtype="string")
        assert [name.decode() for name in read(schema, file)["user"]] == names
        data = readers.dataset(schema, file, batch_size=10)
        _, targets = next(iter(data))
        assert targets["task_id"].dtype == data.element_spec[1]["task_id"].dtype == tf.int64
        np.testing.assert_array_equal(targets["task_id"], task_key(tf.constant(names)))


def test_names_are_hashed_as_the_graph_does() -> None:
    """FarmHash's Fingerprint64, of which `to_hash_bucket_fast` is a remainder."""
    names = tf.constant(NAMES)
    found = keys.of_strings(pa.array(NAMES))
    np.testing.assert_array_equal(found, tf.function(task_key)(names))
    assert found[2] == np.uint64(0x9AE16A3B2F90404F).view(np.int64)  # the published one of ""
    remainder = found.view(np.uint64) % np.uint64(1_000_003)
    np.testing.assert_array_equal(remainder, tf.strings.to_hash_bucket_fast(names, 1_000_003))
    assert task_key(tf.reshape(names[:6], [2, 3])).shape == (2, 3)
    assert task_key(tf.zeros([0], tf.string)).shape == (0,)
    assert len(keys.of_strings(pa.array([], pa.string()))) == 0


def test_chunks_of_tasks_with_names(tmp_path: pathlib.Path) -> None:
    rows = [{"user": name, "item": i, "y": 0, "t": i} for i, name in enumerate(NAMES[:2] * 5)]
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    schema = schema_of(task_id="user", task_dtype="string", timestamp="t")
    schema = statistics.complete(schema, tmp_path)
    batches = list(ChunkReader(schema, tmp_path, rows=5, tasks=1).dataset(seed=1))
    items = [features["item"].numpy().tolist() for features, _ in batches]
    whole = sorted(itertools.chain(*items))
    assert whole == list(range(10))
    for own in items:
        assert len({item % 2 for item in own}) == 1
        assert own == sorted(own)


def test_a_task_or_domain_of_another_type_is_refused_with_the_key_that_helps(
    tmp_path: pathlib.Path,
) -> None:
    table = pa.table({"item": [1], "y": [0], "name": ["a"], "number": [3], "list": [[1]]})
    table = table.append_column("struct", [[{"a": 1}]])
    table = table.append_column("time", [[datetime.datetime(2024, 5, 1)]])
    pq.write_table(table, tmp_path / "a.parquet")
    for roles, message in (
        ({"task_id": "name"}, r'int64\. Found: string .* or set `task_dtype` to "string"'),
        (
            {"task_id": "number", "task_dtype": "string"},
            r'string\. Found: int64 .* or set `task_dtype` to "int64"',
        ),
        ({"domain": "name"}, r'int64\. Found: string .* as a feature of dtype "string"'),
        ({"features": [{"name": "name"}]}, r'Found: string .* declare its `dtype` "string"\.'),
        (
            {"features": [{"name": "number", "dtype": "string"}]},
            r'string\. Found: int64 .* or declare its `dtype` "int64"\.',
        ),
        (
            {"features": [{"name": "struct"}]},
            r"Found: struct<.*> in the whole column\. Convert it\.",
        ),
        (
            {"features": [{"name": "struct", "max_length": 2}]},
            r"Found: struct<.*> in the whole column\. Convert it\.",
        ),
        ({"features": [{"name": "time"}]}, r"Found: timestamp\[us\] in the whole column\. Conver"),
        ({"features": [{"name": "list"}]}, r"Found: list.* or declare it with `max_length`"),
        (
            {"features": [{"name": "item", "max_length": 2}]},
            r"a list of int64\. Found: int64 .* or declare it without `max_length`",
        ),
        (
            {"features": [{"kind": "dense", "name": "name"}]},
            r"float32\. Found: string .* or declare it as categorical\.",
        ),
    ):
        with pytest.raises(readers.DataError, match=message) as error:
            read(schema_of(**roles), tmp_path)
        assert "another name" not in str(error.value)


DOMAINS = schema_of(
    features=[
        {"name": "scene", "dtype": "string", "vocabulary": ["home", "search"]},
        {"name": "query", "dtype": "string", "domains": ["search"]},
        {"kind": "dense", "name": "depth", "domains": ["home"]},
    ],
    labels=["y", "buy"],
    domain="scene",
    label_domains={"buy": ["search"]},
    domain_weights=[["search", 0.5]],
)
DOMAIN_ROWS: list[Row] = [
    {"scene": "home", "depth": 2.0, "y": 1},
    {"scene": "search", "query": "tea", "y": 0, "buy": 1},
    {"scene": "elsewhere", "y": 1},
    {"scene": "search", "query": "cup", "y": 0, "buy": 0},
]


@each_format
def test_domains_may_have_names(tmp_path: pathlib.Path, extension: str) -> None:
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, DOMAIN_ROWS)
    _, targets = only_batch(DOMAINS, file)
    assert targets["domain"].numpy().tolist() == [b"home", b"search", b"elsewhere", b"search"]
    assert targets["weight"].numpy().tolist() == [1, 0.5, 1, 0.5]
    nan = np.nan
    np.testing.assert_array_equal(targets["labels"][:, 1], [nan, 1, nan, 0])
    block = read(DOMAINS, file)
    assert block["query"].tolist() == [b"", b"tea", b"", b"cup"]
    assert block["depth"].tolist() == [2, 0, 0, 0]
    one = Schema.from_config({**DOMAINS.to_config(), "only_domains": ["search"]})
    assert read(one, file)["query"].tolist() == [b"tea", b"cup"]
    assert readers.count_rows(one, file) == 2
    complete = statistics.complete(DOMAINS, file)
    assert complete.tables["query"].vocabulary == ("cup", "tea")
    assert complete.dense[0].mean == 2.0


def test_rows_that_do_not_fit_a_domain_with_a_name(tmp_path: pathlib.Path) -> None:
    rows = [dict(row) for row in DOMAIN_ROWS]
    rows[0]["query"] = "milk"
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    with pytest.raises(readers.DataError, match=r"\('search',\) and .* of domain home\. Received"):
        read(DOMAINS, tmp_path)


def test_a_domain_with_a_name_and_no_training_row_is_an_unknown_one(tmp_path: pathlib.Path) -> None:
    WRITERS["parquet"](tmp_path / "a.parquet", [r for r in DOMAIN_ROWS if r["scene"] != "home"])
    shared = [f for f in DOMAINS.to_config()["features"] if f["name"] != "depth"]
    schema = Schema.from_config({**DOMAINS.to_config(), "features": shared})
    found = statistics.without_empty_domains(schema, tmp_path)
    assert found.domain_feature is not None
    assert found.domain_feature.vocabulary == ("search",)


UTC = datetime.UTC
MOMENTS = [
    datetime.datetime(2024, 5, 1, 12, 30, 0, 123456, tzinfo=UTC),
    datetime.datetime(1969, 12, 31, 23, 59, 59, 500000, tzinfo=UTC),
    datetime.datetime(2999, 12, 31, tzinfo=UTC),
]


def micros(moment: datetime.datetime) -> int:
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=UTC)) // datetime.timedelta(
        microseconds=1
    )


@pytest.mark.parametrize("unit", ["s", "ms", "us"])
@pytest.mark.parametrize(
    "kind",
    [
        pa.timestamp("us"),
        pa.timestamp("us", "UTC"),
        pa.timestamp("us", "Asia/Shanghai"),
        pa.timestamp("ms"),
        pa.timestamp("s", "America/New_York"),
        pa.date32(),
        pa.date64(),
        pa.string(),
        pa.int64(),
    ],
    ids=str,
)
def test_times_of_every_type_are_read_in_the_schemas_unit(
    tmp_path: pathlib.Path, kind: pa.DataType, unit: str
) -> None:
    """Datetimes are rounded down to what a type or unit holds, as floor division does."""
    whole = [micros(moment) for moment in MOMENTS]
    if pa.types.is_string(kind):
        column = pa.array([moment.isoformat().replace("+00:00", "Z") for moment in MOMENTS])
    elif pa.types.is_integer(kind):
        column = pa.array([1, -5, 2**62])
    elif pa.types.is_date(kind):
        whole = [value // 86_400_000_000 * 86_400_000_000 for value in whole]
        column = pa.array([moment.date() for moment in MOMENTS], kind)
    else:
        step = 10**6 // {"s": 1, "ms": 10**3, "us": 10**6}[kind.unit]
        whole = [value // step * step for value in whole]
        column = pa.array([value // step for value in whole]).cast(kind)
    pq.write_table(pa.table({"t": column, "item": [1] * 3, "y": [0] * 3}), tmp_path / "a.parquet")
    schema = schema_of(timestamp="t", timestamp_unit=unit)
    found = read(schema, tmp_path)["t"]
    assert found.dtype == np.int64
    if pa.types.is_integer(kind):
        assert found.tolist() == [1, -5, 2**62]
    else:
        factor = {"s": 10**6, "ms": 10**3, "us": 1}[unit]
        assert found.tolist() == [value // factor for value in whole]


ISO = {
    "2024-05-01T12:30:00Z": 1_714_566_600_000_000,
    "2024-05-01 12:30:00": 1_714_566_600_000_000,
    "2024-05-01T12:30:00+02:00": 1_714_559_400_000_000,
    "2024-05-01T12:30:00-0930": 1_714_600_800_000_000,
    "2024-05-01T12:30:00.123456": 1_714_566_600_123_456,
    "2024-05-01T12:30:00.123456789": 1_714_566_600_123_456,
    "2024-05-01T12:30:00.5Z": 1_714_566_600_500_000,
    "2024-05-01": 1_714_521_600_000_000,
    "2024-05-01T12:30": 1_714_566_600_000_000,
}


@pytest.mark.parametrize("extension", ["csv", "tfrecord"])
def test_iso_8601_with_and_without_zones(tmp_path: pathlib.Path, extension: str) -> None:
    rows = [{"t": text, "item": 1, "y": 0} for text in ISO]
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    assert read(schema_of(timestamp="t"), file)["t"].tolist() == list(ISO.values())


def test_integers_of_a_csv_are_times_in_the_unit(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("t,item,y\n1714566600,1,0\n-7,1,0\n")
    schema = schema_of(timestamp="t", timestamp_unit="s")
    assert read(schema, tmp_path)["t"].tolist() == [1_714_566_600, -7]


@pytest.mark.parametrize(
    "text", ["yesterday", "2024-13-01", "01/05/2024", "1.5", "2024-05-01T25:00:00", ""]
)
def test_what_is_no_time_is_named(tmp_path: pathlib.Path, text: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text(f"t,item,y\n2024-05-01,1,0\n2024-05-02T01:00Z,1,0\n{text},1,0\n")
    with pytest.raises(readers.DataError) as error:
        read(schema_of(timestamp="t"), file)
    fault = "int64 or a time such as 2024-05-01T12:30:00Z. Received: " if text else "is null or"
    assert f"{file}, column `t`, row 2 (counted from 0): " in str(error.value)
    assert fault in str(error.value)


def test_a_time_beyond_the_unit_is_named(tmp_path: pathlib.Path) -> None:
    days = pa.array([0, 200_000_000], pa.int32()).cast(pa.date32())  # the year 549,000
    pq.write_table(pa.table({"t": days, "item": [1] * 2, "y": [0] * 2}), tmp_path / "a.parquet")
    assert read(schema_of(timestamp="t", timestamp_unit="s"), tmp_path)["t"][1] == 2 * 86400 * 10**8
    with pytest.raises(readers.DataError, match=r"`t`, row 1 .* that fit in `timestamp_unit`"):
        read(schema_of(timestamp="t"), tmp_path)


def test_a_time_may_be_a_feature_too(tmp_path: pathlib.Path) -> None:
    table = pa.table({"t": pa.array(MOMENTS[:2]), "y": [0] * 2})
    pq.write_table(table, tmp_path / "a.parquet")
    schema = schema_of(features=[{"name": "t"}], timestamp="t")
    features, targets = only_batch(schema, tmp_path)
    assert features["t"].numpy().tolist() == targets["timestamp"].numpy().tolist()
    assert targets["timestamp"][0] == micros(MOMENTS[0])


@each_format
def test_events_have_ids(tmp_path: pathlib.Path, extension: str) -> None:
    rows = [{"user": 1, "item": 1, "t": 5, "event": 2**62 + i, "y": 0} for i in range(3)]
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    data = readers.dataset(
        schema_of(task_id="user", timestamp="t", event_id="event"), file, batch_size=3
    )
    assert data.element_spec[1]["event_id"].dtype == tf.int64
    _, targets = next(iter(data))
    assert targets["event_id"].numpy().tolist() == [2**62, 2**62 + 1, 2**62 + 2]


def group_rows(count: int = 200) -> list[Row]:
    random = np.random.default_rng(1)
    return [
        {
            "user": int(random.integers(-2, 3)),
            "scene": ["home", "search", ""][random.integers(1, 3) - 1],
            "price": float(random.integers(2)),
            "t": int(random.integers(-3, 4) * 43_200),
            "item": int(random.integers(3)),
            "y": 0,
        }
        for _ in range(count)
    ]


def partition(values: list[Any]) -> list[int]:
    """Equal values as equal numbers, in the order of their first."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


@each_format
@pytest.mark.parametrize(
    "columns",
    [("user",), ("day",), ("scene",), ("user", "day"), ("scene", "user", "price"), ("item", "day")],
)
def test_groups_are_rows_of_equal_values(
    tmp_path: pathlib.Path, extension: str, columns: tuple[str, ...]
) -> None:
    rows = group_rows()
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    schema = schema_of(gauc_by=columns, timestamp="t", timestamp_unit="s")
    _, targets = only_batch(schema, file, gauc=True)
    assert targets["gauc"].dtype == tf.int64
    for row in rows:
        row["day"] = row["t"] // 86_400
    expected = partition([tuple(row[name] for name in columns) for row in rows])
    assert partition(targets["gauc"].numpy().tolist()) == expected
    assert readers.signature(schema, gauc=True)[1]["gauc"].dtype == tf.int64


def test_groups_are_read_only_where_they_are_asked_for(tmp_path: pathlib.Path) -> None:
    rows = [{"item": 1, "y": 0}]
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    schema = schema_of(gauc_by=["user"])
    assert "gauc" not in only_batch(schema, tmp_path)[1]
    assert "gauc" not in readers.signature(schema)[1]
    with pytest.raises(readers.DataError, match="no column `user`"):
        readers.dataset(schema, tmp_path, batch_size=1, gauc=True)


def test_a_group_may_be_of_a_column_of_another_role(tmp_path: pathlib.Path) -> None:
    rows = group_rows()
    WRITERS["parquet"](tmp_path / "a.parquet", rows)
    schema = schema_of(
        features=[{"name": "scene", "dtype": "string"}, {"kind": "dense", "name": "price"}],
        task_id="user",
        group="item",
        gauc_by=["scene", "price", "item", "user"],
    )
    features, targets = only_batch(schema, tmp_path, gauc=True)
    expected = partition([(r["scene"], r["price"], r["item"], r["user"]) for r in rows])
    assert partition(targets["gauc"].numpy().tolist()) == expected
    assert features["scene"].dtype == tf.string
    assert targets["group"].numpy().tolist() == [b"%d" % row["item"] for row in rows]


def test_groups_of_every_parquet_type(tmp_path: pathlib.Path) -> None:
    columns = {
        "a": pa.array([2**64 - 1, 5, 2**64 - 1], pa.uint64()),
        "b": pa.array([True, False, True]),
        "c": pa.array([0.5, -0.0, 0.5], pa.float32()),
        "d": pa.array([MOMENTS[0], MOMENTS[1], MOMENTS[0]]),
        "e": pa.array(["x", "y", "x"]).dictionary_encode(),
        "f": pa.array([MOMENTS[0].date(), MOMENTS[1].date(), MOMENTS[0].date()]),
    }
    pq.write_table(pa.table({**columns, "item": [1] * 3, "y": [0] * 3}), tmp_path / "a.parquet")
    for by in (*columns, list(columns)):
        schema = schema_of(gauc_by=[by] if isinstance(by, str) else by)
        found = only_batch(schema, tmp_path, gauc=True)[1]["gauc"].numpy().tolist()
        assert partition(found) == [0, 1, 0], by


def test_what_is_no_group(tmp_path: pathlib.Path) -> None:
    pq.write_table(pa.table({"g": [1, None], "item": [1, 1], "y": [0, 0]}), tmp_path / "a.parquet")
    with pytest.raises(readers.DataError, match=r"`g`, row 1 .*is null or absent"):
        read(schema_of(gauc_by=["g"]), tmp_path, gauc=True)
    schema = schema_of(features=[{"name": "l", "max_length": 2}], gauc_by=["l"])
    with pytest.raises(ValueError, match=r"a list of int64 and, as the gauc_by, one value a row"):
        readers.blocks(schema, tmp_path, gauc=True)


def test_a_list_of_groups_of_equal_sums_is_not_one_group() -> None:
    """Columns are mixed one after the other: (1, 2), (2, 1) and (3, 0) differ."""
    pairs = np.array([*itertools.product(range(-50, 50), repeat=2)])
    schema = schema_of(gauc_by=["item", "user"])
    found = keys.groups(schema, {"item": pairs[:, 0], "user": pairs[:, 1]})
    assert len(np.unique(found)) == len(pairs)
