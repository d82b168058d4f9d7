"""Readers: values, order, shares and refusals, the same in each format."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import pathlib
import tracemalloc
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from row_files import WRITERS, Row, write_csv, write_parquet, write_tfrecord

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers

SCHEMA = Schema.from_config(
    {
        "features": [
            {"name": "user", "num_ids": 100},
            {"name": "city", "dtype": "string"},
            {"name": "seen", "max_length": 3, "keep": "last"},
            {"name": "tags", "dtype": "string", "max_length": 2, "keep": "first"},
            {"kind": "dense", "name": "price"},
        ],
        "labels": ["like", "click"],
        "weight": "weight",
        "timestamp": "time",
        "task_id": "user",
        "domain": "scene",
        "group": "age",
    }
)
SMALL = Schema.from_config({"features": [{"name": "id", "num_ids": 10**6}], "labels": ["y"]})


def make_rows(count: int) -> list[Row]:
    random = np.random.default_rng(7)
    cities = ["Paris", "a,b", 'say "hi"', "two\nlines", "京", "x"]
    return [
        {
            "user": int(random.integers(100)),
            "city": cities[random.integers(6)],
            "seen": [int(v) for v in random.integers(1, 2**40, random.integers(6))],
            "tags": [cities[i] for i in random.integers(6, size=random.integers(5))],
            "price": float(np.float32(random.normal())),
            "click": int(random.integers(2)),
            "like": 0.5 * float(random.integers(3)),
            "weight": float(random.integers(4)),
            "time": 1_650_000_000_000 + i,
            "scene": int(random.integers(3)),
            "age": int(random.integers(5)),
            "unused": i,
        }
        for i in range(count)
    ]


def ids_file(file: pathlib.Path, ids: Iterable[int], row_group_size: int = 100) -> pathlib.Path:
    values = np.asarray([*ids])
    table = pa.table({"id": values, "y": (values % 2).astype(np.int8)})
    pq.write_table(table, file, row_group_size=row_group_size)
    return file


def ids(path: pathlib.Path, **arguments: Any) -> list[int]:
    found = list(readers.blocks(SMALL, path, **arguments))
    for block in found:
        np.testing.assert_array_equal(block["y"], block["id"] % 2)  # rows stay whole
    return np.concatenate([block["id"] for block in found] or [np.zeros(0, np.int64)]).tolist()


def all_of(schema: Schema, path: pathlib.Path, **arguments: Any) -> dict[str, np.ndarray]:
    found = list(readers.blocks(schema, path, **arguments))
    return {name: np.concatenate([block[name] for block in found]) for name in found[0]}


@pytest.mark.parametrize("extension", WRITERS)
def test_values_are_those_written(tmp_path: pathlib.Path, extension: str) -> None:
    rows = make_rows(300)
    rows[0]["seen"] = rows[0]["tags"] = []  # the first row's lists are nowhere in a TFRecord
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)

    found = all_of(SCHEMA, file)

    assert {name: str(values.dtype) for name, values in found.items()} == {
        "user": "int64",
        "city": "object",
        "seen": "int64",
        "seen_length": "int64",
        "tags": "object",
        "tags_length": "int64",
        "price": "float32",
        "like": "float32",
        "click": "float32",
        "weight": "float32",
        "time": "int64",
        "scene": "int64",
        "age": "object",
    }
    for name in ("user", "price", "like", "click", "weight", "time", "scene"):
        assert found[name].tolist() == [row[name] for row in rows], name
    assert [value.decode() for value in found["city"]] == [row["city"] for row in rows]
    assert [int(value) for value in found["age"]] == [row["age"] for row in rows]
    for i, row in enumerate(rows):
        last = row["seen"][-3:]
        assert found["seen_length"][i] == len(last)
        assert found["seen"][i].tolist() == last + [0] * (3 - len(last))
        first = [tag.encode() for tag in row["tags"][:2]]
        assert found["tags_length"][i] == len(first)
        assert found["tags"][i].tolist() == first + [b""] * (2 - len(first))
    assert readers.count_rows(SCHEMA, file) == 300


@pytest.mark.parametrize("extension", WRITERS)
def test_batches_are_the_schemas_inputs(tmp_path: pathlib.Path, extension: str) -> None:
    rows = make_rows(50)
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)

    data = readers.dataset(SCHEMA, file, batch_size=20)
    batches = list(data)

    features, targets = batches[0]
    assert set(features) == set(SCHEMA.input_names)
    assert set(targets) == {"labels", "weight", "task_id", "domain", "timestamp", "group"}
    assert [len(targets["weight"]) for _, targets in batches] == [20, 20, 10]
    labels = [[row["like"], row["click"]] for row in rows[:20]]  # the schema's order
    assert targets["labels"].numpy().tolist() == labels
    assert targets["group"].numpy().tolist() == [b"%d" % row["age"] for row in rows[:20]]
    assert targets["task_id"].numpy().tolist() == [row["user"] for row in rows[:20]]
    assert features["seen"].shape == (20, 3)
    specs = data.element_spec
    assert specs[0]["seen"].shape.as_list() == [None, 3]
    assert specs[0]["user"].shape.as_list() == [None]
    assert specs[1]["labels"].shape.as_list() == [None, 2]
    assert len(list(readers.dataset(SCHEMA, file, batch_size=20, drop_remainder=True))) == 2


def test_rows_weigh_one_when_no_weight_is_declared(tmp_path: pathlib.Path) -> None:
    data = readers.dataset(SMALL, ids_file(tmp_path / "a.parquet", range(5)), batch_size=5)
    _, targets = next(iter(data))
    assert set(targets) == {"labels", "weight"}
    assert targets["weight"].numpy().tolist() == [1.0] * 5


def test_a_group_that_is_an_integer_column_elsewhere_stays_integer(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(
        {"features": [{"name": "id", "num_ids": 9}], "labels": ["y"], "group": "id"}
    )
    data = readers.dataset(schema, ids_file(tmp_path / "a.parquet", range(5)), batch_size=5)
    assert next(iter(data))[1]["group"].numpy().tolist() == [0, 1, 2, 3, 4]


def test_narrow_encoded_and_fixed_size_columns_read_alike(tmp_path: pathlib.Path) -> None:
    rows = make_rows(40)
    for row in rows:
        row["seen"] = (row["seen"] + [7, 7, 7])[:3]
        row["like"] = 1.0
    table = pa.Table.from_pylist(rows)
    plain, other = tmp_path / "plain.parquet", tmp_path / "other.parquet"
    pq.write_table(table, plain)
    for name, column in {
        "user": table["user"].cast(pa.uint8()),
        "city": table["city"].cast(pa.large_string()).dictionary_encode(),
        "seen": table["seen"].cast(pa.list_(pa.int64(), 3)),
        "price": table["price"].cast(pa.float32()),
        "like": table["like"].cast(pa.bool_()),
        "age": table["age"].cast(pa.string()),
    }.items():
        table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, other)
    expected, found = all_of(SCHEMA, plain), all_of(SCHEMA, other)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_lists_that_are_all_empty(tmp_path: pathlib.Path) -> None:
    rows = [{**row, "seen": [], "tags": []} for row in make_rows(3)]
    for extension, writer in WRITERS.items():
        writer(tmp_path / f"a.{extension}", rows)
        found = all_of(SCHEMA, tmp_path / f"a.{extension}")
        assert found["seen"].tolist() == [[0, 0, 0]] * 3
        assert found["tags"].tolist() == [[b"", b""]] * 3
        assert found["tags_length"].tolist() == [0, 0, 0]


def test_csv_knows_an_empty_string_by_its_quotes(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config({"features": [{"name": "s", "dtype": "string"}], "labels": ["y"]})
    file = tmp_path / "a.csv"
    file.write_text('\ufeffs,y\n"",1\nNA,0\n', encoding="utf-8")
    assert all_of(schema, file)["s"].tolist() == [b"", b"NA"]


def test_a_path_is_a_file_a_folder_or_a_glob(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "b.parquet", range(10, 20))
    ids_file(tmp_path / "a.parquet", range(10))
    ids_file(tmp_path / "_c.parquet", [99])
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "data.json").write_text("{}")
    assert ids(tmp_path) == list(range(20))
    assert ids(tmp_path / "[ab].parquet") == list(range(20))
    assert ids(tmp_path / "b.parquet") == list(range(10, 20))
    assert readers.count_rows(SMALL, tmp_path) == 20


def test_an_empty_shard_among_others_is_no_fault(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "a.parquet", [])
    ids_file(tmp_path / "b.parquet", range(3))
    assert ids(tmp_path) == [0, 1, 2]


def test_a_seed_and_an_epoch_fix_the_order(tmp_path: pathlib.Path) -> None:
    for part in range(3):
        ids_file(tmp_path / f"{part}.parquet", range(part * 1000, part * 1000 + 1000))
    arguments = {"seed": 5, "shuffle_rows": 300}
    first = ids(tmp_path, **arguments)
    assert sorted(first) == list(range(3000))
    assert ids(tmp_path, **arguments) == first
    assert ids(tmp_path, **arguments, epoch=1) != first
    assert ids(tmp_path, seed=6, shuffle_rows=300) != first
    # Rows of distant row groups meet in the buffer: parts hardly keep their place.
    assert abs(np.corrcoef(first, np.arange(3000))[0, 1]) < 0.6
    assert np.mean(np.diff(first) == 1) < 0.05


def test_a_buffer_of_all_rows_shuffles_uniformly(tmp_path: pathlib.Path) -> None:
    file = ids_file(tmp_path / "a.parquet", range(4))
    first = [ids(file, seed=1, epoch=epoch)[0] for epoch in range(400)]
    counts = np.bincount(first, minlength=4)
    assert (np.abs(counts - 100) < 4 * np.sqrt(75)).all(), counts


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_the_rows_of_the_blocks(tmp_path: pathlib.Path, seed: int | None) -> None:
    file = ids_file(tmp_path / "a.parquet", range(1000))
    arguments: dict[str, Any] = {"seed": seed, "epoch": 2, "shuffle_rows": 70}
    data = readers.dataset(SMALL, file, batch_size=64, **arguments)
    found = np.concatenate([features["id"].numpy() for features, _ in data])
    assert found.tolist() == ids(file, **arguments)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("skip", [1, 4, 11, 99])
def test_skipped_batches_leave_the_others_as_they_are(
    tmp_path: pathlib.Path, seed: int | None, skip: int
) -> None:
    rows = make_rows(500)
    write_parquet(tmp_path / "a.parquet", rows[:300])
    write_csv(tmp_path / "b.csv", rows[300:])
    arguments: dict[str, Any] = {"batch_size": 37, "seed": seed, "shuffle_rows": 100}
    whole = list(readers.dataset(SCHEMA, tmp_path, **arguments))
    rest = list(readers.dataset(SCHEMA, tmp_path, skip_batches=skip, **arguments))
    assert len(rest) == max(len(whole) - skip, 0)
    for expected, found in zip(whole[skip:], rest, strict=True):
        tf.nest.map_structure(
            lambda a, b: np.testing.assert_array_equal(a.numpy(), b.numpy()), expected, found
        )


@pytest.mark.parametrize(
    ("files", "row_groups", "count"),
    [(4, 2, 3), (2, 3, 4), (1, 1, 3), (1, 7, 8)],
    ids=["by file", "by row group", "by row", "by row among row groups"],
)
@pytest.mark.parametrize("seed", [None, 1])
def test_shards_are_disjoint_and_complete(
    tmp_path: pathlib.Path, files: int, row_groups: int, count: int, seed: int | None
) -> None:
    for part in range(files):
        own = range(part * 210, part * 210 + 210)
        ids_file(tmp_path / f"{part}.parquet", own, row_group_size=210 // row_groups)
    shards = [ids(tmp_path, shard=(i, count), seed=seed, shuffle_rows=50) for i in range(count)]
    assert sorted(itertools.chain(*shards)) == list(range(files * 210))
    assert all(shards)


@pytest.mark.parametrize("extension", ["csv", "tfrecord"])
def test_one_file_of_any_format_is_shared_by_row(tmp_path: pathlib.Path, extension: str) -> None:
    rows = [{"id": i, "y": i % 2} for i in range(10)]
    WRITERS[extension](tmp_path / f"a.{extension}", rows)
    assert ids(tmp_path, shard=(0, 3)) == [0, 3, 6, 9]
    assert ids(tmp_path, shard=(2, 3)) == [2, 5, 8]


def test_shares_by_row_are_even(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "a.parquet", range(10), row_group_size=5)
    assert [ids(tmp_path, shard=(i, 3)) for i in range(3)] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_memory_follows_the_buffer_and_not_the_data(tmp_path: pathlib.Path) -> None:
    def peak(count: int) -> tuple[int, int]:
        file = tmp_path / f"{count}.parquet"
        values = np.random.default_rng(1).integers(0, 10**6, count)
        table = pa.table({"id": values, "y": (values % 2).astype(np.int8)})
        pq.write_table(table, file, row_group_size=count)  # one row group, the worst case
        del table, values
        arrow = 0
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        try:
            for _ in readers.blocks(SMALL, file, seed=1, shuffle_rows=4000):
                arrow = max(arrow, pa.total_allocated_bytes() - before)
            return tracemalloc.get_traced_memory()[1], arrow
        finally:
            tracemalloc.stop()

    peak(100_000)  # what is allocated once
    (small, small_arrow), (large, large_arrow) = peak(100_000), peak(800_000)
    assert large < 1.2 * small + 100_000
    assert large_arrow < 800_000 * 9 / 2  # less than half of the columns
    assert large_arrow < 2 * small_arrow + 2**21


def test_sha256_is_of_the_contents_alone(tmp_path: pathlib.Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        ids_file(tmp_path / folder / "a.parquet", range(9))
        ids_file(tmp_path / folder / "b.parquet", range(5))
    one = readers.sha256(tmp_path / "one")
    assert one == readers.sha256(tmp_path / "two")
    ids_file(tmp_path / "two" / "b.parquet", range(6))
    assert one != readers.sha256(tmp_path / "two")
    file = tmp_path / "one" / "a.parquet"
    assert readers.sha256(file) == hashlib.sha256(file.read_bytes()).hexdigest()


BAD_VALUES = {
    "null id": ("user", None, "is null or absent"),
    "null string": ("city", None, "is null or absent"),
    "null label": ("click", None, "is null or absent"),
    "null in a dense column": ("price", None, "is null or absent"),
    "null domain": ("scene", None, "is null or absent"),
    "NaN label": ("like", float("nan"), "should be in [0, 1]. Received: nan"),
    "infinite label": ("like", float("inf"), "should be in [0, 1]. Received: inf"),
    "label above 1": ("like", 1.5, "should be in [0, 1]. Received: 1.5"),
    "label below 0": ("click", -1, "should be in [0, 1]. Received: -1"),
    "NaN weight": ("weight", float("nan"), "should be finite and >= 0. Received: nan"),
    "negative weight": ("weight", -2.0, "should be finite and >= 0. Received: -2"),
    "NaN dense value": ("price", float("nan"), "should be a finite number. Received: nan"),
    "infinite dense value": ("price", float("-inf"), "should be a finite number. Received: -inf"),
}


@pytest.mark.parametrize("extension", ["parquet", "csv", "tfrecord"])
@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_value_is_named(tmp_path: pathlib.Path, extension: str, case: str) -> None:
    column, value, fault = BAD_VALUES[case]
    rows = make_rows(100)
    rows[71][column] = value
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, rows)
    with pytest.raises(readers.DataError) as error:
        list(readers.blocks(SCHEMA, file, seed=1, shuffle_rows=30))  # decodes 30 rows at a time
    place = f"{file}, column `{column}`, row 71 (counted from 0): "
    assert str(error.value).startswith(place + fault)


CSV_FAULTS = {
    "a word for an integer": ("id,y\n1,0\nx7,1\n", "`id`, row 1", "int64. Received: 'x7'"),
    "a fraction": ("id,y\n1.0,0\n", "`id`, row 0", "int64. Received: '1.0'"),
    "too large": ("id,y\n9223372036854775808,0\n", "`id`, row 0", "Received: '92233720368547758"),
    "a word for a label": ("id,y\n1,0\n1,0\n1,yes\n", "`y`, row 2", "float32. Received: 'yes'"),
    "too few cells": ("id,y\n1,0\n1\n", "row 1", "should have 2 cells"),
    "too many cells": ("id,y\n1,0,3\n", "row 0", "Received: 3. Correct the row."),
    "bytes that are no UTF-8": (b"id,y\n1,0\n\xff,0\n", "`id`, row 1", r"Received: b'\xff'"),
    "a missing column": ("ids,y\n1,0\n", "no column `id`", "did you mean `ids`?"),
    "a column twice": ("id,y,id\n1,0,2\n", "column `id`", "is there twice"),
    "no header": ("", "a.csv", "without even the header"),
    "no rows": ("id,y\n", "a.csv", "no rows"),
}


@pytest.mark.parametrize("case", CSV_FAULTS)
def test_csv_faults(tmp_path: pathlib.Path, case: str) -> None:
    text, place, fault = CSV_FAULTS[case]
    file = tmp_path / "a.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(readers.DataError) as error:
        list(readers.blocks(SMALL, file))
    assert str(file) in str(error.value)
    assert place in str(error.value)
    assert fault in str(error.value)


def test_a_row_is_counted_from_the_start_of_its_file(tmp_path: pathlib.Path) -> None:
    write_csv(tmp_path / "a.csv", [{"id": i, "y": 0} for i in range(50)])
    values: list[int | None] = [*range(2000)]
    values[1234] = None
    table = pa.table({"id": values, "y": np.zeros(2000)})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=100)
    for arguments in ({}, {"seed": 1}, {"seed": 1, "shuffle_rows": 30}):
        with pytest.raises(readers.DataError, match=r"b\.parquet, column `id`, row 1234 "):
            ids(tmp_path, **arguments)


PARQUET_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "strings": ({"id": ["1", "2"]}, "`id`, row 0", "should be int64. Found: string"),
    "fractions": (
        {"id": [1.0, 2.0]},
        "`id`, row 0",
        "should be int64. Found: double in the whole column. Convert it to int64, in which nulls",
    ),
    "a list": ({"id": [[1], [2]]}, "`id`, row 0", "should be int64. Found: list"),
    "no list": ({"seen": [1, 2]}, "`seen`, row 0", "should be a list of int64. Found: int64"),
    "null list": ({"seen": [[1], None]}, "`seen`, row 1", "is null or absent"),
    "null in a list": ({"seen": [[1, 2], [3, None]]}, "`seen`, row 1", "its list holds a null"),
    "overflow": ({"id": pa.array([1, 2**63], pa.uint64())}, "`id`, row 1", "9223372036854775808"),
    "overflow in a list": (
        {"seen": pa.array([[], [1, 2**64 - 1]], pa.list_(pa.uint64()))},
        "`seen`, row 1",
        "Received: 18446744073709551615",
    ),
    "string labels": ({"y": ["0", "1"]}, "`y`, row 0", "should be float32. Found: string"),
    "fractions of a time": ({"t": [1.0, 2.0]}, "`t`, row 0", "int64 or a time such as 2024-05"),
    "float32 overflow": ({"x": [0.0, 1e39]}, "`x`, row 1", "a finite number. Received: 1e+39"),
}


@pytest.mark.parametrize("case", PARQUET_FAULTS)
def test_parquet_faults(tmp_path: pathlib.Path, case: str) -> None:
    columns, place, fault = PARQUET_FAULTS[case]
    schema = Schema.from_config(
        {
            "features": [
                {"name": "id"},
                {"name": "seen", "max_length": 1, "keep": "first"},
                {"kind": "dense", "name": "x"},
            ],
            "labels": ["y"],
            "timestamp": "t",
        }
    )
    good = {"id": [1, 2], "seen": [[1], [2]], "x": [0.0, 1.0], "y": [0, 1], "t": [1, 2]}
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({**good, **columns}), file)
    with pytest.raises(readers.DataError) as error:
        list(readers.blocks(schema, file))
    assert str(error.value).startswith(f"{file}, column {place} (counted from 0): ")
    assert fault in str(error.value)


@pytest.mark.parametrize("extension", ["parquet", "tfrecord", "csv.gz"])
def test_a_truncated_file_is_named(tmp_path: pathlib.Path, extension: str) -> None:
    file = tmp_path / f"a.{extension}"
    WRITERS[extension](file, make_rows(100))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(readers.DataError, match="truncated or corrupt; write it again") as error:
        list(readers.blocks(SCHEMA, file))
    assert str(file) in str(error.value)
    if extension == "tfrecord":
        assert "row 99 (counted from 0)" in str(error.value)


def test_damage_within_a_file_is_found(tmp_path: pathlib.Path) -> None:
    rows = make_rows(100)
    write_tfrecord(tmp_path / "a.tfrecord", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", write_page_checksum=True)
    for name in ("a.tfrecord", "a.parquet"):
        damaged = bytearray((tmp_path / name).read_bytes())
        damaged[200] ^= 255
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(readers.DataError, match="truncated or corrupt") as error:
            list(readers.blocks(SCHEMA, tmp_path / name))
        assert name in str(error.value)


def test_tfrecord_rows_that_differ_are_named(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.tfrecord"

    def refusal(rows: Sequence[Row]) -> str:
        write_tfrecord(file, rows)
        with pytest.raises(readers.DataError) as error:
            list(readers.blocks(SMALL, file))
        return str(error.value)

    good = {"id": 1, "y": 1}
    assert "column `id`, row 2 (counted from 0): should be int64" in refusal(
        [good, good, {"id": "x7", "y": 1}]
    )
    assert "column `id`, row 1 (counted from 0): holds 2 values" in refusal(
        [good, {"id": [1, 2], "y": 1}]
    )
    assert "column `id`, row 0 (counted from 0): should be int64. Found: binary" in refusal(
        [{"id": "x7", "y": 1}]
    )
    assert "no column `y`; it holds: id." in refusal([{"id": 1}])
    assert "no rows" in refusal([])


def test_paths_without_data_are_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.xlsx").touch()
    (tmp_path / "b.parquet").touch()
    ids_file(tmp_path / "c.parquet", [])
    for name, fault in {
        "nowhere.parquet": "no such file, folder or glob",
        "empty": "The folder holds no file that ends in .parquet",
        "a.xlsx": "should end in one of .parquet, .tfrecord, .csv, .csv.gz",
        "b.parquet": "file size is 0 bytes",
        "c.parquet": "no rows",
    }.items():
        with pytest.raises(readers.DataError) as error:
            readers.blocks(SMALL, tmp_path / name)  # already here, before the first row
        assert fault in str(error.value)
        assert name in str(error.value)


def test_a_missing_column_is_refused_before_the_first_batch(tmp_path: pathlib.Path) -> None:
    for extension, writer in WRITERS.items():
        writer(tmp_path / f"a.{extension}", [{"idd": 1, "y": 1}])
        with pytest.raises(readers.DataError, match="no column `id`; did you mean `idd`"):
            readers.dataset(SMALL, tmp_path / f"a.{extension}", batch_size=1)


def test_a_fault_in_the_midst_reaches_who_iterates(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text("id,y\n1,0\nx7,1\n")
    data = readers.dataset(SMALL, tmp_path / "a.csv", batch_size=1)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`id`, row 1 .*Received: 'x7'"):
        list(data)


def test_one_column_cannot_be_of_two_types(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(
        {"features": [{"kind": "dense", "name": "id"}], "labels": ["y"], "timestamp": "id"}
    )
    with pytest.raises(
        ValueError, match=r"`id` should be of one type\. Received: float32 and, as "
    ):
        readers.blocks(schema, tmp_path)


def test_arguments_out_of_range(tmp_path: pathlib.Path) -> None:
    file = ids_file(tmp_path / "a.parquet", range(3))
    with pytest.raises(ValueError, match=r"`shard` should be \(index, count\)"):
        readers.blocks(SMALL, file, shard=(2, 2))
    with pytest.raises(ValueError, match=r"`shuffle_rows` should be >= 1\. Received: 0"):
        readers.blocks(SMALL, file, seed=1, shuffle_rows=0)
    with pytest.raises(ValueError, match=r"`batch_size` should be >= 1\. Received: 0"):
        readers.dataset(SMALL, file, batch_size=0)


def test_rows_without_targets_can_be_read_for_scoring(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(
        {"features": [{"name": "user", "num_ids": 9}], "labels": ["click"], "weight": "w"}
    )
    pq.write_table(pa.table({"user": [3, 4]}), tmp_path / "new.parquet")
    (block,) = readers.blocks(schema, tmp_path / "new.parquet", targets=False)
    assert set(block) == {"user"}
    np.testing.assert_array_equal(block["user"], [3, 4])
    with pytest.raises(readers.DataError, match="click"):
        list(readers.blocks(schema, tmp_path / "new.parquet"))


@pytest.mark.parametrize("extension", WRITERS)
def test_what_is_left_out_is_counted(tmp_path: pathlib.Path, extension: str) -> None:
    rows = make_rows(300)
    WRITERS[extension](tmp_path / f"a.{extension}", rows)
    schema = dataclasses.replace(SCHEMA, only_domains=(0, 2))
    tally = readers.Tally()
    kept = sum(readers.num_rows(b) for b in readers.blocks(schema, tmp_path, tally=tally))
    others = sum(row["scene"] == 1 for row in rows)
    assert (tally.rows, tally.of_other_domains) == (300, others) == (300, 300 - kept)
    cut = [len(row["seen"]) - 3 for row in rows if len(row["seen"]) > 3]
    assert tally.cut_lists == {
        "seen": len(cut),
        "tags": sum(len(row["tags"]) > 2 for row in rows),
    }
    assert tally.cut_values["seen"] == sum(cut)
    lines = tally.lines(schema)
    assert lines[0] == (
        f"{others:,} of 300 rows are of other domains than (0, 2) and left out, as `only_domains` "
        "says."
    )
    assert lines[1] == (
        f"{len(cut)} of 300 lists `seen` are longer than `max_length` 3: {sum(cut)} values at "
        "their start are left out."
    )
    assert "values at their end are left out." in lines[2]
    counted = readers.Tally()
    assert readers.count_rows(schema, tmp_path, tally=counted) == kept
    assert counted.of_other_domains == others
    # Shuffling, and shares of workers, count each row once.
    tallies = [readers.Tally() for _ in range(3)]
    for index, one in enumerate(tallies):
        list(readers.blocks(schema, tmp_path, seed=1, shuffle_rows=50, shard=(index, 3), tally=one))
    assert sum(one.rows for one in tallies) == 300
    assert sum(one.of_other_domains for one in tallies) == others


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "a.parquet", range(5))
    tally = readers.Tally()
    list(readers.blocks(SMALL, tmp_path, tally=tally))
    assert tally.lines(SMALL) == []
