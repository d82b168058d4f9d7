"""The op on rows in a real Redis and a real cluster of three nodes."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import numpy as np
import pytest
import redis_servers
import tensorflow as tf
from redis_servers import Cluster, Server

from qianmo.export import embedding_shards as shards
from qianmo.export import redis_loader
from qianmo.export.embedding_changes import write_changes
from qianmo.ops.embedding_lookup import EmbeddingStore, Read

pytestmark = pytest.mark.skipif(redis_servers.MISSING, reason=redis_servers.REASON)
DTYPES = ("float32", "float16", "bfloat16", "int8")
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(1000, 7)).astype(np.float32)
IDS = np.unique(RNG.integers(-(2**63), 2**63 - 1, 1100, dtype=np.int64))[:1000]
IDS[:4] = [0, -1, -(2**63), 2**63 - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A dense and a hashed table of each dtype, with some rows changed and some added."""
    store = tmp_path_factory.mktemp("store")
    tables = []
    for dtype in DTYPES:
        dense = shards.Table(name=f"dense_{dtype}", dim=7, num_rows=1000, dtype=dtype)
        hashed = shards.Table(
            name=f"hash_{dtype}", dim=7, num_rows=900, dtype=dtype, hashed=True, default_id=-1
        )
        tables += [(dense, [ROWS]), (hashed, [(IDS[:900], ROWS[:900])])]
    shards.write(store, 1, tables, shard_rows=256)
    changed = [("dense_float32", [(np.array([5, 0]), ROWS[:2] + 1)])]
    changed += [("hash_int8", [(IDS[890:], ROWS[890:] - 1)])]
    write_changes(store, 2, 1, changed)
    shards.publish(store, 2)
    return store


def publish(redis: str, folder: pathlib.Path, version: int, space: int = 1) -> None:
    """A version whose one table has rows of its own number."""
    if not (folder / str(version)).exists():
        table = shards.Table(name="t", dim=2, num_rows=50)
        shards.write(folder, version, [(table, [np.full((50, 2), version)])], space=space)
    redis_loader.load(folder, version, redis)


def soon(condition: Callable[[], bool]) -> bool:
    for _ in range(200):
        with contextlib.suppress(tf.errors.OpError):
            if condition():
                return True
        time.sleep(0.05)
    return False


def first(store: EmbeddingStore, count: int = 50) -> list[float]:
    return store.lookup([Read("t", 2, tf.range(count))])[0][:, 0].numpy().tolist()


