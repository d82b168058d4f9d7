"""The support store: rates, memory, eviction beside a reader, writers beside readers, kills, Redis.

Rows are of 64 floats with three labels, a task has 20. Every number of a row follows from its task,
time and a salt, so that a reader sees a torn row. All goes through the ops, called from Python, and
into files. Rates of one thread are by its processor time, as the machine may be busy. A call that
meets a lock gives up its core, which the system counts; one that is merely interrupted does not.
Those of a Redis on loopback are by the clock, as it is the Redis that works.
"""

from __future__ import annotations

import itertools
import pathlib
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import numpy as np

sys.path.append(str(common.ROOT / "tests"))
import redis_servers

from qianmo.ops.support_store import METRICS, SupportStore

DIM, LABELS, ROWS = 64, 3, 20
RAW_ROW = 4 * DIM
PUT, GET = 1024, 64  # rows and tasks of a call
STEPS = np.arange(DIM, dtype=np.float32)
Batch = tuple[np.ndarray, ...]


def batch(tasks: np.ndarray, times: np.ndarray, salts: np.ndarray) -> Batch:
    """Rows whose every number tells whether it belongs to the others."""
    base = ((tasks * 31 + times * 7 + salts * 131) % 65521).astype(np.float32)[:, None]
    labels = np.repeat(base, LABELS, 1)
    labels[:, 0] = salts
    return tasks, base + STEPS, labels, labels + 1, times, np.zeros_like(tasks), np.ones_like(tasks)


def torn(tasks: np.ndarray, found: Any) -> int:
    """Rows of a read whose numbers do not belong together."""
    h, labels, weights, times, _, count = (part.numpy() for part in found)
    stored = np.arange(h.shape[1]) < count[:, None]
    base = (tasks[:, None] * 31 + times * 7 + labels[..., 0].astype(np.int64) * 131) % 65521
    good = (h == base[..., None] + STEPS).all(-1) & (labels[..., 1:] == base[..., None]).all(-1)
    good &= (weights == labels + 1).all(-1)
    empty = ~(h.any(-1) | labels.any(-1) | weights.any(-1) | times.astype(bool))
    return int((~np.where(stored, good, empty)).sum())


def opened(path: pathlib.Path, **limits: Any) -> SupportStore:
    """The store of a folder, under the limits that are given."""
    return SupportStore(str(path), DIM, LABELS, ROWS, path=path, **limits)


def stats(store: SupportStore) -> dict[str, int]:
    """What it counts."""
    return dict(zip(METRICS, store.stats([0]).numpy()[0].tolist(), strict=True))


def resident() -> int:
    """Bytes of this process's memory that are no file's."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def timed(calls: Iterator[Callable[[], object]]) -> tuple[np.ndarray, np.ndarray, float]:
    """Milliseconds of each call, whether it gave up its core to wait, seconds of processor time."""
    took, blocked, processor = [], [], 0.0
    for call in calls:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        cpu, start = time.thread_time(), time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
        processor += time.thread_time() - cpu
        blocked.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > before)
    return 1e3 * np.array(took), np.array(blocked), processor


def line(what: str, unit: str, per_call: int, calls: Iterator[Callable[[], object]]) -> Any:
    """A line of the table: calls of one thread."""
    took, blocked, processor = timed(calls)
    return reported(what, f"{per_call * len(took) / processor:,.0f} {unit}/s", took, blocked)


def reported(what: str, rate: str, took: np.ndarray, blocked: np.ndarray) -> Any:
    """A line of the table."""
    row = {"what": what, "rate": rate}
    for name, share in (("p50 ms", 50), ("p99 ms", 99), ("max ms", 100)):
        row[name] = float(np.percentile(took, share))
    row["calls that had to wait"] = f"{blocked.sum():,} of {len(took):,}"
    row["max ms of these"] = float(took[blocked].max(initial=0))
    print(row, flush=True)
    return row


def puts(store: SupportStore, tasks: np.ndarray) -> Iterator[Callable[[], object]]:
    """Gives every task its rows, all tasks their first before any its second."""
    for when in range(1, ROWS + 1):
        for i in range(0, len(tasks), PUT):
            some = tasks[i : i + PUT]
            rows = batch(some, np.full_like(some, when), some % 8)
            yield lambda rows=rows: store.put(*rows)


def one_by_one(store: SupportStore, tasks: np.ndarray) -> Iterator[Callable[[], object]]:
    """Writes the last row of each task anew."""
    for i in range(len(tasks)):
        one = tasks[i : i + 1]
        rows = batch(one, np.full_like(one, ROWS), one % 8)
        yield lambda rows=rows: store.put(*rows)


def gets(store: SupportStore, tasks: np.ndarray, size: int) -> Iterator[Callable[[], object]]:
    """Reads tasks again and again, in an order of chance."""
    random = np.random.default_rng(1)
    while True:
        some = random.choice(tasks, size)
        yield lambda some=some: store.get(some, 1)


def while_evicting(
    store: SupportStore, path: pathlib.Path, limits: dict[str, Any], tasks: np.ndarray, left: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Reads one task at a time while, under new limits, the tasks become `left`."""
    start = time.perf_counter()
    holder = opened(path, **limits)

    def until() -> Iterator[Callable[[], object]]:
        for number, call in enumerate(gets(store, tasks, 1)):
            if number % 100 == 0 and stats(store)["tasks"] <= left:
                return
            yield call

    took, blocked, _ = timed(until())
    seconds = time.perf_counter() - start
    holder.close()
    return took, blocked, seconds


