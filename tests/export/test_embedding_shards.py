"""The writer of embedding tables. What it writes is read by the op in test_embedding_lookup.py."""

from __future__ import annotations

import os
import pathlib
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from qianmo.export import embedding_shards as shards
from qianmo.export.embedding_shards import StoreError, Table

ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)


def dense(**changes: object) -> Table:
    return Table(**{"name": "t", "dim": 3, "num_rows": 8, **changes})


def hashed(**changes: object) -> Table:
    return dense(hashed=True, default_id=10, **changes)


def left_in(folder: pathlib.Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_shards_hold_the_rows_in_order(tmp_path: pathlib.Path) -> None:
    chunks = np.split(ROWS, [1, 2, 7])  # other borders than the shards'
    folder = shards.write(tmp_path, 3, [(dense(), chunks)], shard_rows=4)
    assert left_in(folder) == ["MANIFEST", "t-00000-of-00002.rows", "t-00001-of-00002.rows"]
    stored = b"".join(p.read_bytes()[4096:] for p in sorted(folder.glob("*.rows")))
    np.testing.assert_array_equal(np.frombuffer(stored, np.float32).reshape(8, 3), ROWS)
    assert [words[:2] for words in shards.manifest(folder)] == [
        ["qianmo", "embeddings"],
        ["version", "3"],
        ["table", "t"],
        ["shard", "t-00000-of-00002.rows"],
        ["shard", "t-00001-of-00002.rows"],
    ]


def test_bytes_of_each_dtype() -> None:
    row = np.array([[1.0, -2.0, 0.5]], np.float32)
    assert shards.encode(row, "float32").tobytes() == row.tobytes()
    # 3C00, C000, 3800, and two bytes to a multiple of four.
    assert shards.encode(row, "float16").tobytes().hex() == "003c00c000380000"
    assert shards.encode(row, "bfloat16").tobytes().hex() == "803f00c0003f0000"
    # Between 1 and 1 + 2^-7, the nearest is even: 1; between the next two, the upper.
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8]], np.float32)
    assert shards.encode(ties, "bfloat16").tobytes().hex() == "803f823f"
    stored = shards.encode(np.concatenate([row, 0 * row]), "int8")
    assert stored.shape == (2, 8)
    scale = stored[:, :4].copy().view(np.float32)
    np.testing.assert_allclose(scale, [[2 / 127], [0]], rtol=1e-7)
    assert stored[:, 4:7].view(np.int8).tolist() == [[64, -127, 32], [0, 0, 0]]
    wild = np.random.default_rng(0).normal(size=(500, 9)).astype(np.float32) ** 9
    stored = shards.encode(wild, "int8")
    found = stored[:, 4:13].view(np.int8) * stored[:, :4].copy().view(np.float32)
    largest = np.abs(wild).max(1, keepdims=True)
    assert (np.abs(found - wild) <= largest / 254 * 1.00001).all()


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        (dense(), [ROWS[:7]], "should be 8 rows. Received: 7"),
        (dense(), [ROWS, ROWS[:1]], "should be 8 rows. Received: 9"),
        (dense(), [ROWS[:, :2]], r"should be \[n, 3\]. Received: \(8, 2\)"),
        (dense(), [ROWS[0]], r"should be \[n, 3\]. Received: \(3,\)"),
        (dense(), [ROWS[:6], ROWS[6:] * [1, np.nan, 1]], "row 6 should hold numbers .*nan"),
        (dense(dtype="float16"), [ROWS * 1e4], "row 2 should hold numbers that float16 can hold"),
        (hashed(), [(np.arange(10, 17), ROWS[:7])], "should be 8 rows. Received: 7"),
        (hashed(), [(np.arange(10, 17), ROWS)], r"ids should be \[8\].*Received: \(7,\)"),
        (hashed(), [(np.arange(11, 19), ROWS)], "`default_id` 10 should have a row"),
        (
            hashed(),
            [(np.arange(10, 14), ROWS[:4]), (np.array([20, 21, 11, 22]), ROWS[4:])],
            "id 11 should have one row, and has two",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused_and_nothing_is_left(
    tmp_path: pathlib.Path, table: Table, rows: list[object], message: str
) -> None:
    with pytest.raises(StoreError, match=f"table `t`: .*{message}"):
        shards.write(tmp_path, 1, [(table, rows)], shard_rows=4)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../t"}, "name should be .*Received: '../t'"),
        ({"dtype": "float64"}, "`dtype` should be one of .*Received: 'float64'"),
        ({"dim": 0}, "`dim` should be in .*Received: 0"),
        ({"num_rows": 0}, "`num_rows` should be in .*Received: 0"),
        ({"default_id": 8}, r"`default_id` should be in \[0, 8\). Received: 8"),
    ],
)
def test_tables_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        dense(**changes)


