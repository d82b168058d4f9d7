"""Catalogues of items that lack some, or hold one twice."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qianmo.layers.features import Categorical
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import catalogue, readers

INTEGERS = Categorical(name="item", side="item")
STRINGS = dataclasses.replace(INTEGERS, dtype="string")


def write(file: pathlib.Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), file, row_group_size=2)
    return str(file)


@pytest.mark.parametrize("item", [INTEGERS, STRINGS], ids=["integers", "strings"])
def test_a_row_whose_item_is_missing_is_named(tmp_path: pathlib.Path, item: Categorical) -> None:
    schema = Schema(features=(item,), labels=("y",))
    names = [*map(str, range(9))] if item.dtype == "string" else [*range(9)]
    items = write(tmp_path / "items.parquet", item=names[:5])
    # The items of rows that are no positives need not be there.
    good = write(tmp_path / "good.parquet", item=[names[i] for i in (4, 0, 7)], y=[1, 1, 0])
    catalogue.check(schema, item, items, [good])
    bad = [names[i] for i in (0, 7, 1, 8, 2, 6)]
    bad_rows = write(tmp_path / "bad.parquet", item=bad, y=[1, 0, 1, 1, 1, 1])
    with pytest.raises(readers.DataError) as error:
        catalogue.check(schema, item, items, [good, bad_rows])
    assert str(error.value) == (
        f"{bad_rows}, column `item`, row 3 (counted from 0): item 8 is not in the catalogue "
        f"{items}, nor are those of 1 other rows. Add them there, or leave the rows out."
    )
    twice = write(tmp_path / "twice.parquet", item=[*names[:5], names[3]])
    with pytest.raises(readers.DataError, match=r"twice\.parquet, column `item`: item 3 stands th"):
        catalogue.check(schema, item, twice, [good])


def test_rows_that_are_not_read_are_not_checked(tmp_path: pathlib.Path) -> None:
    item = dataclasses.replace(INTEGERS, domains=("shop",))
    scene = Categorical(name="scene", dtype="string", vocabulary=("shop", "feed"))
    schema = Schema(
        features=(item, scene),
        labels=("y",),
        domain="scene",
        only_domains=("shop",),
        label_domains={"y": ("shop",)},
        task_id="user",
        weight="w",
    )
    items = write(tmp_path / "items.parquet", item=[1, 2])
    columns = {"item": [None, 1, None, 2], "scene": ["feed", "shop", "feed", "shop"]}
    rows = write(tmp_path / "rows.parquet", **columns, y=[None, 1, None, 1])
    catalogue.check(schema, item, items, [rows])
    columns["item"][3] = 5
    rows = write(tmp_path / "rows.parquet", **columns, y=[None, 1, None, 1])
    with pytest.raises(readers.DataError, match=r"row 3 \(counted from 0\): item 5 is not in"):
        catalogue.check(schema, item, items, [rows])
