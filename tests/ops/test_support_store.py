"""The support store through its ops: a random walk beside a Python model, files, sessions."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from support_rows import DIM, LABELS, MAX_ROWS, get, get_events, put, stats

from qianmo.ops import support_store
from qianmo.ops.support_store import METRICS, SupportStore

HEADER = 24
RECORD = 2 * 8 + 32 + 4 * (DIM + 2 * LABELS) + 4 + 8  # 4: padding to words of 8 bytes
Open = Callable[..., SupportStore]


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens stores of the test's own name, and closes those that it left open."""
    stores: list[SupportStore] = []

    def make(name: str = "", max_rows: int = MAX_ROWS, **options: Any) -> SupportStore:
        store = SupportStore(request.node.name + name, DIM, LABELS, max_rows, **options)
        stores.append(store)
        return store

    yield make
    for store in stores:
        with contextlib.suppress(tf.errors.NotFoundError):
            store.close()


class Model:
    """What the store should do, in dictionaries."""

    def __init__(self, max_tasks: int) -> None:
        self.max_tasks = max_tasks
        # Task -> (time, event id) -> version and salt; the last written at the end.
        self.tasks: dict[int, dict[tuple[int, int], tuple[int, int]]] = {}
        self.counts = dict.fromkeys(("hits", "misses", "refused", "evicted"), 0)

    def put(self, task: int, when: int, version: int, salt: int, event: int) -> int:
        if when <= 0:
            return support_store.BAD_TIME
        rows = self.tasks.get(task, {})
        if len(rows) == MAX_ROWS and (when, event) < min(rows):
            return support_store.TOO_OLD
        rows[when, event] = version, salt
        if len(rows) > MAX_ROWS:
            del rows[min(rows)]
        self.tasks.pop(task, None)
        self.tasks[task] = rows
        if len(self.tasks) > self.max_tasks:
            del self.tasks[next(iter(self.tasks))]
            self.counts["evicted"] += 1
        return support_store.STORED

    def get(self, task: int, version: int) -> dict[tuple[int, int], int]:
        rows = self.tasks.get(task, {})
        found = {event: salt for event, (v, salt) in sorted(rows.items()) if v == version}
        self.counts["refused"] += len(rows) - len(found)
        self.counts["hits" if found else "misses"] += 1
        return found


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_random_walk_beside_a_model(opened: Open, tmp_path: pathlib.Path, on_disk: bool) -> None:
    options: dict[str, Any] = {"max_tasks": 12, "path": tmp_path / "s" if on_disk else ""}
    store, model = opened(**options), Model(12)
    random = np.random.default_rng(3)
    seen = collections.Counter(model.counts)
    for step in range(300):
        if on_disk and step % 60 == 59:
            store.close()
            store = opened(**options)
            seen.update(model.counts)
            model.counts = dict.fromkeys(model.counts, 0)
        version = int(random.integers(1, 3))
        events = [
            (int(task), int(when), int(random.integers(0, 8)), int(random.integers(-1, 2)))
            for task, when in random.integers([-8, 0], [8, 15], [random.integers(1, 6), 2])
        ]
        expected = [
            model.put(task, when, version, salt, event) for task, when, salt, event in events
        ]
        assert put(store, events, version) == expected
        task, version = (int(x) for x in random.integers([-8, 1], [8, 3]))
        assert get_events(store, task, version) == model.get(task, version)
        found = stats(store)
        assert found["tasks"] == len(model.tasks)
        assert found["rows"] == sum(map(len, model.tasks.values()))
        assert {key: found[key] for key in model.counts} == model.counts
    seen.update(model.counts)
    assert min(seen.values()) > 0


def test_the_last_rows_are_returned_when_fewer_are_asked_for(opened: Open) -> None:
    store = opened()
    put(store, [(1, 30), (1, 10), (1, 20)])
    found = store.get([1, 2], 1, max_rows=2)
    assert found.time.numpy().tolist() == [[20, 30], [0, 0]]
    assert found.count.numpy().tolist() == [2, 0]
    assert store.get([1], 1, max_rows=4096).count.numpy().tolist() == [3]
    for bad in (4097, 2**31, 2**62, -1):
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"max_rows.*{bad}"):
            store.get([1], 1, max_rows=bad)


