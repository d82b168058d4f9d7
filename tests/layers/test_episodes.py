"""Episodes: every row where it belongs, and nothing else."""

import numpy as np
import pytest
import tensorflow as tf

from qianmo.layers.episodes import episodes


def by_task(task_id, order, **arguments):
    """(support, query) row numbers of each task, as the function says, by task id."""
    found = episodes(tf.constant(task_id), tf.constant(order), **arguments)
    result = {}
    for support, s, query, q in zip(*(x.numpy() for x in found), strict=True):
        assert not support[s:].any()
        assert not query[q:].any()
        rows = support[:s].tolist(), query[:q].tolist()
        ids = {task_id[i] for part in rows for i in part}
        assert len(ids) == 1  # no row of another task
        result[ids.pop()] = rows
    return result


def expected(task_id, order, share, max_support, max_query):
    """The definition, task by task."""
    result = {}
    for task in set(task_id):
        rows = sorted((i for i, t in enumerate(task_id) if t == task), key=lambda i: (order[i], i))
        n = len(rows)
        if n >= 2:
            s = min(max_support, n - 1, max(1, int(share * n)))
            later = [i for i in rows if order[i] > order[rows[s - 1]]]
            if later:
                result[task] = rows[:s], later[:max_query]
    return result


@pytest.mark.parametrize(
    ("share", "max_support", "max_query"), [(0.5, 20, 40), (0.3, 2, 3), (0.9, 4, 1)]
)
def test_rows_are_split_as_defined(share, max_support, max_query):
    rng = np.random.default_rng(1)
    task_id = rng.integers(-3, 12, 60).tolist()
    order = rng.integers(0, 5, 60).tolist()  # with ties, of which none is on both sides
    found = by_task(
        task_id, order, support_share=share, max_support=max_support, max_query=max_query
    )
    assert found == expected(task_id, order, share, max_support, max_query)


def test_lonely_tasks_give_nothing():
    # Nor do those whose rows are all of one time.
    found = episodes(tf.constant([3, 1, 2, 4, 4]), tf.constant([0, 0, 0, 7, 7]))
    assert [x.shape for x in found] == [(0, 0), (0,), (0, 0), (0,)]


def test_sizes_are_drawn_from_those_given():
    task_id = np.repeat(np.arange(200), 10).tolist()
    order = list(range(2000))
    arguments = {"support_sizes": (1, 3, 30), "max_support": 20}
    first = by_task(task_id, order, **arguments, seed=tf.constant([1, 2], tf.int64))
    again = by_task(task_id, order, **arguments, seed=tf.constant([1, 2], tf.int64))
    other = by_task(task_id, order, **arguments, seed=tf.constant([1, 3], tf.int64))
    assert first == again
    assert first != other
    sizes = np.bincount([len(support) for support, _ in first.values()])
    assert set(np.flatnonzero(sizes)) == {1, 3, 9}  # 30 is more than a task of 10 can give
    assert sizes[[1, 3, 9]].min() > 40
    assert all(len(s) + len(q) == 10 for s, q in first.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"support_share": 1.0}, "support_share.*Received: 1.0"),
        ({"max_support": 0}, "max_support.*Received: 0"),
        ({"max_query": 0}, "max_query"),
        ({"support_sizes": (0,)}, "support_sizes"),
        ({"support_sizes": (1,)}, "seed"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        episodes(tf.constant([1, 1]), tf.constant([1, 2]), **arguments)
