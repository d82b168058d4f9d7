"""Splits for models that learn a task from its own rows: rows to score, and the rows known by then.

A part `test` comes with a part `test_support`. The support of a row of `test` are all rows of
`test_support` that have its task; within a task they stand in order of time, the newest last, so
that the k most recent are the last k. A task without support has no row there.

What is known of a row is strictly older than it. Times of whole seconds tie often: on MovieLens-1M
42 % of the ratings share user and second with the one before. `Ties` says what becomes of equal
times: "excluded" leaves them out, "by_row" takes the order of the rows for that of time, as some
published protocols do.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

SUPPORT_ROWS = 20
# MeLU's four states of users and films: known in training, or not.
STATES = ("warm", "user_cold", "item_cold", "user_and_item_cold")

Ties = Literal["excluded", "by_row"]
_Rows = npt.NDArray[Any]


def new_users(
    table: pa.Table,
    task: str,
    time: str,
    *,
    seed: int,
    share: float = 0.2,
    valid_share: float = 0.1,
    ties: Ties = "excluded",
) -> dict[str, pa.Table]:
    """Holds out a share of the tasks, to be met with their first rows for support.

    Args:
      table: rows in order of time.
      task: column of the task.
      time: column of the time.
      seed: of the draw of the tasks.
      share: of the tasks to hold out for test.
      valid_share: of the tasks to hold out for valid; 0 leaves it out.
      ties: support rows of the time of the task's first row in test are left out, or not.

    Returns:
      train: all rows of the other tasks; test: rows of held-out tasks after their 20th;
      test_support: the rows before those, at most 20; valid and valid_support: the same of others.
    """
    ids = table[task].to_numpy()
    tasks = np.unique(ids)
    order = np.random.default_rng(seed).permutation(tasks)
    ends = int(share * len(tasks)), int((share + valid_share) * len(tasks))
    place, _ = _places(ids)
    parts = {"train": table.filter(~np.isin(ids, order[: ends[1]]))}
    for part, drawn in (("valid", order[ends[0] : ends[1]]), ("test", order[: ends[0]])):
        held = np.isin(ids, drawn)
        if part == "test" or valid_share:
            first_rows = table.filter(held & (place < SUPPORT_ROWS))
            parts[part] = table.filter(held & (place >= SUPPORT_ROWS))
            parts[f"{part}_support"] = support_before(first_rows, parts[part], task, time, ties)
    return parts


def all_users(
    table: pa.Table,
    task: str,
    time: str,
    *,
    share: float = 0.2,
    valid_share: float = 0.1,
    ties: Ties = "excluded",
) -> dict[str, pa.Table]:
    """Cuts off the last rows of every task.

    Args:
      table: rows in order of time.
      task: column of the task.
      time: column of the time.
      share: of each task's rows to cut off for test, rounded down.
      valid_share: of each task's rows before those to cut off for valid; 0 leaves it out.
      ties: as for `new_users`.

    Returns:
      train: each task's first rows; valid: the next; test: its last ones; test_support: the last 20
      rows before those of test, of tasks that have any; valid_support: the same for valid.
    """
    place, count = _places(table[task].to_numpy())
    test_from = count - (share * count).astype(np.int64)
    valid_from = test_from - (valid_share * count).astype(np.int64)
    parts = {"train": table.filter(place < valid_from)}
    for part, first, end in (("valid", valid_from, test_from), ("test", test_from, count)):
        if part == "test" or valid_share:
            parts[part] = table.filter((place >= first) & (place < end))
            before = table.filter(place < first)
            parts[f"{part}_support"] = support_before(before, parts[part], task, time, ties)
    return parts


def next_items(
    table: pa.Table, task: str, time: str, *, ties: Ties = "excluded"
) -> dict[str, pa.Table]:
    """Leaves the last row of every task out, and the last but one.

    Args:
      table: rows in order of time; of equal times the last one counts as last.
      task: column of the task. Those with fewer than three rows are all in train.
      time: column of the time.
      ties: as for `new_users`.

    Returns:
      test: each task's last row; valid: the last but one; train: the others; test_support and
      valid_support: the 20 rows before those.
    """
    place, count = _places(table[task].to_numpy())
    left = np.where(count < 3, 2, count - 1 - place)  # rows of the task that follow
    parts = {
        "train": table.filter(left >= 2),
        "valid": table.filter(left == 1),
        "test": table.filter(left == 0),
    }
    for part, first in (("valid", 2), ("test", 1)):
        before = table.filter((count >= 3) & (left >= first))
        parts[f"{part}_support"] = support_before(before, parts[part], task, time, ties)
    return parts


def new_items(
    table: pa.Table, item: str, *, known: int = 650, least: int = 80, rows: int = 20
) -> dict[str, pa.Table]:
    """Takes the items with few rows for new ones, which a model meets in small batches.

    Args:
      table: rows in order of time.
      item: column of the item.
      known: items with so many rows or more are known.
      least: items with fewer rows are left out.
      rows: of an item in each batch.

    Returns:
      train: the rows of known items; warm_a, warm_b and warm_c: the first, second and third `rows`
      rows of each new item; test: its other rows.

    References: Pan et al. 2019, whose thresholds for MovieLens-1M these are.
    """
    place, count = _places(table[item].to_numpy())
    is_new = (count >= least) & (count < known)
    parts = {"train": table.filter(count >= known)}
    for number, name in enumerate(("warm_a", "warm_b", "warm_c")):
        parts[name] = table.filter(is_new & (place // rows == number))
    return {**parts, "test": table.filter(is_new & (place >= 3 * rows))}


def support_before(
    table: pa.Table, query: pa.Table, task: str, time: str, ties: Ties = "excluded"
) -> pa.Table:
    """The last 20 rows of each task that are older than the task's first row in `query`.

    Args:
      table: rows in order of time, none of which is in `query`.
      query: rows to be scored.
      task: column of the task.
      time: column of the time.
      ties: "by_row" takes all rows of `table` for older, which those that come before `query` in a
        table ordered by time are.
    """
    asked, inverse = np.unique(query[task].to_numpy(), return_inverse=True)
    table = table.filter(np.isin(table[task].to_numpy(), asked))
    if ties == "excluded":
        first = np.full(len(asked), np.iinfo(np.int64).max)
        np.minimum.at(first, inverse, query[time].to_numpy())
        at = np.searchsorted(asked, table[task].to_numpy())
        table = table.filter(table[time].to_numpy() < first[at])
    place, count = _places(table[task].to_numpy())
    return table.filter(place >= count - SUPPORT_ROWS)


def melu(table: pa.Table, user: str, state: str, time: str) -> dict[str, pa.Table]:
    """The cold-start protocol of MeLU: each user's last 10 rows of a random order are to be scored.

    Of each state, users with 13 to 100 rows take part, in order of their ids; a generator seeded
    with 1 for each state permutes the rows of one user after the other.

    Args:
      table: rows in the publisher's order, on which the permutations depend.
      user: column of the user.
      state: column of the state, one of `STATES`.
      time: column of the time. Support may be younger than the rows to be scored.

    Returns:
      train: the support rows of the warm state; test: the last 10 rows of each user and state;
      test_support: the others. They have a column `task` more, int64: the user in the state.

    References: Lee et al. 2019, MeLU: Meta-Learned User Preference Estimator for Cold-Start
    Recommendation. Its code also trains on the warm state's rows to be scored; here they are left
    out. It publishes no seed.
    """
    users, states = table[user].to_numpy().astype(np.int64), table[state].to_numpy()
    task = np.full(len(table), -1)
    is_query = np.zeros(len(table), bool)
    for number, name in enumerate(STATES):
        random = np.random.default_rng(1)
        own = np.flatnonzero(states == name)
        own = own[np.argsort(users[own], kind="stable")]
        for rows in np.split(own, np.flatnonzero(np.diff(users[own])) + 1):
            if 13 <= len(rows) <= 100:
                task[rows] = 10_000 * number + users[rows]
                is_query[rows[random.permutation(len(rows))[-10:]]] = True
    table = table.append_column("task", pa.array(task))
    order = np.argsort(table[time].to_numpy(), kind="stable")
    table, task, is_query, states = (x.take(order) for x in (table, task, is_query, states))
    is_support = (task >= 0) & ~is_query
    return {
        "train": table.filter(is_support & (states == STATES[0])),
        "test": table.filter(is_query),
        "test_support": table.filter(is_support),
    }


def melu_within(
    train: pa.Table, user: str, item: str, *, seed: int = 0, share: float = 0.2
) -> dict[str, pa.Table]:
    """Makes the four states once more within the training rows, to choose an epoch or a size by.

    A share of the users and a share of the items are held out as cold. A third of each user's rows
    in each state, rounded down and drawn at random, is to be scored.

    Args:
      train: as made by `melu`.
      user: column of the user.
      item: column of the item.
      seed: of the draws.
      share: of the users and of the items to hold out.

    Returns:
      fit: the warm rows that are not to be scored; valid: the rows to be scored; valid_support: the
      others. `state` and `task` are written anew.
    """
    random = np.random.default_rng(seed)
    cold = np.zeros((2, len(train)), np.int64)
    for number, column in enumerate((user, item)):
        ids = train[column].to_numpy()
        values = np.unique(ids)
        drawn = random.permutation(values)[: int(share * len(values))]
        cold[number] = np.isin(ids, drawn)
    state = cold[0] + 2 * cold[1]
    task = 10_000 * state + train[user].to_numpy().astype(np.int64)
    order = random.permutation(len(train))
    place, count = np.empty((2, len(train)), np.int64)
    place[order], count[order] = _places(task[order])
    is_query = place < count // 3
    made = train.drop_columns(["state", "task"])
    made = made.append_column("state", pa.array(np.asarray(STATES)[state]))
    made = made.append_column("task", pa.array(task))
    return {
        "fit": made.filter(~is_query & (state == 0)),
        "valid": made.filter(is_query),
        "valid_support": made.filter(~is_query),
    }


def _places(ids: _Rows) -> tuple[_Rows, _Rows]:
    """For each row, how many rows of its task are before it, and how many there are."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    place = np.empty(len(ids), np.int64)
    place[order] = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place, counts[inverse]