@pytest.mark.parametrize("kind", ["server", "cluster"])
def test_reads_what_the_files_hold(
    kind: str, folder: pathlib.Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(kind).url("equal")
    redis_loader.load(folder, 2, url)
    files, redis = EmbeddingStore(str(folder)), EmbeddingStore(url)
    for _ in range(3):
        ids = RNG.integers(-5, 1005, (40, 30))
        places = np.where((ids >= 0) & (ids < 1000), ids, 0)
        known = np.where((ids >= 0) & (ids < 1000), IDS[places], ids)
        lengths = RNG.integers(-1, 32, 40)
        reads = []
        for dtype in DTYPES:
            for table, some in ((f"dense_{dtype}", ids), (f"hash_{dtype}", known)):
                reads.append(Read(table, 7, tf.constant(some)))
                reads.append(Read(table, 7, tf.constant(some[3, :2])))
                for how in ("mean", "max"):
                    reads.append(Read(table, 7, tf.constant(some), tf.constant(lengths), how))
        for missing in ("default", "zero"):
            expected = files.lookup(reads, missing=missing)
            for one, found in zip(expected, redis.lookup(reads, missing=missing), strict=True):
                np.testing.assert_array_equal(found, one)
    nothing = redis.lookup([Read("dense_int8", 7, tf.zeros([0, 3], tf.int64))])
    assert nothing[0].shape == (0, 3, 7)
    for read, named in ((reads[0], "no row of id"), (reads[4], "no row of id")):
        with pytest.raises(tf.errors.NotFoundError, match=named):
            redis.lookup([read], missing="error")
    with pytest.raises(tf.errors.FailedPreconditionError, match="should have a table `none`"):
        redis.lookup([Read("none", 7, tf.constant([1]))])
    assert redis.rows_lost() == 0


def test_follows_the_published_version(server: Server, tmp_path: pathlib.Path) -> None:
    url = server.url("follow")
    for version, space in ((1, 1), (2, 2), (3, 2), (5, 5)):
        publish(url, tmp_path, version, space)
    publish(url, tmp_path, 2, 2)
    newest = EmbeddingStore(url)
    falls_back = EmbeddingStore(url, space=2)
    refuses = EmbeddingStore(url, space=2, on_mismatch="refuse")
    for each in (newest, falls_back, refuses):
        assert first(each) == [2] * 50
    publish(url, tmp_path, 5, 5)
    assert soon(lambda: first(newest) == [5] * 50)
    assert soon(lambda: first(falls_back) == [3] * 50)
    with pytest.raises(tf.errors.FailedPreconditionError, match="and CURRENT names 5 of space 5"):
        first(refuses)
    publish(url, tmp_path, 3, 2)
    assert soon(lambda: first(refuses) == [3] * 50)
    with pytest.raises(tf.errors.FailedPreconditionError, match="no version there is of that"):
        EmbeddingStore(url, space=4)
    # The path of a store may name a file that names the URL.
    (tmp_path / "where").write_text(f"{url}\n")
    # It is the store that `newest` reads, which may not have seen the new version yet.
    named = EmbeddingStore(str(tmp_path / "where"))
    assert soon(lambda: first(named) == [3] * 50)


def test_rows_that_vanish_are_no_unknown_ids(server: Server, tmp_path: pathlib.Path) -> None:
    publish(server.url("gone"), tmp_path, 1)
    fails = EmbeddingStore(server.url("gone"))
    default = EmbeddingStore(server.url("gone", "?on_failure=default"))
    client = server.client()
    client.delete("gone:1:t:7", "gone:1:t:8")
    client.set("gone:1:t:0", np.full(2, 9, np.float32).tobytes())
    with pytest.raises(tf.errors.AbortedError, match="rows of table `t` of version 1 are gone"):
        first(fails)
    assert first(default)[6:10] == [1, 1, 1, 1]  # the default row, as it was when it was opened
    assert fails.rows_lost() == default.rows_lost() == 2
    client.set("gone:1:t:9", b"short")
    with pytest.raises(tf.errors.AbortedError, match="gone:1:t:9 has 5 bytes, and a row has 8"):
        first(default)
    publish(server.url("gone"), tmp_path, 1)  # counts the rows, and writes them again
    client.set("gone:1:t:9", np.full(2, 1, np.float32).tobytes())
    assert first(fails) == [1] * 50


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://127.0.0.1:1/p", "127.0.0.1:1: Connection refused"),
        ("redis+cluster://127.0.0.1:1/p", "127.0.0.1:1: Connection refused"),
        ("redis://127.0.0.1/p", "each address should be HOST:PORT"),
        ("redis://me:pw12@127.0.0.1:1/p", "should hold no password"),
        ("redis://127.0.0.1:1/p?timeout_ms=x", "its options should be"),
    ],
)
def test_stores_that_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(tf.errors.FailedPreconditionError, match=message) as caught:
        EmbeddingStore(url)
    assert "pw12" not in str(caught.value)


def test_a_redis_without_versions(server: Server) -> None:
    refused = pytest.raises(tf.errors.FailedPreconditionError, match="no key none:CURRENT")
    with refused:
        EmbeddingStore(server.url("none"))
    with pytest.raises(tf.errors.FailedPreconditionError, match="`verify` is for files"):
        EmbeddingStore(server.url("none"), verify=True)


