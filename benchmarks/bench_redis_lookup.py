"""Rows from a Redis on loopback: the op against redis-py, and a node that is killed under load.

A request is of 200 rows of 20 ids, drawn from a million rows of 16 floats. redis-py gets the same
keys by one MGET, and makes them an array; in the cluster by `mget_nonatomic`. The ways take turns.
Then one of the cluster's three nodes is killed while four threads ask, and started again.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np

sys.path.append(str(common.ROOT / "tests"))
import redis_servers

DIM = 16
SHAPE = (200, 20)
THREADS = 4
SECONDS = 4.0  # before the kill, while the node is down, and after it is back


def write(folder: pathlib.Path, count: int) -> np.ndarray:
    """A version of one table."""
    from qianmo.export import embedding_shards as shards

    rows = np.random.default_rng(0).standard_normal((count, DIM), dtype=np.float32)
    shards.write(folder, 1, [(shards.Table(name="item", dim=DIM, num_rows=count), [rows])])
    return rows


def loaded(folder: pathlib.Path, url: str) -> float:
    """Rows/s of loading it, with all that goes with it."""
    from qianmo.export import redis_loader

    start = time.perf_counter()
    return redis_loader.load(folder, 1, url) / (time.perf_counter() - start)


def looked_up(url: str) -> Callable[[Any], Any]:
    """The op as a graph calls it, and its store."""
    import tensorflow as tf

    from qianmo.ops.embedding_lookup import EmbeddingStore, Read

    store = EmbeddingStore(url)
    spec = [tf.TensorSpec(SHAPE, tf.int64)]
    found = tf.function(lambda ids: store.lookup([Read("item", DIM, ids)])[0], input_signature=spec)
    found.store = store
    return found


def requests(count: int) -> list[np.ndarray]:
    """Ids of fifty requests."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, count, SHAPE) for _ in range(50)]


def compared(
    url: str,
    mget: Callable[[list[str]], list[bytes]],
    rows: np.ndarray,
    turns: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Both ways, in ms."""
    import tensorflow as tf

    drawn = requests(len(rows))
    op = looked_up(url)
    tensors = itertools.cycle([tf.constant(ids) for ids in drawn])
    names = itertools.cycle([[f"bench:1:item:{i}" for i in ids.ravel().tolist()] for ids in drawn])

    def ask(keys: list[str]) -> np.ndarray:
        return np.frombuffer(b"".join(mget(keys)), np.float32).reshape(*SHAPE, DIM)

    for ids in drawn[:5]:
        np.testing.assert_array_equal(op(tf.constant(ids)), rows[ids])
        np.testing.assert_array_equal(ask([f"bench:1:item:{i}" for i in ids.ravel()]), rows[ids])
    ways = {"op": lambda: op(next(tensors)), "redis-py": lambda: ask(next(names))}
    found: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, call in ways.items():
            end, took = time.perf_counter() + seconds, []
            while (start := time.perf_counter()) < end:
                call()
                took.append(time.perf_counter() - start)
            found[way].append(1e3 * np.array(took))
    # Medians over turns: what else the machine does for a moment stays in one of them.
    return [
        {
            "way": way,
            "p50 ms": float(np.median([np.median(took) for took in each])),
            "p99 ms": float(np.median([np.percentile(took, 99) for took in each])),
            "requests": sum(map(len, each)),
        }
        for way, each in found.items()
    ]


def under_fault(cluster: Any, count: int) -> list[dict[str, Any]]:
    """What requests get by each policy while one node of three is killed and started again."""
    import tensorflow as tf

    ids = itertools.cycle([tf.constant(ids) for ids in requests(count)])
    policies = {
        policy: looked_up(cluster.url("bench", f"?on_failure={policy}"))
        for policy in ("error", "default")
    }
    answers: dict[str, list[tuple[float, float, bool]]] = {policy: [] for policy in policies}
    stop = threading.Event()

    def ask(policy: str) -> None:
        while not stop.is_set():
            begin, failed = time.perf_counter(), False
            try:
                policies[policy](next(ids))
            except tf.errors.AbortedError:
                failed = True
                time.sleep(0.005)  # as a server that has other requests, not a busy loop
            answers[policy].append((begin, time.perf_counter() - begin, failed))

    threads = [threading.Thread(target=ask, args=(p,)) for p in policies for _ in range(2)]
    for thread in threads:
        thread.start()
    node = cluster.servers[2]
    time.sleep(SECONDS)
    killed = time.perf_counter()
    node.kill()
    time.sleep(SECONDS)
    node.start()
    back = time.perf_counter()
    time.sleep(SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    found = []
    for policy, asked in answers.items():
        failures = [begin for begin, _, failed in asked if failed]
        healthy = [failed for begin, took, failed in asked if begin + took < killed]
        down = [1e3 * took for begin, took, _ in asked if killed <= begin < back]
        found.append(
            {
                "Redis": "three nodes, one killed",
                "way": f"op, on_failure={policy}",
                "p50 ms": float(np.median(down)),
                "p99 ms": float(np.percentile(down, 99)),
                "requests": len(down),
                "failed": sum(killed <= begin < back for begin in failures),
                "rows by default": 0 if failures else policies[policy].store.rows_lost(),
                "longest ms": max(down),
                "failed before": sum(healthy),
                "s from its start to the last failure": max([t - back for t in failures] + [0.0]),
            }
        )
    return found


def run(*, quick: bool) -> dict[str, Any]:
    """All three."""
    if redis_servers.MISSING:
        raise SystemExit(redis_servers.REASON)
    import redis

    count = 100_000 if quick else 1_000_000
    turns = (3, 0.3) if quick else (15, 3.0)  # and the seconds of one
    results: list[dict[str, Any]] = []
    loads = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        rows = write(folder / "store", count)
        (folder / "single").mkdir()
        (folder / "cluster").mkdir()
        with redis_servers.server(folder / "single") as server:
            loads["single"] = loaded(folder / "store", server.url("bench"))
            memory = server.client().info("memory")["used_memory"] / count
            ways = compared(server.url("bench"), server.client().mget, rows, *turns)
            results += [{"Redis": "one node", **way} for way in ways]
        with redis_servers.cluster(folder / "cluster") as cluster:
            loads["cluster"] = loaded(folder / "store", cluster.url("bench"))
            peer = redis.cluster.RedisCluster("127.0.0.1", cluster.servers[0].port)
            ways = compared(cluster.url("bench"), peer.mget_nonatomic, rows, *turns)
            results += [{"Redis": "three nodes", **way} for way in ways]
            for row in results:
                print(row, flush=True)
            faults = under_fault(cluster, count)

    def faster(percentile: str, kind: str) -> float:
        op, peer = (r[percentile] for r in results if r["Redis"] == kind)
        return float(peer / op)

    error, default = faults
    return {
        "table": {
            "rows": count,
            "dim": DIM,
            "bytes of Redis a row": memory,
            "loaded rows/s": loads,
        },
        "rows": [*results, *faults],
        "targets": {
            "p50 of redis-py / op": common.target(faster("p50 ms", "one node"), 3.0),
            "p99 of redis-py / op": common.target(faster("p99 ms", "one node"), 3.0),
            "failed requests, policy default": common.target(default["failed"], 0, at_most=True),
            "ms of the longest request while a node is down": common.target(
                max(error["longest ms"], default["longest ms"]), 500.0, at_most=True
            ),
            "s from a node's start to the last failed request": common.target(
                error["s from its start to the last failure"], 3.0, at_most=True
            ),
        },
    }
