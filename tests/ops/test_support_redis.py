"""The support store in a real Redis, and in a real cluster of three nodes, beside a local one."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import redis_servers
import tensorflow as tf
from redis_servers import Cluster, Server
from support_rows import DIM, LABELS, MAX_ROWS, get, get_events, put, stats

from qianmo.ops import support_store
from qianmo.ops.support_store import (
    BAD_TIME,
    BAD_VECTOR,
    STORED,
    TOO_OLD,
    UNREACHABLE,
    SupportStore,
)

pytestmark = pytest.mark.skipif(redis_servers.MISSING, reason=redis_servers.REASON)
Open = Callable[..., SupportStore]
TASKS = list(range(60))


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens stores of the test's own names, and closes those that it left open."""
    stores: list[SupportStore] = []

    def make(
        path: str = "", *, dim: int = DIM, max_rows: int = MAX_ROWS, **of: Any
    ) -> SupportStore:
        name = f"{request.node.name}{len(stores)}"
        stores.append(SupportStore(name, dim, LABELS, max_rows, path=path, **of))
        return stores[-1]

    yield make
    for store in stores:
        with contextlib.suppress(tf.errors.NotFoundError):
            store.close()


def soon(condition: Callable[[], bool]) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["server", "cluster"])
def test_a_random_walk_beside_a_local_store(
    kind: str, opened: Open, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(kind).url("walk")
    local, redis = opened(), [opened(url), opened(url)]
    random = np.random.default_rng(3)
    counts = []
    for step in range(120):
        version = int(random.integers(1, 3))
        events = [
            (int(task), int(when), int(random.integers(0, 8)), int(random.integers(-1, 2)))
            for task, when in random.integers([-8, 0], [8, 15], [random.integers(1, 9), 2])
        ]
        expected = put(local, events, version)
        assert put(redis[step % 2], events, version) == expected
        counts += expected
        task, version = (int(x) for x in random.integers([-8, 1], [8, 3]))
        assert get_events(redis[1], task, version) == get_events(local, task, version)
    assert {STORED, BAD_TIME, TOO_OLD} == set(counts)
    for name in ("hits", "misses", "refused"):
        assert stats(redis[1])[name] == stats(local)[name] > 0
    tasks = np.arange(-8, 8)
    for one, other in zip(local.get(tasks, 1, 2), redis[0].get(tasks, 1, 2), strict=True):
        np.testing.assert_array_equal(one, other)


def test_any_task_id_and_time_will_do(server: Server, opened: Open) -> None:
    store = opened(server.url("any"))
    ids = [0, -1, 2**63 - 1, -(2**63), 5, 5, 5]
    when = [9, 9, 9, 9, 2**60 + 2, 2**60, 2**60 + 1]  # as floats, the last three are equal
    event = [0, 0, 0, 0, 2**62 + 1, -(2**63), -1]
    h = np.arange(7, dtype="f4")[:, None] * np.ones([7, DIM], "f4")
    ones = np.ones([7, LABELS], "f4")
    assert not store.put(ids, h, ones, ones, when, event, [1] * 7).numpy().any()
    found = store.get(ids[:5], 1)
    np.testing.assert_array_equal(found.h[:4, 0], h[:4])
    assert found.time[4].numpy().tolist() == [2**60, 2**60 + 1, 2**60 + 2, 0]
    assert found.h[4, :3, 0].numpy().tolist() == [5, 6, 4]
    assert found.event_id[4].numpy().tolist() == [-(2**63), -1, 2**62 + 1, 0]
    same = [2**60] * 3
    events = [2**62 + 1, 2**62, -(2**62)]
    assert not store.put([9] * 3, h[:3], ones[:3], ones[:3], same, events, [1] * 3).numpy().any()
    found = store.get([9], 1)
    assert found.event_id.numpy().tolist() == [[-(2**62), 2**62, 2**62 + 1, 0]]
    assert found.h[0, :3, 0].numpy().tolist() == [2, 1, 0]
    none, labels = tf.zeros([0], tf.int64), tf.zeros([0, LABELS])
    assert store.put(none, tf.zeros([0, DIM]), labels, labels, none, none, none).shape == [0]
    assert store.get(none, 1).h.shape == [0, MAX_ROWS, DIM]


WRITER = """
import sys
import numpy as np
from support_rows import put
from qianmo.ops.support_store import SupportStore
store = SupportStore("s", 3, 2, 200, path=sys.argv[1])
for when in range(2, 121, 2):
    assert put(store, [(task, when) for task in range(5)]) == [0] * 5
    print(when, flush=True)
"""


def test_writers_of_two_processes_lose_nothing(server: Server, opened: Open) -> None:
    url = server.url("writers")
    store = opened(url, max_rows=200)
    tests = pathlib.Path(redis_servers.__file__).parent
    program = f"import sys; sys.path.insert(0, {str(tests)!r})\n{WRITER}"
    command = [sys.executable, "-c", program, url]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "2\n"  # which this process sees
    assert store.get([0], 1).time.numpy().any()

    def write(first: int) -> None:
        for when in range(first, 121, 4):
            put(store, [(task, when) for task in range(5)])

    threads = [threading.Thread(target=write, args=(first,)) for first in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.communicate()[0].endswith("120\n")
    found = store.get(range(5), 1)
    assert found.count.numpy().tolist() == [120] * 5
    assert found.time[:, :120].numpy().tolist() == [list(range(1, 121))] * 5
    before = server.client().get("writers:v2:3x2:0")
    put(store, [(0, when) for when in (7, 120, 7)])  # as a client that tries again
    assert len(server.client().get("writers:v2:3x2:0")) == len(before)


def test_rows_outlive_their_time_by_nothing(server: Server, opened: Open) -> None:
    store = opened(server.url("ttl"), ttl_seconds=1.0)
    client = server.client()
    put(store, [(1, 5), (2, 5)])
    assert 0 < client.pttl("ttl:v2:3x2:1") <= 1000
    time.sleep(0.6)
    put(store, [(1, 6)])
    time.sleep(0.6)
    assert get(store, 1) == {6: 0}
    assert get(store, 2) == {}
    two_rows = client.strlen("ttl:v2:3x2:1")
    put(store, [(1, 7)])  # lets go of what is past its time
    assert client.strlen("ttl:v2:3x2:1") == two_rows
    evicted = stats(store)["evicted"]
    assert soon(lambda: client.exists("ttl:v2:3x2:1", "ttl:v2:3x2:2") == 0)
    assert stats(store)["evicted"] == evicted + 1
    lasting = opened(server.url("ttl"), ttl_seconds=60.0)
    put(lasting, [(3, when) for when in range(5, 5 + MAX_ROWS)])
    time.sleep(0.1)
    left = client.pttl("ttl:v2:3x2:3")
    assert put(lasting, [(3, 4)]) == [TOO_OLD]
    assert client.pttl("ttl:v2:3x2:3") <= left
    for_ever = opened(server.url("ttl"))
    put(for_ever, [(1, 5)])
    assert client.pttl("ttl:v2:3x2:1") == -1


def test_a_writer_s_clock_that_is_wrong_keeps_no_row_for_longer(server: Server) -> None:
    """The store's own script, given the clocks of writers; Redis tells the time itself."""
    source = pathlib.Path(support_store.__file__).with_name("cc") / "redis_support.cc"
    script = source.read_text().split('R"lua(')[1].split(')lua"')[0]
    client, size, hour, ttl = server.client(), 48, 3_600_000_000, 60_000_000

    def now() -> int:
        seconds, micros = client.time()
        return seconds * 1_000_000 + micros

    def put(when: int, clock: int, written: int | None = None) -> bytes:
        row = struct.pack("<qqqq", when, 0, 1, clock if written is None else written)
        return client.eval(script, 1, "clock", size, 4, ttl, clock, row.ljust(size, b"\0"))

    def rows() -> dict[int, int]:
        value = client.get("clock") or b""
        heads = (struct.unpack("<qqqq", value[at : at + 32]) for at in range(0, len(value), size))
        return {head[0]: head[3] for head in heads}

    begin = now()
    for number, ahead in enumerate((hour, 0, -hour, 1000 * hour), start=1):
        clock = now() + ahead
        assert put(number, clock) == b"\0"
        if ahead < 0:  # the writer's own rows are past their time sooner, which harms nobody
            assert rows()[number] == clock
        else:
            assert begin <= rows()[number] <= now()
        assert 0 < client.pttl("clock") <= ttl // 1000
    assert set(rows()) == {1, 2, 4}  # the third was past its time when the fourth came
    put(5, now() + hour, written=begin - ttl // 2)  # as imported
    assert rows()[5] == begin - ttl // 2
    assert put(6, now() - ttl - hour, written=0) == b"\0"
    client.delete("clock")


def test_a_redis_that_is_full(tmp_path: pathlib.Path, opened: Open) -> None:
    with redis_servers.server(tmp_path) as mine:
        store = opened(mine.url(), ttl_seconds=3600.0)
        client = mine.client()
        put(store, [(-1, 1)])
        client.config_set("maxmemory", client.info()["used_memory"] - 1000)
        assert put(store, [(-2, 1), (-2, 0)]) == [UNREACHABLE, BAD_TIME]
        assert get(store, -1) == {1: 0}
        limit = client.info()["used_memory"] + 300_000
        client.config_set("maxmemory", limit)
        client.config_set("maxmemory-policy", "volatile-ttl")
        for first in range(0, 4000, 500):
            assert not any(put(store, [(task, 1) for task in range(first, first + 500)]))
        found = stats(store)
        assert found["tasks"] + found["evicted"] == 4001
        assert found["evicted"] > 1000
        assert found["bytes"] <= limit
        kept = store.get(range(4000), 1).count.numpy()
        assert kept[-500:].mean() > 0.9 > 0.1 > kept[:500].mean()


def test_rows_go_between_files_and_redis(
    server: Server, cluster: Cluster, opened: Open, tmp_path: pathlib.Path
) -> None:
    one, two, many = opened(), opened(server.url("files")), opened(cluster.url("files"))
    put(one, [(task, when) for task in TASKS for when in (3, 5)])
    put(two, [(1, 4), (2, 3, 7)])
    one.export_rows(tmp_path / "one")
    two.import_rows(tmp_path / "one")
    two.export_rows(tmp_path / "two")
    many.import_rows(tmp_path / "two")
    many.export_rows(tmp_path / "many")
    last = opened()
    last.import_rows(tmp_path / "many")
    assert stats(last)["rows"] == 2 * len(TASKS) + 1
    for store in (two, many, last):
        assert get(store, 1) == {3: 0, 4: 0, 5: 0}
        assert get(store, 2) == {3: 0, 5: 0}
    assert stats(many)["tasks"] >= len(TASKS)
    wide = opened(server.url("files"), dim=4)  # rows of other sizes are not there
    assert not wide.get(TASKS, 1).count.numpy().any()
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"dim 3 with 2 .* for: 4 with 2"):
        wide.import_rows(tmp_path / "one")
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"Cannot write .*nowhere"):
        two.export_rows(tmp_path / "nowhere" / "rows")


def test_rows_whose_time_ends_during_the_import(
    server: Server, opened: Open, tmp_path: pathlib.Path
) -> None:
    local = opened()
    store = opened(server.url("late", "?timeout_ms=10000"), ttl_seconds=1.0)
    tasks = range(300)  # more than one write
    put(local, [(task, 5) for task in tasks])
    local.export_rows(tmp_path / "rows")
    server.client().client_pause(1100)  # which the first write waits for
    store.import_rows(tmp_path / "rows")
    assert stats(store)["write_errors"] == 0
    assert not store.get(tasks, 1).count.numpy().any()
    assert soon(lambda: not server.client().keys("late:*"))


def test_a_value_that_holds_no_rows(server: Server, opened: Open, tmp_path: pathlib.Path) -> None:
    store = opened(server.url("bad"))
    put(store, [(1, 5)])
    server.client().set("bad:v2:3x2:2", b"short")
    server.client().lpush("bad:v2:3x2:3", b"a list")  # no string, hence no value to read
    assert store.get([1, 2, 3, 4], 1).count.numpy().tolist() == [1, 0, 0, 0]
    assert (stats(store)["read_errors"], stats(store)["misses"]) == (1, 2)
    assert put(store, [(3, 1), (2, 1), (4, 1), (2, 0)]) == [
        UNREACHABLE, UNREACHABLE, STORED, BAD_TIME,
    ]  # fmt: skip
    assert stats(store)["write_errors"] == 2
    server.client().delete("bad:v2:3x2:3")
    with pytest.raises(tf.errors.FailedPreconditionError, match="key bad:v2:3x2:2: it is none"):
        store.export_rows(tmp_path / "rows")
    assert not list(tmp_path.iterdir())


def test_refusals(server: Server, opened: Open) -> None:
    refused = tf.errors.FailedPreconditionError
    with pytest.raises(refused, match="`max_tasks` and `max_bytes` are not for a Redis"):
        opened(server.url("no"), max_tasks=5)
    with pytest.raises(refused, match="`on_failure` is for embeddings"):
        opened(server.url("no", "?on_failure=default"))
    for kind in ("redis", "redis+cluster"):
        with pytest.raises(refused, match=r"127\.0\.0\.1:1: Connection refused"):
            opened(f"{kind}://127.0.0.1:1/p")


def test_a_redis_that_hangs_dies_and_comes_back(tmp_path: pathlib.Path, opened: Open) -> None:
    with redis_servers.server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as mine:
        store = opened(mine.url(options="?timeout_ms=200"))
        assert put(store, [(1, 5), (2, 5)]) == [STORED] * 2
        mine.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        assert get(store, 1) == {}
        assert 0.2 <= time.monotonic() - start < 2
        times = []
        for _ in range(5):
            start = time.monotonic()
            assert put(store, [(1, 6)]) == [UNREACHABLE]
            times.append(time.monotonic() - start)
        assert min(times) < 0.1  # at once, as it is known to be down
        mine.process.send_signal(signal.SIGCONT)
        assert soon(lambda: get(store, 1) == {5: 0})
        mine.client().client_kill_filter(skipme=True)  # connections that it closed are no failure
        assert put(store, [(1, 7)]) == [STORED]
        mine.kill()
        h = np.full([2, DIM], [[1], [np.nan]], "f4")
        ones = np.ones([2, LABELS], "f4")
        status = store.put([1, 2], h, ones, ones, [8, 8], [0, 0], [1, 1])
        assert status.numpy().tolist() == [UNREACHABLE, BAD_VECTOR]
        assert store.get([1, 2], 1).count.numpy().tolist() == [0, 0]
        found = stats(store)
        assert (found["tasks"], found["bytes"]) == (-1, -1)
        assert found["write_errors"] == 6
        assert found["read_errors"] > 2
        mine.start()
        assert soon(lambda: get(store, 1) == {5: 0, 7: 0})
        store.close()  # a server that starts anew finds all
        assert get(opened(mine.url()), 1) == {5: 0, 7: 0}


def test_slots_that_move_between_nodes(cluster: Cluster, opened: Open) -> None:
    store = opened(cluster.url("move"))
    clients = [node.client(decode_responses=True) for node in cluster.servers]
    ids = [client.execute_command("CLUSTER MYID") for client in clients]
    slots = [clients[0].execute_command("CLUSTER KEYSLOT", f"move:v2:3x2:{i}") for i in TASKS]
    slot = next(slot for slot in slots if slot < 5462)
    times = []

    def stored_and_found() -> bool:
        times.append(len(times) + 1)
        status = put(store, [(task, times[-1]) for task in TASKS])
        newest = store.get(TASKS, 1, 1).time[:, 0].numpy()
        return not any(status) and bool((newest == times[-1]).all())

    assert stored_and_found()
    clients[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    clients[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    port = cluster.servers[1].port
    assert stored_and_found()
    for key in clients[0].execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
        clients[0].execute_command("MIGRATE", "127.0.0.1", port, key, 0, 1000)
    assert stored_and_found()  # ASK
    for client in clients:
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])
    for _ in range(3):
        assert stored_and_found()  # MOVED, until the new map is there
        time.sleep(0.1)


def test_a_dead_node_costs_its_own_tasks_alone(cluster: Cluster, opened: Open) -> None:
    store = opened(cluster.url("die"))
    events = [(task, 5) for task in TASKS]
    assert not any(put(store, events))
    dead = cluster.servers[2]
    dead.kill()
    found = store.get(TASKS, 1).count.numpy()
    lost = int((found == 0).sum())
    assert 0 < lost < len(TASKS)
    assert stats(store)["read_errors"] == lost
    status = np.array(put(store, events))
    np.testing.assert_array_equal(status, np.where(found == 0, UNREACHABLE, STORED))
    assert stats(store)["write_errors"] == lost
    dead.start()
    assert soon(lambda: not any(put(store, events)))
    assert store.get(TASKS, 1).count.numpy().all()