def test_a_bad_row_leaves_its_neighbours_alone(opened: Open) -> None:
    store = opened()
    h, labels, weights = (np.ones([7, width], "f4") for width in (DIM, LABELS, LABELS))
    h[1, 2], labels[2, 0], weights[3, 1], weights[4, 0] = np.nan, np.inf, np.nan, -1
    labels[5, 1], weights[5, 1] = np.nan, 0  # undefined, hence good
    when = [10, 11, 12, 13, -14, 15, 16]
    status = store.put([1] * 7, h, labels, weights, when, [0] * 7, [1] * 7).numpy()
    bad = support_store
    assert status.tolist() == [
        0, bad.BAD_VECTOR, bad.BAD_LABEL, bad.BAD_LABEL, bad.BAD_LABEL | bad.BAD_TIME, 0, 0,
    ]  # fmt: skip
    found = store.get([1], 1)
    assert found.time.numpy().tolist() == [[10, 15, 16, 0]]
    assert found.labels.numpy()[0, 1].tolist() == [1, 0]
    assert found.weights.numpy()[0, 1].tolist() == [1, 0]


def test_events_of_one_time_are_told_apart_by_their_id(
    opened: Open, tmp_path: pathlib.Path
) -> None:
    low, high = -(2**63), 2**63 - 1
    store = opened(path=tmp_path / "s")
    events = [(1, 20, salt, event) for salt, event in enumerate((5, high, low, -1))]
    assert put(store, events) == [support_store.STORED] * 4
    assert get_events(store, 1) == {(20, low): 2, (20, -1): 3, (20, 5): 0, (20, high): 1}
    assert put(store, [(1, 20, 7, -1)] * 2) == [support_store.STORED] * 2  # twice is once
    assert put(store, [(1, 19, 0, high)]) == [support_store.TOO_OLD]
    assert put(store, [(1, 20, 0, low + 1)]) == [support_store.STORED]  # pushes out the lowest
    assert put(store, [(1, 20, 0, low)]) == [support_store.TOO_OLD]
    expected = {(20, low + 1): 0, (20, -1): 7, (20, 5): 0, (20, high): 1}
    assert get_events(store, 1) == expected
    store.export_rows(tmp_path / "rows")
    store.close()
    assert get_events(opened(path=tmp_path / "s"), 1) == expected
    other = opened("other")
    other.import_rows(tmp_path / "rows")
    assert get_events(other, 1) == expected


def test_files_of_an_older_format_are_refused_in_one_line(
    opened: Open, tmp_path: pathlib.Path
) -> None:
    store = opened(path=tmp_path / "s")
    put(store, [(1, 5)])
    store.export_rows(tmp_path / "rows")
    store.close()
    for path in (log_of(tmp_path / "s"), tmp_path / "rows"):
        data = path.read_bytes()
        old = b"QIANMOS1" + data[8:16]
        total = 16
        for word in (old[:8], old[8:]):  # the sum of support_log.h
            total = (total ^ int.from_bytes(word, "little")) * 0x9E3779B97F4A7C15 % 2**64
            total ^= total >> 32
        path.write_bytes(old + total.to_bytes(8, "little") + data[HEADER:])
    with pytest.raises(tf.errors.FailedPreconditionError, match="holds rows of format 1, which"):
        opened(path=tmp_path / "s")
    with pytest.raises(tf.errors.FailedPreconditionError, match="holds rows of format 1, which"):
        opened("other").import_rows(tmp_path / "rows")


def test_any_task_id_will_do(opened: Open) -> None:
    store = opened()
    ids = [0, -1, -2, 2**63 - 1, -(2**63)]
    h = np.arange(5, dtype="f4")[:, None] * np.ones([5, DIM], "f4")
    ones = np.ones([5, LABELS], "f4")
    store.put(ids, h, ones, ones, [9] * 5, [0] * 5, [1] * 5)
    np.testing.assert_array_equal(store.get(ids, 1).h[:, 0], h)