def test_versions_are_kept_and_published_only_whole(tmp_path: pathlib.Path) -> None:
    shards.write(tmp_path, 1, [(dense(), [ROWS])])
    assert shards.published(tmp_path) is None
    shards.publish(tmp_path, 1)
    assert shards.published(tmp_path) == 1
    with pytest.raises(StoreError, match="1 exists; give another version"):
        shards.write(tmp_path, 1, [(dense(), [ROWS])])
    with pytest.raises(StoreError, match=r"a power of two\. Received: 2, 2 and 3"):
        shards.write(tmp_path, 2, [(dense(), [ROWS])], shard_rows=3)
    with pytest.raises(StoreError, match="Received: 2, 3 and"):
        shards.write(tmp_path, 2, [(dense(), [ROWS])], space=3)
    with pytest.raises(StoreError, match="2/MANIFEST: No such file"):
        shards.publish(tmp_path, 2)
    folder = shards.write(tmp_path, 2, [(dense(), [ROWS])])
    (file,) = folder.glob("*.rows")
    whole = file.read_bytes()
    for damaged, message in (
        (whole[:-1], "has 4191 bytes and the manifest says 4192"),
        (whole[:-1] + b"\1", "checksum differs"),
        (b"q" + whole[1:], "checksum differs"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(StoreError, match=f"{file}: .*{message}"):
            shards.publish(tmp_path, 2)
    file.unlink()
    with pytest.raises(StoreError, match=f"{file}: No such file"):
        shards.publish(tmp_path, 2)
    text = (folder / "MANIFEST").read_text()
    (folder / "MANIFEST").write_text(text.replace("rows 8", "rows 9"))
    with pytest.raises(StoreError, match="MANIFEST: its checksum differs"):
        shards.publish(tmp_path, 2)
    assert shards.published(tmp_path) == 1
    (tmp_path / "CURRENT").write_bytes(b"1\xff\n")
    with pytest.raises(StoreError, match="CURRENT: it should hold a version's number"):
        shards.published(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("version 2 space 2", "version two space 2", "line 2 is not one of format 1"),
        ("version 2 space 2\n", "version 2\n", "line 2 is not one of format 1"),
        (" bytes 4192", "", "line 4 is not one of format 1"),
        ("bytes 4192", "bytes 4192x", "line 4 is not one of format 1"),
        ("shard ", "shard ../", "line 4 is not one of format 1"),
        ("shard ", "shard \x0b", "line 4 is not one of format 1"),
        ("table t", "table \xe9", "line 3 is not one of format 1"),
        (None, "qianmo embeddings 1\n", "it should hold a line `version`"),
        (None, "", "line 1 is not one of format 1"),
    ],
)
def test_a_manifest_with_a_right_checksum_and_other_lines_is_refused(
    tmp_path: pathlib.Path, old: str | None, new: str, fault: str
) -> None:
    manifest = shards.write(tmp_path, 2, [(dense(), [ROWS])]) / "MANIFEST"
    text = manifest.read_bytes().decode()
    lines = text[: text.rfind("crc ")]
    changed = new if old is None else lines.replace(old, new)
    assert changed != lines
    data = changed.encode("latin-1")
    manifest.write_bytes(data + f"crc {zlib.crc32(data):08x}\n".encode())
    for read in (shards.space, shards.verify):
        with pytest.raises(StoreError, match=f"{manifest}: {fault}"):
            read(manifest.parent)


@pytest.mark.parametrize("table", [dense, hashed])
def test_memory_does_not_grow_with_the_table(tmp_path: pathlib.Path, table: type) -> None:
    def chunks(count: int) -> Iterator[object]:
        for first in range(0, count, 1000):
            rows = np.ones((1000, 32), np.float32)
            yield rows if table is dense else (np.arange(first, first + 1000), rows)

    peaks = []
    for version, count in ((1, 1000), (2, 8_000), (3, 80_000)):
        made = table(dim=32, num_rows=count)
        tracemalloc.start()
        shards.write(tmp_path, version, [(made, chunks(count))], shard_rows=4096)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The largest table has 10 MB of rows.
    assert peaks[2] < peaks[1] + 200_000
    assert peaks[2] < 3_000_000
