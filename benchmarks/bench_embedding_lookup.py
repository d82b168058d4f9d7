"""Lookups of the op on 10 million rows of 16 floats against tf.gather on the same table in memory.

Each number of threads has a process of its own, whose table is filled from the store. The ways take
turns; a rate is the median of the rounds, a ratio that of the rounds' ratios. Hot ids: nine of ten
are among 20,000 that lie apart.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import numpy as np

DIM = 16
CHUNK = 1 << 18
MIXER = np.uint64(0x9E3779B97F4A7C15)
HOT = 20_000


def key(rows: np.ndarray) -> np.ndarray:
    """The 64-bit id of a row in the hashed table."""
    return (rows.astype(np.uint64) * MIXER).view(np.int64)


def vectors(first: int, end: int) -> np.ndarray:
    """Rows that say their place."""
    return np.random.default_rng(first).standard_normal((end - first, DIM), dtype=np.float32)


def chunks(count: int) -> Iterator[tuple[int, int]]:
    """Borders of the chunks that are written at once."""
    for first in range(0, count, CHUNK):
        yield first, min(first + CHUNK, count)


def write(folder: pathlib.Path, count: int) -> dict[str, float]:
    """A store with the table twice; seconds that each took."""
    from qianmo.export import embedding_shards as shards

    took = {}
    dense = shards.Table(name="dense", dim=DIM, num_rows=count)
    hashed = shards.Table(name="hash", dim=DIM, num_rows=count, hashed=True)
    rows: dict[str, Any] = {
        "dense": (dense, (vectors(*c) for c in chunks(count))),
        "hash": (hashed, ((key(np.arange(*c)), vectors(*c)) for c in chunks(count))),
    }
    for name, table in rows.items():
        start = time.perf_counter()
        shards.write(folder / name, 1, [table])
        took[name] = time.perf_counter() - start
        shards.publish(folder / name, 1)
    return took


def write_sparse(folder: pathlib.Path, gigabytes: int) -> None:
    """A table whose rows were never written, so that it takes no room on the disk."""
    from qianmo.export import embedding_shards as shards

    count = gigabytes * 10**9 // (4 * DIM) // shards.SHARD_ROWS * shards.SHARD_ROWS
    table = shards.Table(name="large", dim=DIM, num_rows=count)
    with shards.writing(folder, 1, 1) as (temporary, lines):
        lines.append(shards.table_line(table, shards.SHARD_ROWS))
        for number in range(count // shards.SHARD_ROWS):
            file = shards.ShardFile(temporary, f"large-{number:05d}.rows")
            file.num_rows = shards.SHARD_ROWS
            file.bytes += 4 * DIM * file.num_rows
            file.file.truncate(file.bytes)
            lines.append(file.close(table, number, 0, 0))
    (folder / shards.CURRENT).write_text("1\n")


def resident() -> dict[str, float]:
    """MB of this process: its own, and pages of files, which the system may take back."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split(":")[1] for line in lines}
    return {k: int(values[k].split()[0]) / 1000 for k in ("RssAnon", "RssFile")}


