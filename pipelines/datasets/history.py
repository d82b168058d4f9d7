"""What a task's earlier rows say of it, as columns: the means that a learner must be better than.

Of the last rows known of a task, newest last (at most 20):

  <prefix>_liked, <prefix>_disliked: lists of their items, label above and below 1/2
  <prefix>_rate: (sum of labels + 5 r) / (rows + 5), with r a rate given
  <prefix>_count: log(1 + rows)

A row sees rows of strictly earlier time alone, so never its own label or one of the same time. With
the lists in the items' table and mean pooling, a model gets the mean vectors of liked and disliked
items; `configs/history.py` has the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from qianmo.pipelines.datasets.protocols import SUPPORT_ROWS, Ties

RANDOM_SIZES = (0, 1, 2, 3, 5, 8, 12, 20)
_PRIOR_ROWS = 5

_Rows = npt.NDArray[Any]


def add(
    parts: Mapping[str, pa.Table],
    *,
    task: str,
    item: str,
    label: str,
    time: str,
    rate: float,
    sizes: Sequence[int] = (SUPPORT_ROWS,),
    seed: int = 0,
    ties: Ties = "excluded",
    prefix: str = "history",
) -> dict[str, pa.Table]:
    """Adds the columns to all parts of a split.

    A part that has a support part (`test`, `test_support`) sees that support alone. The others,
    `train` and the supports themselves, see their own earlier rows.

    Args:
      parts: tables in order of time, by name.
      task: column of the task.
      item: column of the item.
      label: column of the label, in [0, 1].
      time: column of the time: rows see those of earlier times. Labels that are known later, such
        as on the next day, take a column of that period, in which rows do not see each other.
      rate: r, a constant of the data set.
      sizes: how many rows a row of `train` sees at most is drawn from these, so that a model meets
        tasks with little history too.
      seed: of that draw.
      ties: "by_row" lets rows also see those of their own time that stand before them.
      prefix: of the columns.

    Returns:
      The parts with four columns more.
    """
    columns: dict[str, Any] = {"task": task, "item": item, "label": label}
    made = {}
    for name, table in parts.items():
        if f"{name}_support" in parts:
            made[name] = from_support(
                table, parts[f"{name}_support"], **columns, rate=rate, prefix=prefix
            )
        else:
            made[name] = from_earlier_rows(
                table,
                **columns,
                rate=rate,
                time=time,
                sizes=(SUPPORT_ROWS,) if name.endswith("_support") else sizes,
                seed=seed,
                ties=ties,
                prefix=prefix,
            )
    return made


def from_support(
    table: pa.Table,
    support: pa.Table,
    *,
    task: str,
    item: str,
    label: str,
    rate: float,
    rows: int = SUPPORT_ROWS,
    prefix: str = "history",
) -> pa.Table:
    """Adds what the last `rows` support rows of its task say to each row; see `add`."""
    order = np.argsort(support[task].to_numpy(), kind="stable")
    known = support[task].to_numpy()[order]
    ids = table[task].to_numpy()
    stops = np.searchsorted(known, ids, "right")
    starts = np.maximum(np.searchsorted(known, ids, "left"), stops - rows)
    return _with_columns(table, support.take(order), (starts, stops), item, label, rate, prefix)


def from_earlier_rows(
    table: pa.Table,
    *,
    task: str,
    item: str,
    label: str,
    time: str,
    rate: float,
    sizes: Sequence[int] = (SUPPORT_ROWS,),
    seed: int = 0,
    ties: Ties = "excluded",
    prefix: str = "history",
) -> pa.Table:
    """Adds what the earlier rows of its task say to each row; see `add`."""
    order, starts, stops = _earlier(table, task, time, ties)
    most = np.random.default_rng(seed).choice(np.asarray(sizes), len(table))
    starts = np.maximum(starts, stops - most)
    return _with_columns(table, table.take(order), (starts, stops), item, label, rate, prefix)


def last_items(
    table: pa.Table,
    *,
    task: str,
    item: str,
    time: str,
    rows: int,
    name: str,
    ties: Ties = "excluded",
) -> pa.Table:
    """Adds a list of the items of a task's `rows` rows before each row, oldest first.

    Args:
      table: rows in order of time.
      task: column of the task.
      item: column of the item.
      time: column of the time: rows see those of earlier times.
      rows: most items of a list.
      name: of the column.
      ties: "by_row" lets rows also see those of their own time that stand before them.
    """
    order, starts, stops = _earlier(table, task, time, ties)
    starts = np.maximum(starts, stops - rows)
    lists = _lists(table[item].to_numpy()[order], starts, stops - starts)
    return table.append_column(name, lists)


def _earlier(table: pa.Table, task: str, time: str, ties: Ties) -> tuple[_Rows, _Rows, _Rows]:
    """An order of the rows by task and time, and where in it each row's earlier ones are.

    Rows of equal task and time stay in the table's order.
    """
    place = np.arange(len(table))
    ids, times = table[task].to_numpy(), table[time].to_numpy()
    order = np.lexsort((times, ids))
    ids, times = ids[order], times[order]
    is_first = np.append(True, ids[1:] != ids[:-1])
    opens = is_first | np.append(True, times[1:] != times[:-1])
    if ties == "by_row":
        opens = np.ones_like(opens)
    stops, starts = np.empty_like(place), np.empty_like(place)
    stops[order] = np.maximum.accumulate(np.where(opens, place, 0))
    starts[order] = np.maximum.accumulate(np.where(is_first, place, 0))
    return order, starts, stops


def _lists(items: _Rows, first: _Rows, lengths: _Rows) -> pa.Array:
    """For each row, the items from place `first` on."""
    offsets = np.append(0, np.cumsum(lengths))
    flat = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], lengths)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items[flat])


def _with_columns(
    table: pa.Table,
    source: pa.Table,
    spans: tuple[_Rows, _Rows],
    item: str,
    label: str,
    rate: float,
    prefix: str,
) -> pa.Table:
    """Adds what rows `starts` to `stops` of the source say to each row of the table."""
    starts, stops = spans
    items, labels = source[item].to_numpy(), source[label].to_numpy().astype(np.float64)
    sums = np.append(0, np.cumsum(labels))
    counts = stops - starts
    rates = (sums[stops] - sums[starts] + _PRIOR_ROWS * rate) / (counts + _PRIOR_ROWS)
    for name, chosen in (("liked", labels > 0.5), ("disliked", labels < 0.5)):
        before = np.append(0, np.cumsum(chosen))
        first, lengths = before[starts], before[stops] - before[starts]
        lists = _lists(items[chosen], first, lengths)
        table = table.append_column(f"{prefix}_{name}", lists)
    table = table.append_column(f"{prefix}_rate", pa.array(rates.astype(np.float32)))
    return table.append_column(f"{prefix}_count", pa.array(np.log1p(counts).astype(np.float32)))