def test_no_rows(opened: Open) -> None:
    store = opened()
    none, labels = tf.zeros([0], tf.int64), tf.zeros([0, LABELS])
    assert store.put(none, tf.zeros([0, DIM]), labels, labels, none, none, none).shape == [0]
    assert store.get(none, 1).h.shape == [0, MAX_ROWS, DIM]
    assert store.stats(none).shape == [0, len(METRICS)]


def test_rows_past_their_time_are_not_returned_and_then_freed(opened: Open) -> None:
    store = opened(ttl_seconds=1.0)
    put(store, [(1, 5), (2, 5)])
    assert get(store, 1) == {5: 0}
    time.sleep(1.0)
    assert get(store, 1) == {}
    while stats(store)["tasks"]:  # within a second or two; a store that never frees hangs
        time.sleep(0.1)
    assert (stats(store)["bytes"], stats(store)["evicted"]) == (0, 2)


def test_a_capacity_in_bytes_holds(opened: Open) -> None:
    store = opened(max_bytes=20_000)
    for task in range(400):
        put(store, [(task, when) for when in (1, 2, 3)])
        assert stats(store)["bytes"] <= 20_000
    found = stats(store)
    assert found["bytes"] > 19_000
    assert found["tasks"] + found["evicted"] == 400
    assert [bool(get(store, task)) for task in (399, 400 - found["tasks"])] == [True, True]
    assert not get(store, 399 - found["tasks"])


def test_writers_and_readers_at_once(opened: Open) -> None:
    store = opened(max_tasks=30)
    end = time.monotonic() + 2

    def write(seed: int) -> None:
        random = np.random.default_rng(seed)
        while time.monotonic() < end:
            status = put(store, random.integers(1, 40, [16, 3]).tolist())
            assert set(status) <= {support_store.STORED, support_store.TOO_OLD}

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        while time.monotonic() < end:
            get(store, int(random.integers(1, 40)))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [pool.submit(work, i) for i in range(3) for work in (write, read)]
    for job in jobs:
        job.result()
    found = stats(store)
    assert found["hits"] > 0
    assert found["evicted"] > 0
    assert (found["tasks"], found["rows"]) == (
        30,
        sum(len(get(store, task)) for task in range(1, 40)),
    )


WRITER = """
import sys, time
import numpy as np
from qianmo.ops.support_store import SupportStore
store = SupportStore("s", 3, 2, 4, path=sys.argv[1])
ones = np.ones([64, 2], "f4")
for n in range(1, 10**9):
    tasks = np.arange(64) + 64 * n
    status = store.put(tasks, np.full([64, 3], n, "f4"), ones, ones, [n] * 64, [0] * 64, [1] * 64)
    assert not status.numpy().any()
    print(n, time.monotonic(), flush=True)
"""


