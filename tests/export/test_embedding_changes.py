"""Versions that are another one with some rows changed, read back by the op."""

from __future__ import annotations

import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from qianmo.export import embedding_shards as shards
from qianmo.export.embedding_changes import write_changes
from qianmo.export.embedding_shards import StoreError, Table
from qianmo.ops.embedding_lookup import EmbeddingStore, Read

COUNT, DIM = 300, 5
RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(COUNT, DIM)).astype(np.float32)
IDS = np.unique(RNG.integers(-(2**60), 2**60, 2 * COUNT))[:COUNT]
DTYPES = ("float32", "int8")


def rows_of(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, DIM)).astype(np.float32)


def store(folder: pathlib.Path) -> None:
    tables = []
    for dtype in DTYPES:
        table = Table(name=f"dense_{dtype}", dim=DIM, num_rows=COUNT, dtype=dtype)
        tables.append((table, [VECTORS]))
        table = Table(
            name=f"hash_{dtype}",
            dim=DIM,
            num_rows=COUNT,
            dtype=dtype,
            hashed=True,
            default_id=int(IDS[0]),
        )
        tables.append((table, [(IDS, VECTORS)]))
    shards.write(folder, 1, tables, shard_rows=64)
    shards.publish(folder, 1)


def read(folder: pathlib.Path, version: int, table: str, ids: np.ndarray) -> np.ndarray:
    shards.publish(folder, version)
    opened = EmbeddingStore(str(folder), verify=True)
    found = opened.lookup([Read(table, DIM, tf.constant(ids))], missing="error")[0].numpy()
    opened.close()
    return found


def kept(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """What the dtype keeps of vectors."""
    if dtype == "float32":
        return vectors
    scale = np.abs(vectors).max(1, keepdims=True) / np.float32(127)
    return np.rint(vectors / scale).astype(np.float32) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["dense", "hash"])
def test_changes_of_changes(tmp_path: pathlib.Path, scheme: str, dtype: str) -> None:
    store(tmp_path)
    name = f"{scheme}_{dtype}"
    ids = np.arange(COUNT) if scheme == "dense" else IDS
    expected = VECTORS.copy()
    first, second = np.array([0, 7, 63, 64, 299]), np.array([7, 8, 64])
    # All rows are given: those that are as they were cost nothing.
    expected[first] = rows_of(1, 5)
    chunks = [(ids[:100], expected[:100]), (ids[100:], expected[100:])]
    write_changes(tmp_path, 2, 1, [(name, chunks)])
    np.testing.assert_array_equal(read(tmp_path, 2, name, ids), kept(expected, dtype))
    (changed,) = (tmp_path / "2").glob("*changed*")
    assert changed.stat().st_size < 4096 * 2 + 5 * 24
    # A few rows are given, one of them twice, and one takes a change back.
    expected[second] = rows_of(2, 3)
    expected[63] = VECTORS[63]
    some = np.array([8, *second, 63])
    rows = np.concatenate([rows_of(3, 1), expected[some[1:]]])
    write_changes(tmp_path, 3, 2, [(name, [(ids[some], rows)])])
    # Neither the versions before nor their files are needed.
    found = {version: read(tmp_path, version, name, ids) for version in (3, 1)}
    np.testing.assert_array_equal(found[1], kept(VECTORS, dtype))
    shards.publish(tmp_path, 3)
    for version in (1, 2):
        shutil.rmtree(tmp_path / str(version))
    np.testing.assert_array_equal(read(tmp_path, 3, name, ids), kept(expected, dtype))
    np.testing.assert_array_equal(found[3], kept(expected, dtype))
    lines = {words[0]: words for words in shards.manifest(tmp_path / "3")}
    assert lines["changed"][2:4] == ["rows", "5"]
    # Nothing differs any more: no file of changes.
    write_changes(tmp_path, 4, 3, [(name, [(ids, VECTORS)])])
    assert not list((tmp_path / "4").glob("*changed*"))
    np.testing.assert_array_equal(read(tmp_path, 4, name, ids), kept(VECTORS, dtype))


def test_what_did_not_change_is_shared(tmp_path: pathlib.Path) -> None:
    store(tmp_path)
    write_changes(tmp_path, 2, 1, [("dense_float32", [(np.array([3]), rows_of(1, 1))])])
    for path in (tmp_path / "1").glob("*.rows"):
        assert os.path.samefile(path, tmp_path / "2" / path.name)
    assert shards.space(tmp_path / "2") == 1
    write_changes(tmp_path, 3, 2, [("hash_int8", [(IDS[:1], rows_of(2, 1))])])
    assert read(tmp_path, 3, "dense_float32", np.array([3])).tolist() == rows_of(1, 1).tolist()
    assert os.path.samefile(
        tmp_path / "2" / "dense_float32-changed-2.rows",
        tmp_path / "3" / "dense_float32-changed-2.rows",
    )


@pytest.mark.parametrize("scheme", ["dense", "hash"])
def test_a_table_that_changed_much_is_written_whole(tmp_path: pathlib.Path, scheme: str) -> None:
    store(tmp_path)
    name = f"{scheme}_float32"
    ids = np.arange(COUNT) if scheme == "dense" else IDS
    expected = VECTORS.copy()
    expected[50:120] = rows_of(1, 70)
    write_changes(tmp_path, 2, 1, [(name, [(ids[50:120], expected[50:120])])])
    assert list((tmp_path / "2").glob("*changed*"))
    expected[200:210] = rows_of(2, 10)
    write_changes(tmp_path, 3, 2, [(name, [(ids[200:210], expected[200:210])])])
    assert not list((tmp_path / "3").glob("*changed*"))
    np.testing.assert_array_equal(read(tmp_path, 3, name, ids), expected)
    if scheme == "hash":
        new = np.arange(90)
        write_changes(tmp_path, 4, 3, [(name, [(new, rows_of(4, 90))])])
        assert not list((tmp_path / "4").glob("*changed*"))
        every = np.concatenate([ids, new])
        expected = np.concatenate([expected, rows_of(4, 90)])
        np.testing.assert_array_equal(read(tmp_path, 4, name, every), expected)


@pytest.mark.parametrize(
    ("table", "ids", "count", "message"),
    [
        ("none", [0], 1, "should be a table `none`. It has .'dense_float32', "),
        ("dense_float32", [COUNT], 1, r"ids should be in \[0, 300\). Received: 300 to 300"),
        ("dense_float32", [-1, 2], 2, r"ids should be in \[0, 300\). Received: -1 to 2"),
        ("hash_float32", [0, 1], 1, r"ids should be \[1\]"),
    ],
)
def test_changes_that_do_not_fit(
    tmp_path: pathlib.Path, table: str, ids: list[int], count: int, message: str
) -> None:
    store(tmp_path)
    with pytest.raises(StoreError, match=message):
        write_changes(tmp_path, 2, 1, [(table, [(np.array(ids), rows_of(1, count))])])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "CURRENT"]
