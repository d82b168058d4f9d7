"""Support rows in the graph's hash table, against a Python model of it."""

import concurrent.futures

import numpy as np
import pytest
import tensorflow as tf

from qianmo.export import support_table
from qianmo.export.support_table import METRICS, SupportTable
from qianmo.ops.support_store import BAD_LABEL, BAD_TIME, BAD_VECTOR, TOO_OLD


def int64(values):
    return tf.constant(values, tf.int64)


def put(table, task_id, time, values, event_id=None):
    """Rows whose h, labels and weights follow from one value."""
    v = tf.constant(values, tf.float32)[:, None]
    h = tf.concat([v, -v], 1)
    version = tf.zeros_like(time)
    event_id = int64([0] * len(time) if event_id is None else event_id)
    status = table.put(int64(task_id), h, v / 2, tf.ones_like(v), int64(time), event_id, version)
    return status.numpy().tolist()


def events(table, task):
    """(time, event id) -> value of a task, after checking that a row's parts belong together."""
    rows = table.get(int64([task]), 0)
    count = int(rows.count[0])
    h = rows.h.numpy()[0]
    assert not any(part.numpy()[0, count:].any() for part in (rows.h, rows.time, rows.event_id))
    np.testing.assert_array_equal(h[:, 1], -h[:, 0])
    np.testing.assert_array_equal(rows.labels[0, :, 0], h[:, 0] / 2)
    np.testing.assert_array_equal(rows.weights[0, :, 0], np.arange(len(h)) < count)
    times, ids = (part.numpy()[0, :count].tolist() for part in (rows.time, rows.event_id))
    keys = list(zip(times, ids, strict=True))
    assert keys == sorted(set(keys))
    return dict(zip(keys, h[:count, 0].tolist(), strict=True))


def content(table, task):
    """The same where event ids are 0: time -> value."""
    return {when: value for (when, event), value in events(table, task).items() if event == 0}


def test_the_last_rows_stay_and_each_event_stands_once():
    table = SupportTable(2, 1, 3)
    assert put(table, [7, 7, 8], [20, 10, 5], [1, 2, 3]) == [0, 0, 0]
    assert content(table, 7) == {10: 2, 20: 1}
    assert put(table, [7, 7, 7, 7], [20, 30, 40, 40], [4, 5, 6, 7]) == [0, 0, 0, 0]
    assert content(table, 7) == {20: 4, 30: 5, 40: 7}
    assert content(table, 8) == {5: 3}
    assert put(table, [7], [19], [1]) == [TOO_OLD]
    assert content(table, 9) == {}
    # Read above: task 7 twice and task 8, and task 9, of which there is nothing.
    assert table.stats(int64([1, 2])).numpy().tolist() == [[2, 3, 1], [2, 3, 1]]
    assert table.stats(int64([])).shape == [0, len(METRICS)]


def test_reads_are_counted_however_many_there_are_at_once():
    table = SupportTable(2, 1, 3)
    put(table, [7], [20], [1])
    get = tf.function(lambda tasks: table.get(tasks, 0).count)
    get(int64([7, 8, 9]))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(get, [int64([7, 8, 9])] * 400))
    assert table.stats(int64([1])).numpy().tolist() == [[1, 401, 802]]


def test_bad_rows_are_refused_alone():
    table = SupportTable(1, 1, 3)
    nan = float("nan")
    status = table.put(
        int64([1, 1, 1, 1, 1]),
        tf.constant([[1.0], [nan], [1.0], [1.0], [1.0]]),
        tf.constant([[1.0], [1.0], [nan], [1.0], [1.0]]),
        tf.constant([[1.0], [1.0], [1.0], [-1.0], [1.0]]),
        int64([1, 2, 3, 4, 0]),
        int64([0, 0, 0, 0, 0]),
        int64([0, 0, 0, 0, 0]),
    )
    assert status.numpy().tolist() == [0, BAD_VECTOR, BAD_LABEL, BAD_LABEL, BAD_TIME]
    assert table.get(int64([1]), 0).time.numpy().tolist() == [[1, 0, 0]]


def test_a_label_of_weight_zero_may_be_anything():
    table = SupportTable(1, 2, 3)
    labels = tf.constant([[float("nan"), 3.0], [4.0, float("nan")]])
    weights = tf.constant([[0.0, 1.0], [0.0, 1.0]])
    status = table.put(
        int64([1, 1]),
        tf.ones([2, 1]),
        labels,
        weights,
        int64([1, 2]),
        int64([0] * 2),
        int64([0] * 2),
    )
    assert status.numpy().tolist() == [0, BAD_LABEL]
    assert table.get(int64([1]), 0).labels[0, 0].numpy().tolist() == [0, 3]


def test_fewer_rows_are_the_newest():
    table = SupportTable(2, 1, 4)
    put(table, [3] * 4, [1, 2, 3, 4], [1, 2, 3, 4])
    rows = table.get(int64([3]), 0, 2)
    assert rows.time.numpy().tolist() == [[3, 4]]
    assert rows.count.numpy().tolist() == [2]