def test_a_killed_process_loses_less_than_its_last_second(
    opened: Open, tmp_path: pathlib.Path
) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "s"], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    first = float(writer.stdout.readline().split()[1])
    acknowledged = []
    for line in writer.stdout:
        acknowledged.append((int(line.split()[0]), float(line.split()[1])))
        if acknowledged[-1][1] > first + 2.5:
            writer.kill()
            break
    killed = time.monotonic()
    acknowledged += [(int(a), float(b)) for a, b in (x.split() for x in writer.stdout if "\n" in x)]
    writer.wait()
    store = opened(path=tmp_path / "s")
    safe = max(n for n, when in acknowledged if when < killed - 1)
    assert safe > 10
    tasks = np.arange(64, 64 * (safe + 1))
    found = store.get(tasks, 1)
    assert (found.count.numpy() == 1).all()
    np.testing.assert_array_equal(found.h[:, 0, 0], tasks // 64)
    put(store, [(1, 1)])
    assert get(store, 1)


def log_of(folder: pathlib.Path) -> pathlib.Path:
    (log,) = folder.glob("*.log")
    return log


def tasks_in(log: bytes) -> list[int]:
    """The tasks of a log's records, in their order."""
    at = range(HEADER + 8, len(log), RECORD)
    return [int.from_bytes(log[i : i + 8], "little") for i in at]


@pytest.mark.parametrize("cut", [0, 1, HEADER - 1, HEADER, HEADER + 1, RECORD - 1, RECORD])
def test_a_torn_log_loses_its_torn_record(opened: Open, tmp_path: pathlib.Path, cut: int) -> None:
    folder = tmp_path / "s"
    store = opened(path=folder)
    put(store, [(task, 5) for task in range(10)])
    store.close()
    data = log_of(folder).read_bytes()
    assert len(data) == HEADER + 10 * RECORD
    log_of(folder).write_bytes(data[: len(data) - cut])
    store = opened(path=folder)
    kept = (10 * RECORD - cut) // RECORD
    assert [bool(get(store, task)) for task in tasks_in(data)] == [i < kept for i in range(10)]
    assert stats(store)["damaged_bytes"] == (10 * RECORD - cut) % RECORD
    put(store, [(77, 5)])
    store.close()
    store = opened(path=folder)
    assert get(store, 77)
    assert (stats(store)["tasks"], stats(store)["damaged_bytes"]) == (kept + 1, 0)


def test_a_log_torn_in_its_header_begins_anew(opened: Open, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "s"
    opened(path=folder).close()
    log_of(folder).write_bytes(log_of(folder).read_bytes()[: HEADER - 1])
    store = opened(path=folder)
    put(store, [(1, 5)])
    store.close()
    assert get(opened(path=folder), 1)


def test_a_changed_bit_costs_its_record_alone(opened: Open, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "s"
    store = opened(path=folder)
    put(store, [(task, 5) for task in range(10)])
    store.close()
    good = log_of(folder).read_bytes()
    random = np.random.default_rng(5)
    for at in random.integers(0, len(good), 25).tolist():
        bad = bytearray(good)
        bad[at] ^= 1 << random.integers(8)
        log_of(folder).write_bytes(bad)
        store = opened(path=folder)
        lost = (at - HEADER) // RECORD  # -1: none
        found = [bool(get(store, task)) for task in tasks_in(good)]
        assert found == [i != lost for i in range(10)]
        assert stats(store)["damaged_bytes"] == (HEADER if lost < 0 else RECORD)
        store.close()


def test_rows_go_from_store_to_store(opened: Open, tmp_path: pathlib.Path) -> None:
    one, two = opened("1"), opened("2", path=tmp_path / "s")
    put(one, [(1, 5), (1, 7), (2, 5)])
    put(two, [(1, 6), (2, 5, 3)])
    one.export_rows(tmp_path / "rows")
    two.import_rows(tmp_path / "rows")
    two.close()
    two = opened("2", path=tmp_path / "s")
    assert get(two, 1) == {5: 0, 6: 0, 7: 0}
    assert get(two, 2) == {5: 0}
    (tmp_path / "rows").write_bytes((tmp_path / "rows").read_bytes()[:-5])
    with pytest.raises(tf.errors.FailedPreconditionError, match=f"and {RECORD - 5} bytes of it"):
        one.import_rows(tmp_path / "rows")
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"Cannot read .*nowhere"):
        one.import_rows(tmp_path / "nowhere")
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"Cannot write .*nowhere"):
        one.export_rows(tmp_path / "nowhere" / "rows")


def test_holders_of_a_name_share_a_store(opened: Open, tmp_path: pathlib.Path) -> None:
    one, two = opened(), opened(max_tasks=1)
    put(one, [(1, 5)])
    assert get(two, 1)
    put(one, [(2, 5)])  # under the limits of the latest
    assert not get(one, 1)
    one.close()
    assert get(two, 2)
    two.close()
    assert not get(opened(), 2)
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"max_rows 4, .* max_rows 9, "):
        opened(max_rows=9)
    opened("a", path=tmp_path)
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"another name, has .* open"):
        opened("b", path=tmp_path)


def test_refusals(opened: Open, tmp_path: pathlib.Path) -> None:
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"`max_rows` should be in \[1, 40"):
        opened(max_rows=5000)
    with pytest.raises(tf.errors.FailedPreconditionError, match="`ttl` should be in"):
        opened(ttl_seconds=-1.0)
    (tmp_path / "file").touch()
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"Cannot write .*LOCK"):
        opened(path=tmp_path / "file")
    store = opened(path=tmp_path / "s")
    one = [1]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"`h` .* shape \[1,3\], .*\[1,4\]"):
        store.put(one, tf.ones([1, 4]), tf.ones([1, 2]), tf.ones([1, 2]), one, one, one)
    store.close()
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"dim 3 with 2 .* for: 4 with 2"):
        SupportStore("other", 4, LABELS, MAX_ROWS, path=tmp_path / "s")


