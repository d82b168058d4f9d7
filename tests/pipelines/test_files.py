"""Paths: literal names, globs, partition folders, and what is refused instead of half read."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from row_files import WRITERS

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, statistics

SMALL = Schema.from_config({"features": [{"name": "id", "num_ids": 10**6}], "labels": ["y"]})


def ids_file(file: pathlib.Path, ids: Sequence[int]) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": [*ids], "y": [i % 2 for i in ids]}), file)
    return file


def column(schema: Schema, path: Any, name: str = "id") -> list[Any]:
    return [v for block in readers.blocks(schema, path) for v in block[name].tolist()]


def ids(path: Any) -> list[int]:
    return column(SMALL, path)


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?", "d[!x]", "e{1,2}", "ü ß"])
@pytest.mark.parametrize("extension", ["parquet", "csv", "csv.gz", "tfrecord"])
def test_a_path_that_exists_is_literal(tmp_path: pathlib.Path, name: str, extension: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = folder / f"{name}.{extension}"
    WRITERS[extension](file, [{"id": 7, "y": 1}])
    ids_file(tmp_path / "a1" / "a1.parquet", [1])  # what the name would match
    for path in (file, folder, f"{folder}/*.{extension}", f"file://{folder}"):
        assert ids(path) == [7]
    assert readers.count_rows(SMALL, file) == 1
    assert readers.sha256(file) == readers.sha256(folder)
    batches = list(readers.dataset(SMALL, str(file), batch_size=1))
    assert batches[0][0]["id"].numpy().tolist() == [7]


def test_a_glob_names_files_and_folders(tmp_path: pathlib.Path) -> None:
    for day in (1, 2, 3):
        ids_file(tmp_path / f"dt=2024-05-0{day}" / "part-0.parquet", [day])
        ids_file(tmp_path / f"dt=2024-05-0{day}" / "part-1.parquet", [10 * day])
    assert ids(tmp_path / "dt=2024-05-0[12]") == [1, 10, 2, 20]
    assert ids(tmp_path / "dt=*" / "part-1.parquet") == [10, 20, 30]
    assert ids(f"{tmp_path}/**/*.parquet") == [1, 10, 2, 20, 3, 30]
    assert ids(f"{tmp_path}/**") == [1, 10, 2, 20, 3, 30]
    assert ids(tmp_path / "dt=2024-05-02") == [2, 20]
    (tmp_path / "dt=2024-05-02" / "_SUCCESS").touch()
    assert ids(f"{tmp_path}/dt=2024-05-02/*") == [2, 20]
    (tmp_path / "dt=2024-05-02" / "notes.txt").touch()
    with pytest.raises(readers.DataError, match=r"notes\.txt: its name should end in one of"):
        ids(f"{tmp_path}/dt=2024-05-02/*")


PARTITIONED = Schema.from_config(
    {
        "features": [
            {"name": "id", "num_ids": 100},
            {"name": "scene"},
            {"name": "city", "dtype": "string", "default": "nowhere"},
        ],
        "labels": ["y"],
        "timestamp": "dt",
        "timestamp_unit": "s",
        "domain": "scene",
    }
)
FOLDERS = {
    "dt=2024-05-01/scene=3/city=Rome": [1, 2],
    "dt=2024-05-01/scene=4/city=a%3Db%20%2F%E4%BA%AC": [3],
    "dt=2024-05-02/scene=3/city=__HIVE_DEFAULT_PARTITION__": [4, 5],
}


@pytest.mark.parametrize("extension", ["parquet", "csv", "csv.gz", "tfrecord"])
def test_partition_folders_are_columns(tmp_path: pathlib.Path, extension: str) -> None:
    for folder, own in FOLDERS.items():
        (tmp_path / folder).mkdir(parents=True)
        rows = [{"id": i, "y": 0} for i in own]
        WRITERS[extension](tmp_path / folder / f"part-0.{extension}", rows)
        (tmp_path / folder / f".part-0.{extension}.crc").touch()
    (tmp_path / "_SUCCESS").touch()
    assert column(PARTITIONED, tmp_path) == [1, 2, 3, 4, 5]
    assert column(PARTITIONED, tmp_path, "scene") == [3, 3, 4, 3, 3]
    cities = ["Rome", "Rome", "a=b /京", "nowhere", "nowhere"]
    assert [city.decode() for city in column(PARTITIONED, tmp_path, "city")] == cities
    day = 1_714_521_600
    assert column(PARTITIONED, tmp_path, "dt") == [day] * 3 + [day + 86_400] * 2
    assert readers.count_rows(PARTITIONED, tmp_path) == 5
    vocabulary = statistics.complete(PARTITIONED, tmp_path).tables["scene"].vocabulary
    assert vocabulary == (3, 4)
    # A part of the tree has the columns that the folders above it name.
    below = tmp_path / "dt=2024-05-01"
    assert column(PARTITIONED, below, "scene") == [3, 3, 4]
    assert column(PARTITIONED, below / "scene=4", "dt") == [day]
    file = below / "scene=4" / "city=a%3Db%20%2F%E4%BA%AC" / f"part-0.{extension}"
    assert column(PARTITIONED, file, "scene") == [4]
    one = Schema.from_config({**PARTITIONED.to_config(), "only_domains": [4]})
    assert column(one, tmp_path) == [3]
    assert readers.count_rows(one, tmp_path) == 1
    assert sorted(column(PARTITIONED, tmp_path)) == sorted(
        i
        for index in range(2)
        for block in readers.blocks(PARTITIONED, tmp_path, seed=1, shard=(index, 2))
        for i in block["id"].tolist()
    )


def test_partitions_as_arrow_writes_them(tmp_path: pathlib.Path) -> None:
    """Nested, with nulls and characters that paths cannot hold."""
    table = pa.table(
        {
            "id": [1, 2, 3, 4],
            "y": [0, 1, 0, 1],
            "scene": pa.array([3, 3, 4, 4]),
            "city": ["a/b", None, "x=y", "%41"],
            "dt": ["2024-05-01"] * 4,
        }
    )
    names = ["dt", "scene", "city"]
    partitioning = ds.partitioning(
        pa.schema([table.schema.field(name) for name in names]), flavor="hive"
    )
    ds.write_dataset(table, tmp_path / "made", format="parquet", partitioning=partitioning)
    found = dict(
        zip(
            column(PARTITIONED, tmp_path / "made"),
            column(PARTITIONED, tmp_path / "made", "city"),
            strict=True,
        )
    )
    assert found == {1: b"a/b", 2: b"nowhere", 3: b"x=y", 4: b"%41"}


def test_values_of_a_folder_are_hashed_with_the_files(tmp_path: pathlib.Path) -> None:
    for folder in ("one/dt=1", "two/dt=1", "three/dt=2"):
        ids_file(tmp_path / folder / "a.parquet", [1])
    assert readers.sha256(tmp_path / "one") == readers.sha256(tmp_path / "two")
    assert readers.sha256(tmp_path / "one") != readers.sha256(tmp_path / "three")


def refusal(path: Any, schema: Schema = SMALL) -> str:
    with pytest.raises(readers.DataError) as error:
        readers.blocks(schema, path)
    return str(error.value)


def test_a_folder_of_files_and_folders_is_refused(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "a.parquet", [1])
    ids_file(tmp_path / "dt=1" / "b.parquet", [2])
    both = "it should hold files or folders of rows. Received: both, such as a.parquet and dt=1."
    assert refusal(tmp_path).startswith(f"{tmp_path}: {both} Move the one or the other, or")
    assert ids(f"{tmp_path}/*.parquet") == [1]
    (tmp_path / "dt=1").rename(tmp_path / "old")
    assert "such as a.parquet and old." in refusal(tmp_path)
    shutil.rmtree(tmp_path / "old")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").touch()
    assert ids(tmp_path) == [1]  # a folder without rows is none of ours
    # Also deep in the tree.
    ids_file(tmp_path / "tree" / "dt=1" / "a.parquet", [1])
    ids_file(tmp_path / "tree" / "dt=1" / "hour=2" / "a.parquet", [2])
    assert refusal(tmp_path / "tree").startswith(f"{tmp_path / 'tree' / 'dt=1'}: it should hold")


def test_folders_that_are_no_partitions_are_named(tmp_path: pathlib.Path) -> None:
    for name in ("b", "a"):
        ids_file(tmp_path / name / "a.parquet", [1])
    message = refusal(tmp_path)
    assert "rows are in folders of it that are no partitions, such as a." in message
    assert f"by a glob, such as {tmp_path}/*." in message
    assert ids(f"{tmp_path}/*") == [1, 1]


def test_a_folder_with_the_name_of_a_file_is_a_folder(tmp_path: pathlib.Path) -> None:
    """As Spark writes `rows.parquet`."""
    folder = tmp_path / "rows.parquet"
    ids_file(folder / "part-00000-f00-c000.snappy.parquet", [1])
    (folder / "_SUCCESS").touch()
    (folder / ".part-00000-f00-c000.snappy.parquet.crc").touch()
    assert ids(folder) == [1]
    assert "no partitions, such as rows.parquet." in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_delta_log", "is a Delta table, which lists its valid files in a log (it holds _delta"),
        (".hoodie", "is a Hudi table"),
        ("_spark_metadata", "was written by a Spark stream"),
        ("_temporary", "it holds _temporary, so a job is writing it, or failed. Wait for its end"),
    ],
)
def test_a_folder_whose_files_are_not_all_valid(
    tmp_path: pathlib.Path, name: str, message: str
) -> None:
    ids_file(tmp_path / "a.parquet", [1])
    (tmp_path / name).mkdir()
    assert message in refusal(tmp_path)
    assert ids(tmp_path / "a.parquet") == [1]


def test_partitions_that_do_not_agree_are_refused(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "dt=1" / "a.parquet", [1])
    ids_file(tmp_path / "scene=1" / "a.parquet", [1])
    message = refusal(tmp_path)
    assert "scene=1/a.parquet: its folders name `scene`, and those of" in message
    assert message.endswith("`dt`. Files that are read together should have the same partitions.")
    ids_file(tmp_path / "twice" / "dt=1" / "dt=2" / "a.parquet", [1])
    assert "two of its folders name `dt`" in refusal(tmp_path / "twice")
    ids_file(tmp_path / "mixed" / "a.parquet", [1])
    ids_file(tmp_path / "more" / "dt=1" / "b.parquet", [1])
    message = refusal(f"{tmp_path}/m*")
    assert "and those of" in message
    assert "nothing" in message


@pytest.mark.parametrize("extension", ["parquet", "csv", "tfrecord"])
def test_a_column_of_the_folder_and_the_file_is_refused(
    tmp_path: pathlib.Path, extension: str
) -> None:
    (tmp_path / "id=3").mkdir()
    WRITERS[extension](tmp_path / "id=3" / f"a.{extension}", [{"id": 3, "y": 1}])
    fault = "column `id` is in the file and in the name of its folder, id=3. Take it out of one"
    assert fault in refusal(tmp_path)


def test_values_of_folders_fit_the_schema(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "scene=home" / "a.parquet", [1])
    schema = Schema.from_config({"features": [{"name": "scene"}], "labels": ["y"]})
    with pytest.raises(readers.DataError, match=r"`scene`, row 0 .* int64\. Received: 'home'"):
        column(schema, tmp_path)
    schema = Schema.from_config(
        {"features": [{"name": "scene", "max_length": 2, "dtype": "string"}], "labels": ["y"]}
    )
    assert "a list of string. Found: the name of its folder, scene=home." in refusal(
        tmp_path, schema
    )
    (tmp_path / "scene=home").rename(tmp_path / "scene=__HIVE_DEFAULT_PARTITION__")
    schema = Schema.from_config({"features": [{"name": "scene"}], "labels": ["y"]})
    with pytest.raises(readers.DataError, match=r"`scene`, row 0 .*is null or absent"):
        column(schema, tmp_path)


@pytest.mark.parametrize("scheme", ["s3", "gs", "hdfs", "https", "abfss"])
def test_other_places_are_refused_by_their_scheme(scheme: str) -> None:
    message = refusal(f"{scheme}://bucket/rows/")
    assert "files are read from this machine alone, by a plain path or file://." in message
    assert f"Received: {scheme}://. Copy the files here, or mount what holds them." in message


def test_an_empty_path_is_no_folder(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_file(tmp_path / "a.parquet", [1])
    monkeypatch.chdir(tmp_path)
    assert ids(".") == ids("a.parquet") == ids("*.parquet") == [1]
    assert refusal("") == "the path of the data is empty; give a file, a folder or a glob."


def test_rows_in_folders_below_are_not_passed_over(tmp_path: pathlib.Path) -> None:
    ids_file(tmp_path / "top.parquet", [1])
    ids_file(tmp_path / "2024" / "05" / "x.parquet", [2])
    with pytest.raises(readers.DataError, match="it should hold files or folders of rows"):
        ids(tmp_path)
    (tmp_path / "top.parquet").unlink()
    with pytest.raises(readers.DataError, match="rows are in folders of it that are no partitions"):
        ids(tmp_path)
    assert ids(tmp_path / "2024" / "05") == [2]
