"""Streams of rows: their order, going on from a position, and that no row is lost unseen."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis_servers

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import redis_stream
from qianmo.pipelines.data.readers import DataError
from qianmo.pipelines.data.redis_stream import RedisStream
from qianmo.pipelines.data.streams import FolderStream, Stream

SCHEMA = Schema.from_config(
    {
        "features": [
            {"name": "user", "num_ids": 2000},
            {"name": "seen", "num_ids": 60, "max_length": 3},
            {"kind": "dense", "name": "price"},
        ],
        "labels": ["click"],
    }
)


def write(file: pathlib.Path, users: range) -> None:
    count = len(users)
    columns = {
        "user": [*users],
        "seen": [[u % 60] * (u % 4) for u in users],
        "price": np.linspace(0, 1, count, dtype=np.float32),
        "click": np.zeros(count, np.int8),
    }
    schema = pa.schema(
        [
            ("user", pa.int64()),
            ("seen", pa.list_(pa.int64())),
            ("price", pa.float32()),
            ("click", pa.int8()),
        ]
    )
    pq.write_table(pa.table(columns, schema=schema), file)


def taken(stream: Stream, count: int) -> list[int] | None:
    block = stream.take(count)
    return None if block is None else block["user"].tolist()


def folder(path: pathlib.Path, position: Any = None, **arguments: Any) -> FolderStream:
    """A stream whose position went through JSON, as in a checkpoint."""
    return FolderStream(SCHEMA, path, json.loads(json.dumps(position)), **arguments)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "0.parquet", range(300))
    write(tmp_path / "1.parquet", range(300, 400))
    write(tmp_path / "_3.parquet", range(9))
    (tmp_path / "_temporary").mkdir()  # a job is writing more
    stream = folder(tmp_path)
    assert taken(stream, 250) == [*range(250)]
    assert stream.place == "row 250 of 0.parquet"
    assert taken(stream, 151) is None
    write(tmp_path / "2.parquet", range(0))
    write(tmp_path / "3.parquet", range(400, 900))
    assert taken(stream, 151) == [*range(250, 401)]
    assert stream.place == "row 1 of 3.parquet"
    assert stream.behind() == pytest.approx(499, rel=0.3)
    position = stream.position
    assert position["passed"] == ["0.parquet", "1.parquet", "2.parquet", "3.parquet"]
    assert not position["ended"]
    assert taken(folder(tmp_path, position), 499) == [*range(401, 900)]
    after = folder(tmp_path, start_after="1.parquet")
    assert taken(after, 50) == [*range(400, 450)]
    assert taken(folder(tmp_path, after.position), 450) == [*range(450, 900)]


def test_files_that_were_read_may_be_deleted(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "0.parquet", range(300))
    write(tmp_path / "1.parquet", range(300, 400))
    stream = folder(tmp_path)
    taken(stream, 300)
    assert not stream.position["ended"]  # nobody has looked for more of it
    within = stream.position
    taken(stream, 50)
    (tmp_path / "0.parquet").unlink()
    assert taken(folder(tmp_path, stream.position), 50) == [*range(350, 400)]
    assert taken(stream, 50) == [*range(350, 400)]
    assert taken(stream, 1) is None
    assert stream.position["ended"]
    (tmp_path / "1.parquet").unlink()
    again = folder(tmp_path, stream.position)
    write(tmp_path / "2.parquet", range(5))
    assert taken(again, 5) == [*range(5)]
    assert again.position["passed"] == ["2.parquet"]
    # One of which rows may be left is missed.
    with pytest.raises(DataError, match=r"0\.parquet: 300 rows of it were taken, it may have held"):
        folder(tmp_path, within)


@pytest.mark.parametrize("is_running", [True, False])
def test_a_file_that_appears_too_late_is_refused(tmp_path: pathlib.Path, is_running: bool) -> None:
    """Also when it came while nobody was looking, which only the position can tell."""
    for number in (3, 5):
        write(tmp_path / f"{number}.parquet", range(10))
    stream = folder(tmp_path)
    taken(stream, 15)
    write(tmp_path / "4.parquet", range(10))
    fault = r"4\.parquet: it appeared when 5\.parquet had been begun, whose name comes after, so"
    with pytest.raises(DataError, match=fault):
        _ = taken(stream, 100) if is_running else folder(tmp_path, stream.position)
    (tmp_path / "4.parquet").rename(tmp_path / "6.parquet")
    assert taken(folder(tmp_path, stream.position), 15) == [*range(5, 10), *range(10)]


def test_a_late_file_is_seen_in_a_folder_that_was_emptied(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "3.parquet", range(100))
    stream = folder(tmp_path)
    assert taken(stream, 100) is not None
    assert taken(stream, 1) is None
    (tmp_path / "3.parquet").unlink()
    position = stream.position
    write(tmp_path / "10.parquet", range(5))
    for one in (lambda: taken(stream, 5), lambda: folder(tmp_path, position)):
        with pytest.raises(DataError, match=r"10\.parquet: it appeared when 3\.parquet had been"):
            one()


def test_what_is_passed_over_at_the_start_may_still_come(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "5.parquet", range(10))
    stream = folder(tmp_path, start_after="4.parquet")
    taken(stream, 5)
    write(tmp_path / "3.parquet", range(9))
    assert taken(stream, 5) == [*range(5, 10)]
    assert taken(stream, 1) is None
    assert taken(folder(tmp_path, stream.position), 1) is None
    write(tmp_path / "45.parquet", range(9))
    with pytest.raises(DataError, match=r"45\.parquet: it appeared when 5\.parquet had been begun"):
        folder(tmp_path, stream.position)


def test_a_file_that_changed_is_refused(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "0.parquet", range(100))
    stream = folder(tmp_path)
    taken(stream, 50)
    half = stream.position
    taken(stream, 50)
    as_long = bytearray((tmp_path / "0.parquet").read_bytes())
    as_long[50] ^= 1
    write(tmp_path / "1.tmp", range(200))
    for content in (bytes(as_long), (tmp_path / "1.tmp").read_bytes()):
        (tmp_path / "0.parquet").write_bytes(content)
        for count, position in ((50, half), (100, stream.position)):
            message = rf"0\.parquet: it holds other bytes than when {count} of its rows were taken"
            with pytest.raises(DataError, match=message):
                folder(tmp_path, position)


def test_folders_that_are_not_followed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "day=1").mkdir()
    with pytest.raises(DataError, match=r"Received: partition folders, such as day=1\. Follow one"):
        folder(tmp_path)
    (tmp_path / "day=1").rename(tmp_path / "old")
    write(tmp_path / "0.parquet", range(10))
    stream = folder(tmp_path)
    write(tmp_path / "old" / "0.parquet", range(10))
    with pytest.raises(DataError, match=r"files or folders of rows\. Received: both, such as 0\."):
        taken(stream, 20)
    with pytest.raises(DataError, match="there should be a folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"of another stream: {'id': '7-0'}"):
        folder(tmp_path, {"id": "7-0"})
    bad = tmp_path / "more"
    bad.mkdir()
    (bad / "5.parquet").write_bytes((tmp_path / "0.parquet").read_bytes()[:-500])
    with pytest.raises(DataError, match=r"5\.parquet: cannot be read as Parquet"):
        taken(folder(bad), 10)
    (bad / "5.parquet").unlink()
    stream = folder(bad)
    bad.rmdir()
    with pytest.raises(DataError, match=r"more: cannot be listed"):
        taken(stream, 1)


def test_rows_of_other_domains_are_passed_over_from_any_position(tmp_path: pathlib.Path) -> None:
    config = {
        "features": [{"name": "user", "num_ids": 100}, {"name": "scene", "dtype": "string"}],
        "labels": ["click"],
        "domain": "scene",
        "only_domains": ["a"],
    }
    schema = Schema.from_config(config)
    for number in range(3):
        users = [*range(10 * number, 10 * number + 10)]
        scene = ["a" if user % 3 else "b" for user in users]
        table = pa.table({"user": users, "scene": scene, "click": [0] * 10})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    expected = [user for user in range(30) if user % 3]
    position = None
    found = []
    for _ in range(4):
        stream = FolderStream(schema, tmp_path, position)
        found += taken(stream, 5) or []
        position = stream.position
    assert found == expected


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    """A Redis server of its own: its address, and a client."""
    if redis_servers.MISSING:
        pytest.skip(redis_servers.REASON)
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as started:
        yield started.url("0"), started.client()


class Entries:
    """A stream on a server of its own name, and entries for it."""

    def __init__(self, server: tuple[str, Any], key: str) -> None:
        self.url, self.client = server
        self.key = key
        self.client.delete(key)

    def put(self, *users: Any, **changes: Any) -> list[str]:
        return [
            self.client.xadd(
                self.key, {"user": user, "seen": "1|2", "price": "0.5", "click": 1, **changes}
            ).decode()
            for user in users
        ]

    def open(self, position: Any = None, **arguments: Any) -> RedisStream:
        position = json.loads(json.dumps(position))
        return RedisStream(SCHEMA, self.url, self.key, "g", position, **arguments)

    def pending(self) -> list[str]:
        found = self.client.xpending_range(self.key, "g", "-", "+", 99)
        return [entry["message_id"].decode() for entry in found]


@pytest.fixture
def entries(server: tuple[str, Any], request: pytest.FixtureRequest) -> Entries:
    return Entries(server, request.node.name)


def test_the_position_tells_where_reading_goes_on(entries: Entries) -> None:
    """Whatever the group was sent, and to whom, and what was acknowledged since."""
    ids = entries.put(*range(8))
    stream = entries.open()
    assert taken(stream, 2) == [0, 1]
    assert stream.position == {"id": ids[1], "entries": 2, "lost": 0}
    assert stream.place == f"entry {ids[1]}"
    assert stream.behind() == 6
    stream.keep()
    assert entries.pending() == []
    assert taken(stream, 2) == [2, 3]
    position = stream.position
    assert entries.pending() == ids[2:4]
    entries.client.xreadgroup("g", "somebody", {entries.key: ">"}, count=1)
    again = entries.open(position)
    assert entries.pending() == []  # what the position covers, and what is sent again
    assert taken(again, 3) == [4, 5, 6]
    again.keep()
    # An older checkpoint: what was acknowledged after it is read again too.
    assert taken(entries.open(position), 4) == [4, 5, 6, 7]
    older = {"id": ids[0], "entries": 1, "lost": 0}
    assert taken(entries.open(older), 7) == [*range(1, 8)]


def test_without_a_position_reading_goes_on_where_the_group_stands(entries: Entries) -> None:
    ids = entries.put(*range(6))
    stream = entries.open()
    taken(stream, 3)
    assert taken(entries.open(), 2) == [0, 1]  # nothing was acknowledged
    stream = entries.open()
    taken(stream, 3)
    stream.keep()
    assert taken(entries.open(), 3) == [3, 4, 5]
    entries.client.xgroup_destroy(entries.key, "g")
    stream = entries.open(start_after=ids[3])
    assert taken(stream, 2) == [4, 5]
    assert stream.position["entries"] == 6


@pytest.mark.parametrize("is_running", [True, False])
def test_trimmed_entries_are_counted(entries: Entries, is_running: bool) -> None:
    """2,500 entries, of which 10 were taken and the last 100 are left."""
    with entries.client.pipeline() as pipe:
        for user in range(2000):
            pipe.xadd(
                entries.key,
                {"user": user, "seen": "", "price": "0", "click": 0},
                id=f"5-{user + 1}",
            )
        pipe.execute()
    stream = entries.open()
    assert taken(stream, 10) == [*range(10)]
    stream.keep()
    position = stream.position
    entries.client.xtrim(entries.key, maxlen=100, approximate=False)
    fault = (
        r"1,890 entries after 5-10 and before 5-1901 were removed before they were read\. Let the "
        r"stream keep more \(XTRIM, MAXLEN\), or go on without them by --allow_gaps"
    )
    for _ in range(2):  # it stays an error
        with pytest.raises(DataError, match=fault):
            taken(stream if is_running else entries.open(position), 10)
    stream = entries.open(position, allow_gaps=True)
    assert taken(stream, 50) == [*range(1900, 1950)]
    assert stream.position == {"id": "5-1950", "entries": 1950, "lost": 1890}
    assert stream.behind() == 50
    # The same gap is not counted twice, nor that of entries which were read.
    entries.client.xtrim(entries.key, maxlen=50, approximate=False)
    stream = entries.open(stream.position)
    assert taken(stream, 50) == [*range(1950, 2000)]
    entries.client.xtrim(entries.key, maxlen=0, approximate=False)
    assert taken(stream, 1) is None
    assert stream.position == {"id": "5-2000", "entries": 2000, "lost": 1890}
    assert taken(entries.open(stream.position), 1) is None


def test_a_stream_that_was_trimmed_to_nothing(entries: Entries) -> None:
    entries.put(*range(9))
    stream = entries.open()
    taken(stream, 2)
    entries.client.xtrim(entries.key, maxlen=0, approximate=False)
    with pytest.raises(DataError, match=r": 7 entries after \d+-\d+ were removed before they"):
        taken(stream, 2)
    stream = entries.open(stream.position, allow_gaps=True)
    assert taken(stream, 1) is None
    assert stream.behind() == 0
    entries.put(9)
    assert taken(stream, 1) == [9]
    assert stream.position["lost"] == 7


def test_what_was_trimmed_before_the_start_is_no_gap(entries: Entries) -> None:
    ids = entries.put(*range(9))
    entries.client.xtrim(entries.key, maxlen=4, approximate=False)
    stream = entries.open()
    assert taken(stream, 2) == [5, 6]
    assert stream.position == {"id": ids[6], "entries": 7, "lost": 0}


def test_read_entries_may_be_trimmed_and_bad_ones_deleted(
    entries: Entries, caplog: pytest.LogCaptureFixture
) -> None:
    ids = entries.put(*range(4))
    stream = entries.open()
    taken(stream, 3)
    stream.keep()
    entries.client.xtrim(entries.key, minid=ids[3], approximate=False)
    (bad,) = entries.put("x")
    entries.put(5)
    with pytest.raises(DataError, match=rf", entry {bad}, column `user`: should be int64"):
        taken(stream, 3)
    entries.client.xdel(entries.key, bad)
    with pytest.raises(DataError, match=r": 1 entries after .* were removed before they were"):
        taken(entries.open(stream.position), 2)  # nothing that was read is left to tell it by
    stream = entries.open(stream.position, allow_gaps=True)
    assert taken(stream, 2) == [3, 5]
    assert stream.position["lost"] == 1
    # With a read entry left in the stream, one that was deleted is no gap, and is said.
    bad = entries.put("y")[0]
    entries.put(7)
    entries.client.xdel(entries.key, bad)
    assert taken(stream, 1) == [7]
    assert taken(stream, 1) is None
    assert "1 entries were deleted before they were read" in caplog.text
    assert stream.behind() == 0


def test_entries_that_were_sent_and_did_not_arrive_are_read_again(
    entries: Entries, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = entries.put(*range(8))
    stream = entries.open()
    assert taken(stream, 1) == [0]
    entries.client.xreadgroup("g", redis_stream.CONSUMER, {entries.key: ">"}, count=3)
    stream._again = True  # as after a connection that was lost
    entries.client.xdel(entries.key, ids[2])
    assert taken(stream, 4) == [1, 3, 4, 5]
    assert stream.position == {"id": ids[5], "entries": 6, "lost": 0}
    entries.client.xreadgroup("g", redis_stream.CONSUMER, {entries.key: ">"}, count=1)
    stream._again = True
    entries.client.xtrim(entries.key, maxlen=1, approximate=False)
    with pytest.raises(DataError, match=": 1 entries after"):
        taken(stream, 2)


def test_a_stream_that_is_not_the_positions(entries: Entries) -> None:
    entries.put(*range(5))
    stream = entries.open()
    taken(stream, 5)
    entries.client.delete(entries.key)
    with pytest.raises(DataError, match="NOGROUP"):
        taken(stream, 1)
    entries.put(0)
    with pytest.raises(DataError, match=r": 5 entries of it were read, and it has had 1\. Redis"):
        entries.open(stream.position)
    with pytest.raises(DataError, match="Check the address"):
        RedisStream(SCHEMA, "redis://127.0.0.1:1/0", "s", "g")
    with pytest.raises(DataError, match=r"of another stream: {'file': 'a'}"):
        entries.open({"file": "a"})


def test_an_older_redis_is_refused(entries: Entries, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is at hand: the answer of one is made from a newer one's."""
    redis = pytest.importorskip("redis")
    answer = redis.Redis.xinfo_stream

    def older(*arguments: Any, **named: Any) -> Any:
        info = answer(*arguments, **named)
        del info["entries-added"]
        return info

    monkeypatch.setattr(redis.Redis, "xinfo_stream", older)
    with pytest.raises(DataError, match=r"Redis should be of version 7\.0 or newer, which counts"):
        entries.open()


def test_missing_fields_are_nulls(entries: Entries) -> None:
    bad = entries.client.xadd(entries.key, {"user": 1}).decode()
    with pytest.raises(DataError, match=rf"entry {bad}, column `price`: is null or absent"):
        taken(entries.open(), 1)