def test_password(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with redis_servers.server(tmp_path, password="right") as locked:
        with pytest.raises(tf.errors.FailedPreconditionError, match="NOAUTH"):
            EmbeddingStore(locked.url())
        monkeypatch.setenv("QIANMO_REDIS_PASSWORD", "wrong")
        with pytest.raises(tf.errors.FailedPreconditionError, match="it refuses the password"):
            EmbeddingStore(locked.url(options="?timeout_ms=400"))
        monkeypatch.setenv("QIANMO_REDIS_PASSWORD", "right")
        url = locked.url(options="?timeout_ms=401")  # clients are shared by their URL
        publish(url, tmp_path / "s", 1)
        assert first(EmbeddingStore(url)) == [1] * 50


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here to make certificates")
def test_tls(tmp_path: pathlib.Path) -> None:
    names = "subjectAltName=IP:127.0.0.1"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    make += ["-subj", "/CN=test", "-addext", names, "-keyout", "key.pem", "-out", "ca.pem"]
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    port = redis_servers.free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", str(tmp_path / "ca.pem")]
    options += ["--tls-key-file", str(tmp_path / "key.pem"), "--tls-auth-clients", "no"]
    with redis_servers.server(tmp_path, "--save", "", *options):
        url = f"rediss://127.0.0.1:{port}/tls?ca={tmp_path}/ca.pem"
        publish(url, tmp_path / "s", 1)
        store = EmbeddingStore(url)
        assert first(store) == [1] * 50
        large = tf.constant(np.tile(np.arange(50), 400))
        assert store.lookup([Read("t", 2, large)])[0].shape == (20000, 2)
        with pytest.raises(tf.errors.FailedPreconditionError, match="self-signed certificate"):
            EmbeddingStore(f"rediss://127.0.0.1:{port}/tls")
        with pytest.raises(tf.errors.FailedPreconditionError, match="ostname mismatch"):
            EmbeddingStore(f"rediss://localhost:{port}/tls?ca={tmp_path}/ca.pem")


def test_a_server_that_hangs_or_dies(tmp_path: pathlib.Path) -> None:
    with redis_servers.server(tmp_path, "--appendonly", "yes") as mine:
        publish(mine.url(), tmp_path / "s", 1)
        fails = EmbeddingStore(mine.url(options="?timeout_ms=200"))
        default = EmbeddingStore(mine.url(options="?timeout_ms=200&on_failure=default"))
        assert first(fails) == first(default) == [1] * 50
        mine.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(tf.errors.AbortedError, match="it gave no answer in time"):
            first(fails)
        with pytest.raises(tf.errors.AbortedError):  # at once, as it is known to be down
            first(fails)
        assert 0.2 <= time.monotonic() - start < 2
        mine.process.send_signal(signal.SIGCONT)
        assert soon(lambda: first(fails) == [1] * 50)
        # Connections that the server has closed are no failure.
        mine.client().client_kill_filter(skipme=True)
        assert first(fails) == [1] * 50
        mine.kill()
        assert first(default) == [1] * 50
        assert default.rows_lost() >= 50
        with pytest.raises(tf.errors.AbortedError, match=r"Connection refused|closed"):
            first(fails)
        mine.start()
        assert soon(lambda: first(fails) == [1] * 50)
        lost = default.rows_lost()
        assert soon(lambda: first(default) == [1] * 50 and default.rows_lost() == lost)


def test_slots_that_move_between_nodes(cluster: Cluster, tmp_path: pathlib.Path) -> None:
    publish(cluster.url("move"), tmp_path, 1)
    store = EmbeddingStore(cluster.url("move"))
    assert first(store) == [1] * 50
    clients = [node.client(decode_responses=True) for node in cluster.servers]
    ids = [client.execute_command("CLUSTER MYID") for client in clients]
    slots = [clients[0].execute_command("CLUSTER KEYSLOT", f"move:1:t:{i}") for i in range(50)]
    owner = [min(slot // 5462, 2) for slot in slots]
    moved = owner.index(0)
    slot = slots[moved]
    clients[1].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
    clients[0].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
    assert first(store) == [1] * 50
    port = cluster.servers[1].port
    for key in clients[0].execute_command("CLUSTER GETKEYSINSLOT", slot, 1000):
        clients[0].execute_command("MIGRATE", "127.0.0.1", port, key, 0, 1000)
    assert first(store) == [1] * 50  # ASK
    for client in clients:
        client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])
    for _ in range(5):
        assert first(store) == [1] * 50  # MOVED, until the new map is there
        time.sleep(0.1)
    assert store.rows_lost() == 0


def test_one_node_of_a_cluster_dies(cluster: Cluster, tmp_path: pathlib.Path) -> None:
    publish(cluster.url("die"), tmp_path, 1)
    fails = EmbeddingStore(cluster.url("die"))
    default = EmbeddingStore(cluster.url("die", "?on_failure=default"))
    assert first(fails) == [1] * 50
    dead = cluster.servers[2]
    dead.kill()
    assert first(default) == [1] * 50
    lost = default.rows_lost()
    assert 0 < lost < 50  # those of one node alone
    with pytest.raises(tf.errors.AbortedError, match=f"127.0.0.1:{dead.port}"):
        first(fails)
    dead.start()
    assert soon(lambda: first(fails) == [1] * 50)
    lost = default.rows_lost()
    assert soon(lambda: first(default) == [1] * 50 and default.rows_lost() == lost)