def filled(folder: pathlib.Path, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Fills a store with tasks of 20 rows, reads it, evicts half of it and then the rest."""
    tasks = np.random.default_rng(0).permutation(number).astype(np.int64) * 977
    table, targets = [], {}
    before = resident()
    path = folder / "filled"
    store = opened(path)
    table.append(line(f"write, {PUT} rows a call", "rows", PUT, puts(store, tasks)))
    time.sleep(2)  # the last journals are written
    full = resident() - before
    ratio = full / (number * ROWS * RAW_ROW)
    assert stats(store)["rows"] == number * ROWS
    size = f"{number:,} tasks x {ROWS} rows x {DIM} floats"
    targets[f"{size}: memory / raw vectors"] = common.target(ratio, 1.3, at_most=True)
    print(targets, flush=True)
    some = itertools.islice(gets(store, tasks, GET), 4000)
    table.append(line(f"read, {GET} tasks of {ROWS} rows a call", "tasks", GET, some))
    table.append(line("read, 1 task", "tasks", 1, itertools.islice(gets(store, tasks, 1), 40_000)))
    store.close()
    start = time.perf_counter()
    store = opened(path)
    rate = number * ROWS / (time.perf_counter() - start)
    table.append({"what": "open", "rate": f"{rate:,.0f} rows/s"})
    assert stats(store)["rows"] == number * ROWS

    half = number // 2
    for what, limits, left in (
        ("half of the tasks are evicted by capacity", {"max_tasks": half}, half),
        ("the others are evicted by time", {"ttl_seconds": 1.0}, 0),
    ):
        took, blocked, seconds = while_evicting(store, path, limits, tasks, left)
        rate = f"{half / seconds:,.0f} tasks/s evicted"
        table.append(reported(f"read, 1 task, while {what}", rate, took, blocked))
        targets[f"{size}: longest read that had to wait while {what}, ms"] = common.target(
            float(took[blocked].max(initial=0)), 10, at_most=True
        )
        time.sleep(2)
        freed = 1 - (resident() - before) / full
        name = f"{size}: memory given back after {what}"
        targets[name] = common.target(freed, 0.48 if left else 0.95)
        print(targets, flush=True)
    assert stats(store)["evicted"] == number
    store.close()
    return table, targets


def together(folder: pathlib.Path, seconds: float) -> tuple[list[Any], dict[str, Any]]:
    """8 writers and 8 readers on tasks that they share, with eviction."""
    store = opened(folder / "together", max_tasks=1500)
    end = time.perf_counter() + seconds
    wrote, read, rows, faults = ([0] * 8 for _ in range(4))

    def write(index: int) -> None:
        random = np.random.default_rng(index)
        while time.perf_counter() < end:
            tasks, times, salts = random.integers([[1]] * 3, [[2000], [60], [1000]], [3, 256])
            store.put(*batch(tasks, times, salts))
            wrote[index] += 256

    def ask(index: int) -> None:
        random = np.random.default_rng(100 + index)
        while time.perf_counter() < end:
            tasks = random.integers(1, 2000, GET)
            found = store.get(tasks, 1)
            faults[index] += torn(tasks, found)
            read[index] += GET
            rows[index] += int(found.count.numpy().sum())

    threads = [threading.Thread(target=f, args=(i,)) for i in range(8) for f in (write, ask)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert sum(rows) > 0
    table = [
        {
            "what": f"8 writers and 8 readers, {seconds:g} s",
            "rate": f"{sum(wrote) / seconds:,.0f} rows/s written, "
            f"{sum(read) / seconds:,.0f} tasks/s read",
        }
    ]
    print(table, flush=True)
    targets = {
        f"torn rows among {sum(rows):,} read beside writers": {
            "value": sum(faults),
            "target": "== 0",
            "met": sum(faults) == 0,
        }
    }
    return table, targets


WRITER = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import numpy as np
import bench_support_store as bench
store = bench.opened(pathlib.Path(sys.argv[2]))
for n in range(1, 10**9):
    tasks = np.arange(256) + 256 * n
    store.put(*bench.batch(tasks, np.full_like(tasks, n), tasks % 8))
    print(n, time.monotonic(), flush=True)
    time.sleep(0.002)
"""


def killed(folder: pathlib.Path, seconds: float) -> tuple[float, int]:
    """Kills a writer; returns the age of the oldest rows lost, in seconds, and rows kept."""
    here = str(pathlib.Path(__file__).parent)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, here, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    stored = [float(writer.stdout.readline().split()[1])]
    for text in writer.stdout:
        stored.append(float(text.split()[1]))
        if stored[-1] > stored[0] + seconds:
            break
    writer.kill()
    end = time.monotonic()
    stored += [float(text.split()[1]) for text in writer.stdout if text.endswith("\n")]
    writer.wait()
    store = opened(folder)
    tasks = np.arange(256, 256 * (len(stored) + 1))
    found = store.get(tasks, 1)
    assert torn(tasks, found) == 0
    kept = found.count.numpy().reshape(-1, 256).min(1)
    store.close()
    lost = np.flatnonzero(kept == 0)
    return (end - stored[lost[0]] if len(lost) else 0.0), int(found.count.numpy().sum())


def in_redis(folder: pathlib.Path, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Fills a Redis with tasks of 20 rows, and reads them."""
    tasks = np.random.default_rng(0).permutation(number).astype(np.int64) * 977
    table = []

    def line(what: str, unit: str, per_call: int, calls: Iterator[Callable[[], object]]) -> None:
        took, _, _ = timed(calls)
        row: dict[str, Any] = {"what": f"Redis: {what}"}
        row["rate"] = f"{per_call * len(took) / took.sum() * 1e3:,.0f} {unit}/s"
        for name, share in (("p50 ms", 50), ("p99 ms", 99), ("max ms", 100)):
            row[name] = float(np.percentile(took, share))
        print(row, flush=True)
        table.append(row)

    with redis_servers.server(folder) as server:
        store = SupportStore("bench", DIM, LABELS, ROWS, path=server.url())
        before = server.client().info()["used_memory_rss"]
        line(f"write, {PUT} rows a call", "rows", PUT, puts(store, tasks))
        memory = server.client().info()["used_memory_rss"] - before
        line("write, 1 row", "rows", 1, itertools.islice(one_by_one(store, tasks), 2000))
        some = itertools.islice(gets(store, tasks, GET), 2000)
        line(f"read, {GET} tasks of {ROWS} rows a call", "tasks", GET, some)
        line("read, 1 task", "tasks", 1, itertools.islice(gets(store, tasks, 1), 5000))
        found = store.get(tasks, 1)
        assert torn(tasks, found) == 0
        assert int(found.count.numpy().sum()) == number * ROWS
        store.close()
    ratio = memory / (number * ROWS * RAW_ROW)
    name = f"Redis, {number:,} tasks x {ROWS} rows x {DIM} floats: its memory / raw vectors"
    return table, {name: common.target(ratio, 1.3, at_most=True)}


def run(*, quick: bool) -> dict[str, Any]:
    """All of it; the full size takes 7 GB of memory and 20 GB of disk."""
    if redis_servers.MISSING:  # better now than after all the rest
        raise SystemExit(redis_servers.REASON)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        table, targets = filled(folder, 20_000 if quick else 1_000_000)
        more = together(folder, 3 if quick else 60)
        table += more[0]
        targets |= more[1]
        kills = [killed(folder / f"killed{i}", 2.3 + 0.17 * i) for i in range(1 if quick else 5)]
        oldest = max(age for age, _ in kills)
        targets[f"{len(kills)} kills: age of the oldest rows lost, s"] = common.target(
            oldest, 1, at_most=True
        )
        more = in_redis(folder, 2_000 if quick else 20_000)
        table += more[0]
        targets |= more[1]
    return {"rows": table, "targets": targets}
