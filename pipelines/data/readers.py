"""Rows of a schema, read from Parquet, TFRecord and CSV files as NumPy blocks or tf.data batches.

A path is one file, a folder of files (shards) or of partition folders, or a glob; see `files`. The
extension tells the format:

| extension | what a row is | a list |
|---|---|---|
| `.parquet` | a row | a list column |
| `.tfrecord` | a `tf.train.Example`, one value a feature | any number of values; none when absent |
| `.csv`, `.csv.gz` | a line under a header line | items between vertical bars; none when empty |

Lists longer than the schema says are cut at the end that it says. Everything else that does not fit
the schema is a `DataError` that names the file, the column and the row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow as tf

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import csv_files, parquet, tfrecord
from qianmo.pipelines.data.batches import batch, labels_and_weights, signature
from qianmo.pipelines.data.columns import Block, Column, Entries, Part, of_schema
from qianmo.pipelines.data.convert import block_of, is_of
from qianmo.pipelines.data.errors import DataError, NoRowsError
from qianmo.pipelines.data.files import DataFile, PathLike, extension, files, has_format, sha256
from qianmo.pipelines.data.keys import task_ids
from qianmo.pipelines.data.shuffling import num_rows, shuffled, taken
from qianmo.pipelines.data.tally import Tally

__all__ = [
    "Block",
    "DataError",
    "NoRowsError",
    "PathLike",
    "Tally",
    "batch",
    "blocks",
    "count_rows",
    "dataset",
    "has_format",
    "is_of",
    "labels_and_weights",
    "num_rows",
    "own_errors",
    "sha256",
    "signature",
    "taken",
    "task_ids",
    "text_block",
]

_DECODED_ROWS = 2**16  # at a time: enough to work in vectors, little beside the shuffle buffer


class _Format(NamedTuple):
    """How the files of one extension are read.

    Attributes:
      parts: checks a file's columns as far as it tells them, and lists its parts.
      read: yields the columns of a part's consecutive rows.
      is_text: whether values come as bytes, still to be parsed.
    """

    parts: Callable[[DataFile, Mapping[str, Column]], list[Part]]
    read: Callable[[Part, Mapping[str, Column], int], Iterator[dict[str, pa.Array]]]
    is_text: bool = False


_CSV = _Format(csv_files.parts, csv_files.read, is_text=True)
_FORMATS = {
    ".parquet": _Format(parquet.parts, parquet.read),
    ".tfrecord": _Format(tfrecord.parts, tfrecord.read),
    ".csv": _CSV,
    ".csv.gz": _CSV,
}


def blocks(
    schema: Schema,
    path: PathLike,
    *,
    seed: int | None = None,
    epoch: int = 0,
    shuffle_rows: int = 2**18,
    shard: tuple[int, int] = (0, 1),
    targets: bool = True,
    gauc: bool = False,
    tally: Tally | None = None,
) -> Iterator[Block]:
    """Reads the schema's columns as NumPy blocks of many rows.

    With a seed, files and row groups come in a random order and their rows pass through a buffer
    of `shuffle_rows` rows, in which new ones take the places of others drawn at random. The order
    depends on `(seed, epoch)` and the files alone, memory on `shuffle_rows` and not on the files.

    Args:
      schema: the columns to read.
      path: a file, a folder or a glob.
      seed: of the shuffle; None reads in file order.
      epoch: another epoch is another order.
      shuffle_rows: rows of the shuffle buffer.
      shard: `(index, count)`: this worker's share of the rows among `count` workers. It is every
        count-th file if there are that many files, else row group, else row.
      targets: whether to read labels, weights, timestamp, event_id, task_id, domain and group,
        which rows to be scored need not have.
      gauc: whether to read the columns of `gauc_by` too.
      tally: counts what is left out, as the rows are read.

    Yields:
      Arrays by column name, of the rows of `schema.only_domains` if any are named: features int64
      `[n]`, bytes (UTF-8, as objects) `[n]` or float32 `[n]`, NaN where there is no value; lists
      `[n, max_length]`, padded at the end with 0 or b"", with `<name>_length` int64 `[n]`; labels
      and weights float32 `[n]`, labels NaN in rows that do not have them; what other domains own,
      as padding; timestamp and event_id int64 `[n]`; task_id and domain int64 or bytes `[n]`, as
      the schema says; group as bytes `[n]`; columns that `gauc_by` alone names as int64 `[n]`. A
      column of several roles is there once, as its first role in this list has it.

    Raises:
      DataError: the data do not fit the schema or cannot be read.
      ValueError: two roles in the schema ask one column for two types.
    """
    if shuffle_rows < 1:
        raise ValueError(f"`shuffle_rows` should be >= 1. Received: {shuffle_rows}")
    columns = of_schema(schema, targets, gauc)
    plan = _plan(columns, path, shard)
    return _blocks(columns, plan, path, seed, epoch, shuffle_rows, tally)


def dataset(
    schema: Schema,
    path: PathLike,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    shuffle_rows: int = 2**18,
    shard: tuple[int, int] = (0, 1),
    skip_batches: int = 0,
    drop_remainder: bool = False,
    gauc: bool = False,
    observe: Callable[[Block], None] | None = None,
    tally: Tally | None = None,
) -> tf.data.Dataset:
    """Reads batches `(features, targets)` for training and evaluation.

    Each iteration gives the same batches bit for bit. A fault of the data that is met in the midst
    of it comes as a `tf.errors.InvalidArgumentError` that holds the `DataError`'s message.

    Args:
      schema: as for `blocks`, and so are path, seed, epoch, shuffle_rows and shard.
      path: the data.
      batch_size: rows a batch.
      seed: of the shuffle.
      epoch: another epoch is another order.
      shuffle_rows: rows of the shuffle buffer.
      shard: this worker's share.
      skip_batches: leaves out that many batches from the start, and changes nothing in the others.
      drop_remainder: whether a last batch of fewer rows is left out.
      gauc: whether targets hold the groups of `gauc_by`, which evaluation alone needs.
      observe: sees each block of rows as it is read, from a thread of tf.data.
      tally: counts what is left out, as the rows are read.

    Returns:
      A dataset whose `features` are the tensors of `schema.input_names` (lists `[B, L]`) and whose
      `targets` are `labels` float32 `[B, K]` in the schema's order, NaN where a row does not have
      the label; `weight` float32 `[B]`, ones if none is declared, times the rows'
      `domain_weights`; and, where declared, `label_weights` float32 `[B, K]` (see there), `task_id`
      int64 `[B]` (names as their `task_key`), `domain` int64 or string `[B]`, `timestamp` and
      `event_id` int64 `[B]`, `group` `[B]`, and `gauc` int64 `[B]` (see `keys.groups`).

    Raises:
      DataError: no such files, or their columns do not fit the schema.
      ValueError: two roles in the schema ask one column for two types.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` should be >= 1. Received: {batch_size}")
    columns = of_schema(schema, gauc=gauc)
    plan = _plan(columns, path, shard)

    def generate() -> Iterator[tuple[Block, Block]]:
        skip = skip_batches * batch_size
        for block in _blocks(columns, plan, path, seed, epoch, shuffle_rows, tally):
            if observe is not None:
                observe(block)
            skipped = min(skip, num_rows(block))
            skip -= skipped
            if skipped == num_rows(block):
                continue
            yield batch(schema, {name: values[skipped:] for name, values in block.items()}, gauc)

    rows = tf.data.Dataset.from_generator(generate, output_signature=signature(schema, gauc))
    return rows.rebatch(batch_size, drop_remainder=drop_remainder).prefetch(tf.data.AUTOTUNE)


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raises a `DataError` that was met inside a `dataset` as itself, out of TensorFlow's wrapping.

    Raises:
      DataError: as met.
    """
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        found = re.search(r"DataError: (.*)", error.message)
        if found is None:
            raise
        raise DataError(found[1]) from None


def count_rows(
    schema: Schema, path: PathLike, *, targets: bool = True, tally: Tally | None = None
) -> int:
    """Counts the rows; Parquet's are written in the files, others are read once.

    Args:
      schema: as for `blocks`, and so are path and targets.
      path: the data.
      targets: whether the rows have labels and the columns that describe them.
      tally: counts the rows that `only_domains` leaves out.
    """
    columns = of_schema(schema, targets)
    plan = _plan(columns, path, (0, 1))
    if schema.only_domains:
        kept = {name: column for name, column in columns.items() if column.tells_domain}
        return sum(map(num_rows, _in_order(kept, plan, path, _DECODED_ROWS, tally)))
    count = 0
    for part in plan.parts:
        if part.metadata is not None:
            count += part.metadata.row_group(part.row_group).num_rows
            continue
        for arrays in _format(part.file).read(part, columns, _DECODED_ROWS):
            count += len(next(iter(arrays.values())))
    return count


def _format(file: DataFile) -> _Format:
    return _FORMATS[extension(file.path)]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The parts a worker reads, and of their rows every `stride`-th from `offset` on."""

    parts: Sequence[Part]
    offset: int = 0
    stride: int = 1


def _plan(columns: Mapping[str, Column], path: PathLike, shard: tuple[int, int]) -> _Plan:
    """Checks the files' columns as far as they tell them, and shares them among workers."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"`shard` should be (index, count), 0 <= index < count. Received: {shard}")
    found = files(path)
    by_file = len(found) >= count
    parts = [part for file in found for part in _format(file).parts(file, columns)]
    if all(p.metadata is not None for p in parts) and not any(
        p.metadata.row_group(p.row_group).num_rows for p in parts
    ):
        raise _no_rows(path)
    if by_file:
        own = {file.path for file in found[index::count]}
        return _Plan([part for part in parts if part.file.path in own])
    if len(parts) >= count:
        return _Plan(parts[index::count])
    return _Plan(parts, index, count)


def _no_rows(path: PathLike) -> NoRowsError:
    return NoRowsError(f"{os.fspath(path)}: no rows. Write the data again, or give another path.")


def _blocks(
    columns: Mapping[str, Column],
    plan: _Plan,
    path: PathLike,
    seed: int | None,
    epoch: int,
    shuffle_rows: int,
    tally: Tally | None = None,
) -> Iterator[Block]:
    if seed is None:
        yield from _in_order(columns, plan, path, _DECODED_ROWS, tally)
        return
    random = np.random.default_rng([seed, epoch])
    parts = [plan.parts[i] for i in random.permutation(len(plan.parts))]
    plan = dataclasses.replace(plan, parts=parts)
    decoded_rows = min(_DECODED_ROWS, shuffle_rows)
    ordered = _in_order(columns, plan, path, decoded_rows, tally)
    yield from shuffled(ordered, random, shuffle_rows)


def _in_order(
    columns: Mapping[str, Column],
    plan: _Plan,
    path: PathLike,
    decoded_rows: int,
    tally: Tally | None,
) -> Iterator[Block]:
    """Yields the plan's rows, checked, in the order of its parts.

    Raises:
      DataError: there are none, or they do not fit the schema.
    """
    empty = none_kept = True
    ordered = _domain_first(columns)
    tally = tally or Tally()
    for part in plan.parts:
        row = part.first_row
        kind = _format(part.file)
        for arrays in kind.read(part, columns, decoded_rows):
            here = dataclasses.replace(part, first_row=row)
            text = arrays if kind.is_text else part.file.partitions
            block = block_of(here, ordered, arrays, text, tally)
            rows = num_rows(block)
            empty = empty and not rows
            if plan.stride > 1:
                own = slice((plan.offset - row) % plan.stride, None, plan.stride)
                block = {name: values[own] for name, values in block.items()}
            row += rows
            tally.rows += num_rows(block)
            if only := ordered[0].only:
                own_rows = np.flatnonzero(is_of(block[ordered[0].name], only))
                tally.of_other_domains += num_rows(block) - len(own_rows)
                block = taken(block, own_rows)
            if num_rows(block):
                none_kept = False
                yield block
    if not empty and none_kept and plan.stride == 1 and ordered[0].only:
        raise NoRowsError(
            f"{os.fspath(path)}: no rows of domains {ordered[0].only}. Give other rows, or name "
            "other domains in `only_domains`."
        )
    if empty:
        raise _no_rows(path)


def _domain_first(columns: Mapping[str, Column]) -> list[Column]:
    """The columns in the order to convert them: the domain says which rows have the others'."""
    return sorted(columns.values(), key=lambda column: not column.tells_domain)


def text_block(
    schema: Schema, source: str, ids: Sequence[str], rows: Sequence[Mapping[bytes, bytes]]
) -> Block:
    """Makes a block of rows that came one by one as text: what `blocks` makes of a CSV's lines.

    Args:
      schema: the columns.
      source: what errors name.
      ids: of the rows, which errors name too.
      rows: column -> value, as UTF-8. A value that is not there is a CSV's empty cell.

    Raises:
      DataError: a row does not fit the schema.
    """
    columns = of_schema(schema)
    arrays = {}
    for name, column in columns.items():
        key = name.encode()
        cells = pa.array([row.get(key) for row in rows], pa.binary())
        arrays[name] = csv_files.split(cells) if column.max_length else cells
    part = Entries(DataFile(pathlib.Path(source)), ids=ids)
    return block_of(part, _domain_first(columns), arrays, arrays, Tally())