def test_shapes_in_a_graph(opened: Open) -> None:
    store = opened()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64)])
    def get_and_count(task: tf.Tensor) -> Any:
        return store.get(task, 1), store.stats(task)

    rows, counts = get_and_count.get_concrete_function().structured_outputs
    assert [part.shape.as_list() for part in rows] == [
        [None, MAX_ROWS, DIM], [None, MAX_ROWS, LABELS], [None, MAX_ROWS, LABELS],
        [None, MAX_ROWS], [None, MAX_ROWS], [None],
    ]  # fmt: skip
    assert counts.shape.as_list() == [None, len(METRICS)]

    @tf.function
    def wrong() -> Any:
        ones = tf.ones([2, LABELS])
        return store.put([1, 2], tf.ones([2, DIM]), ones, ones, [1, 2, 3], [0, 0], [1, 1])

    with pytest.raises(ValueError, match="Dimension"):
        wrong.get_concrete_function()


def saved(folder: pathlib.Path, version: int, **options: Any) -> pathlib.Path:
    """A SavedModel whose signatures put and get."""
    module = tf.Module()
    module.store = SupportStore("served", DIM, LABELS, MAX_ROWS, **options)
    ids, numbers = tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, DIM])

    @tf.function(input_signature=[ids, numbers, ids])
    def put_rows(task: tf.Tensor, h: tf.Tensor, when: tf.Tensor) -> dict[str, tf.Tensor]:
        ones, same = (
            tf.ones_like(h[:, :LABELS]),
            tf.fill(tf.shape(task), tf.cast(version, tf.int64)),
        )
        return {"status": module.store.put(task, h, ones, ones, when, task, same)}

    @tf.function(input_signature=[ids])
    def get_rows(task: tf.Tensor) -> dict[str, tf.Tensor]:
        return module.store.get(task, version)._asdict()

    path = folder / str(version)
    tf.saved_model.save(module, str(path), signatures={"put": put_rows, "get": get_rows})
    module.store.close()
    return path


@contextlib.contextmanager
def loaded(folder: pathlib.Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """A function (signature, inputs) -> outputs of a version in a session of its own."""
    with contextlib.closing(tf.compat.v1.Session(graph=tf.Graph())) as sess:
        with sess.graph.as_default():
            meta = tf.compat.v1.saved_model.load(sess, ["serve"], str(folder))

        def run(name: str, inputs: dict[str, Any]) -> Any:
            signature = meta.signature_def[name]
            feed = {signature.inputs[key].name: value for key, value in inputs.items()}
            return sess.run({key: out.name for key, out in signature.outputs.items()}, feed)

        yield run


def test_model_versions_share_a_store_and_refuse_each_others_rows(tmp_path: pathlib.Path) -> None:
    one, two = (saved(tmp_path, version, path=tmp_path / "s") for version in (1, 2))

    def rows(n: int) -> dict[str, np.ndarray]:
        return {"task": np.array([5, 6]), "h": np.ones([2, DIM], "f4"), "when": np.array([n, n])}

    task = {"task": np.array([5])}
    with contextlib.ExitStack() as new:
        old = new.enter_context(contextlib.ExitStack())
        run_one = old.enter_context(loaded(one))
        assert run_one("put", rows(1))["status"].tolist() == [0, 0]
        run_two = new.enter_context(loaded(two))
        assert run_two("get", task)["count"].tolist() == [0]
        run_two("put", rows(2))
        assert run_one("get", task)["time"].tolist() == [[1, 0, 0, 0]]
        assert run_two("get", task)["time"].tolist() == [[2, 0, 0, 0]]
        old.close()  # that version is unloaded
        assert run_two("get", task)["time"].tolist() == [[2, 0, 0, 0]]
    with loaded(one) as run:  # another process would see the same
        assert run("get", task)["time"].tolist() == [[1, 0, 0, 0]]
    again = tf.saved_model.load(str(two)).signatures
    assert again["get"](task=tf.constant([5], tf.int64))["time"].numpy().tolist() == [[2, 0, 0, 0]]
