"""Amazon in pairs of departments with the same users."""

from __future__ import annotations

import collections
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qianmo.pipelines.data import readers
from qianmo.pipelines.datasets.tables import read_table, write

HISTORY_LENGTH = 20


def amazon_cdr(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    pair: str,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a pair's rows for retrieval in two domains: one an interaction; `label` is 1.

    The domains are 0 and 1, in the order of the pair's name. Items of the second get ids that
    follow on those of the first, so that an id belongs to one domain. Of each user and domain the
    publisher holds one row out, which is in test if training knows its item; another one, drawn at
    random, is in valid on the same condition. items.parquet has a row for each item of train.

    `bought_0` and `bought_1` hold what else the user bought in each domain: at most 20 items of
    train, as drawn at random, never the row's own.

    Args:
      source: folder with interactions.parquet: pair, domain, user_id, item_id and split, which is
        train, test, or something else for what is left out.
      output: folder to make.
      pair: two names of domains, such as cloth_sport.
      seed: of the draw.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    every = read_table(pathlib.Path(source) / "interactions.parquet")
    rows = every.filter(pc.equal(pc.cast(every["pair"], pa.string()), pair))
    names = pair.split("_")
    domain = pc.index_in(pc.cast(rows["domain"], pa.string()), pa.array(names)).to_numpy()
    if len(names) != 2 or not len(rows) or not np.isin((0, 1), domain).all():
        raise readers.DataError(
            f"{source}: `pair` should name two domains of its rows, such as cloth_sport. "
            f"Received: {pair!r}"
        )
    item = rows["item_id"].to_numpy().astype(np.int64)
    table = pa.table(
        {
            "user_id": rows["user_id"],
            "domain": pa.array(domain, pa.int8()),
            "item_id": pa.array(item + domain * (item[domain == 0].max() + 1)),
            "label": pa.array(np.ones(len(rows), np.int8)),
        }
    )
    split = pc.cast(rows["split"], pa.string())
    train, test = (table.filter(pc.equal(split, name)) for name in ("train", "test"))
    order = np.random.default_rng(seed).permutation(len(train))
    task = 2 * train["user_id"].to_numpy().astype(np.int64) + train["domain"].to_numpy()
    item = train["item_id"].to_numpy()
    is_valid = np.zeros(len(train), bool)
    is_valid[order[np.unique(task[order], return_index=True)[1]]] = True
    is_valid &= np.isin(item, item[~is_valid])
    known = train.take(order[~is_valid[order]])
    bought: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for row in known.to_pylist():
        bought[row["user_id"], row["domain"]].append(row["item_id"])

    def with_bought(rows: pa.Table) -> pa.Table:
        pairs = [*zip(rows["user_id"].to_pylist(), rows["item_id"].to_pylist(), strict=True)]
        for place in (0, 1):
            lists = [[i for i in bought[user, place] if i != own] for user, own in pairs]
            values = pa.array([each[:HISTORY_LENGTH] for each in lists], pa.list_(pa.int64()))
            rows = rows.append_column(f"bought_{place}", values)
        return rows

    _, first = np.unique(item, return_index=True)
    is_known = np.isin(test["item_id"].to_numpy(), item)
    parts = {
        "train": with_bought(train.filter(~is_valid)),
        "valid": with_bought(train.filter(is_valid)),
        "test": with_bought(test.filter(is_known)),
        "items": train.select(["item_id", "domain"]).take(first),
    }
    left_out = {
        "of other pairs": len(every) - len(rows),
        "that the publisher leaves out": len(rows) - len(train) - len(test),
        "to be tested, of items that training does not know": int((~is_known).sum()),
    }
    return write(output, f"amazon_cdr, {pair}", parts, overwrite, left_out=left_out)