def test_events_of_one_time_are_told_apart_by_their_id():
    table, low, high = SupportTable(2, 1, 4), -(2**63), 2**63 - 1
    assert put(table, [1] * 4, [20] * 4, [0, 1, 2, 3], [5, high, low, -1]) == [0] * 4
    assert events(table, 1) == {(20, low): 2, (20, -1): 3, (20, 5): 0, (20, high): 1}
    assert put(table, [1, 1], [20, 20], [6, 7], [-1, -1]) == [0, 0]  # twice is once
    assert put(table, [1, 1], [19, 20], [0, 8], [high, low + 1]) == [TOO_OLD, 0]
    assert put(table, [1], [20], [0], [low]) == [TOO_OLD]
    assert events(table, 1) == {(20, low + 1): 8, (20, -1): 7, (20, 5): 0, (20, high): 1}


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds of the wall clock, which a test may set."""
    found = {"now": 10**12}
    monkeypatch.setattr(support_table, "_now", lambda: tf.constant(found["now"], tf.int64))
    return found


HOUR, TTL = 3_600_000, 600_000


def test_rows_live_as_long_as_they_should(clock):
    table = SupportTable(2, 1, 3, ttl_seconds=TTL / 1000)
    put(table, [1], [5], [1])
    clock["now"] += TTL
    assert content(table, 1) == {5: 1}
    clock["now"] += 1
    assert content(table, 1) == {}
    put(table, [1], [6], [2])
    assert content(table, 1) == {6: 2}  # what was past its time is not written again


@pytest.mark.parametrize("idle", [False, True])
def test_a_clock_that_went_ahead_and_back_keeps_no_row_for_longer(clock, idle):
    table = SupportTable(2, 1, 3, ttl_seconds=TTL / 1000)
    put(table, [1], [5], [1])
    clock["now"] += HOUR
    put(table, [2], [5], [1])
    clock["now"] -= HOUR
    if not idle:  # other requests read the clock
        put(table, [3], [5], [1])
        assert content(table, 3) == {5: 1}
    clock["now"] += TTL + 1
    assert [content(table, task) for task in (1, 2, 3)] == [{}, {}, {}]
    if not idle:
        for _ in range(HOUR // TTL + 1):
            clock["now"] += TTL // 2
            assert content(table, 2) == {}  # not even when the clock passes its time of writing
    put(table, [2], [7], [1])
    assert content(table, 2) == {7: 1}


def test_rows_never_outlive_their_time_however_the_clock_is_set(monkeypatch):
    wall = tf.Variable(10**12, dtype=tf.int64)
    monkeypatch.setattr(support_table, "_now", wall.read_value)
    random, now = np.random.default_rng(0), 0
    table = SupportTable(2, 1, 3, ttl_seconds=TTL / 1000)
    counts = tf.function(lambda tasks: table.get(tasks, 0).count)
    store = tf.function(lambda *rows: table.put(*rows))
    tasks, written, seen = int64(range(20)), np.full(20, -(10**9)), 0
    one, labels = tf.ones([1, 2]), tf.ones([1, 1])
    for _ in range(1000):
        passed = int(random.integers(0, TTL // 4))
        now += passed
        wall.assign_add(passed)
        counts(tasks)  # a server is asked all the time
        wall.assign_add(int(random.choice([0, 0, 0, HOUR, -HOUR, TTL // 2, -TTL // 2])))
        counts(tasks)
        task = int(random.integers(0, 20))
        status = store(int64([task]), one, labels, labels, int64([now + 1]), *[int64([0])] * 2)
        assert status.numpy().tolist() == [0]
        written[task] = now
        lives = counts(tasks).numpy() > 0
        assert (now - written[lives] <= TTL).all()
        assert lives[task]
        seen += lives.sum()
    assert seen > 2000


def test_small_steps_back_are_no_jumps(clock):
    table = SupportTable(2, 1, 3, ttl_seconds=TTL / 1000)
    put(table, [1], [5], [1])
    for _ in range(10):  # as threads read it
        clock["now"] -= 500
        assert content(table, 1) == {5: 1}
        clock["now"] += 500
        assert content(table, 1) == {5: 1}


def test_it_equals_a_python_model_under_random_calls():
    table, expected, random = SupportTable(2, 1, 4), {}, np.random.default_rng(0)
    for _ in range(100):
        size = random.integers(1, 9)
        task, time = random.integers(-2, 3, size), random.integers(1, 12, size)
        event = random.integers(-1, 2, size)
        values = random.normal(size=size).astype(np.float32)
        put(table, task, time, values, event)
        for *key, value in zip(*(x.tolist() for x in (task, time, event, values)), strict=True):
            expected.setdefault(key[0], {})[tuple(key[1:])] = value
        for t, rows in expected.items():
            expected[t] = {when: rows[when] for when in sorted(rows)[-4:]}
    assert {t: events(table, t) for t in range(-2, 3)} == expected