def measure(folder: str, count: int, threads: int, calls: list[int], seconds: float) -> list[Any]:
    """Rates of the three ways with that many threads."""
    import tensorflow as tf

    from qianmo.ops.embedding_lookup import EmbeddingStore, Read

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    stores = {name: EmbeddingStore(f"{folder}/{name}") for name in ("dense", "hash")}
    table = tf.Variable(tf.zeros([count, DIM]))
    for first, end in chunks(count):
        table[first:end].assign(vectors(first, end))
    spec = [tf.TensorSpec([None], tf.int64)]

    # One row comes out, so that handing over the others is not measured.
    def function(read: Callable[[Any], Any]) -> Any:
        return tf.function(lambda ids: read(ids)[-1:], input_signature=spec)

    ways = {
        "tf.gather": function(lambda ids: tf.gather(table, ids)),
        "dense": function(lambda ids: stores["dense"].lookup([Read("dense", DIM, ids)])[0]),
        "hash": function(lambda ids: stores["hash"].lookup([Read("hash", DIM, ids)])[0]),
    }
    rng = np.random.default_rng(1)

    def hot(size: int) -> np.ndarray:
        places = rng.integers(0, HOT, size) * (count // HOT)
        return np.where(rng.random(size) < 0.9, places, rng.integers(0, count, size))

    found = []
    for kind, draw in (("uniform", lambda n: rng.integers(0, count, n)), ("hot", hot)):
        for size in calls:
            rows = [draw(size) for _ in range(max(8, 1_000_000 // size))]
            ids = {way: [tf.constant(key(r) if way == "hash" else r) for r in rows] for way in ways}
            rates: dict[str, list[float]] = {way: [] for way in ways}
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(rates["hash"]) < 4:
                for way, read in ways.items():
                    start = time.perf_counter()
                    for some in ids[way]:
                        last = read(some)
                    rates[way].append(size * len(rows) / (time.perf_counter() - start))
                    np.testing.assert_array_equal(last, ways["tf.gather"](ids["tf.gather"][-1]))
            base = np.array(rates["tf.gather"][1:])  # the first round warms up
            for way in ways:
                rate = np.array(rates[way][1:])
                found.append(
                    {
                        "ids": kind,
                        "threads": threads,
                        "ids a call": size,
                        "way": way,
                        "M rows/s": float(np.median(rate)) / 1e6,
                        "/ tf.gather": float(np.median(rate / base)),
                    }
                )
    return found


def memory(folder: str, count: int, way: str) -> dict[str, float]:
    """MB that a table adds to a process, once opened and once every row was read."""
    import tensorflow as tf

    from qianmo.ops.embedding_lookup import EmbeddingStore, Read

    ids = tf.reshape(tf.range(count // CHUNK * CHUNK, dtype=tf.int64), [-1, CHUNK])
    if way == "tf.gather":
        tf.gather(tf.zeros([9, 9]), [1])
        before = resident()
        table = tf.Variable(tf.zeros([count, DIM]))
        after = resident()
        for some in ids:
            tf.gather(table, some)
    else:
        ids = ids if way == "dense" else tf.constant(key(ids.numpy()))
        tf.gather(tf.zeros([9, 9]), [1])
        before = resident()
        store = EmbeddingStore(f"{folder}/{way}")
        after = resident()
        for some in ids:
            store.lookup([Read(way, DIM, some)])
    read = resident()
    return {
        "way": way,
        "MB when opened": sum(after.values()) - sum(before.values()),
        "MB of its own, all rows read": read["RssAnon"] - before["RssAnon"],
        "MB of file pages, all rows read": read["RssFile"] - before["RssFile"],
    }


def open_ms(folder: str) -> float:
    """Milliseconds to open a store, the median of five."""
    from qianmo.ops.embedding_lookup import EmbeddingStore

    took = []
    for _ in range(6):
        start = time.perf_counter()
        EmbeddingStore(folder).close()
        took.append(1e3 * (time.perf_counter() - start))
    return float(np.median(took[1:]))  # the first loads the op


def run(*, quick: bool) -> dict[str, Any]:
    """Writes the tables, then asks processes of their own for each number."""
    count = 1_000_000 if quick else 10_000_000
    seconds = 1.0 if quick else 6.0
    calls = [4_000, 65_536]
    spawn = multiprocessing.get_context("spawn")

    def alone(function: Callable[..., Any], *arguments: Any) -> Any:
        with spawn.Pool(1) as pool:
            return pool.apply(function, arguments)

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        took = write(folder, count)
        write_sparse(folder / "large", 10)
        opened = {name: alone(open_ms, f"{folder}/{name}") for name in ("dense", "hash", "large")}
        rows = []
        for threads in (1, 2):
            rows += alone(measure, temporary, count, threads, calls, seconds)
            for row in rows[-6:]:
                print(row, flush=True)
        kept = [alone(memory, temporary, count, way) for way in ("tf.gather", "dense", "hash")]

    def least(way: str) -> float:
        return min(r["/ tf.gather"] for r in rows if r["way"] == way)

    return {
        "table": {"rows": count, "dim": DIM, "dtype": "float32", "seconds to write": took},
        "memory": kept,
        "opened in ms": opened,
        "rows": rows,
        "targets": {
            "dense ids / tf.gather, the least": common.target(least("dense"), 1.0),
            "hashed ids / tf.gather, the least": common.target(least("hash"), 0.6),
            "ms to open 10 GB": common.target(opened["large"], 50.0, at_most=True),
        },
    }
