"""Rows of a schema, read from Parquet, TFRecord and CSV files as NumPy blocks or tf.data batches.

A path is one file, a folder of files (shards) or a glob. The extension tells the format:

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
import csv
import dataclasses
import difflib
import glob
import hashlib
import io
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import tensorflow as tf
from google.protobuf.message import DecodeError

from qianmo.layers.features import Dense, Keep
from qianmo.layers.schema import Domain, Schema

Block = dict[str, npt.NDArray[Any]]
PathLike = str | os.PathLike[str]

_DECODED_ROWS = 2**16  # at a time: enough to work in vectors, little beside the shuffle buffer
_CSV_BYTES = 2**22


class DataError(ValueError):
    """Data that does not fit the schema, or cannot be read.

    Rows in its message are counted from 0 within the file, without a CSV's header line.
    """


class NoRowsError(DataError):
    """Files that can be read, and hold no rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Column:
    """What a column should hold.

    Attributes:
      any_key: whether integers are also taken for the strings that `dtype` asks for.
      low, high: bounds of float32 values, themselves allowed.
      tells_domain: whether it is the column of the rows' domains.
      only: ids of the domains whose rows are kept; empty for all. Of the domains' column.
      owners: ids of the domains whose rows have a value; empty for all.
      is_label: whether values in rows of other domains are passed over instead of refused.
    """

    name: str
    dtype: Literal["int64", "string", "float32"]
    max_length: int = 0
    keep: Keep = "last"
    any_key: bool = False
    low: float = -math.inf
    high: float = math.inf
    tells_domain: bool = False
    only: tuple[Domain, ...] = ()
    owners: tuple[Domain, ...] = ()
    is_label: bool = False

    @property
    def expected(self) -> str:
        kind = "string or int64" if self.any_key else self.dtype
        return f"a list of {kind}" if self.max_length else kind


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is read in one go: a file, or a row group of a Parquet file."""

    file: pathlib.Path
    first_row: int = 0
    row_group: int = 0
    metadata: Any = None

    def error(self, column: str, row: int, fault: str) -> DataError:
        return DataError(f"{self.file}, column `{column}`, row {row} (counted from 0): {fault}")


@dataclasses.dataclass(frozen=True)
class _Entries(_Part):
    """Rows that came one by one, each with an id of its own, from what `file` names."""

    ids: Sequence[str] = ()

    def error(self, column: str, row: int, fault: str) -> DataError:
        return DataError(f"{self.file}, entry {self.ids[row]}, column `{column}`: {fault}")


# A reader yields the columns of consecutive rows; CSV's come as the bytes between the commas.
_Reader = Callable[[_Part, Mapping[str, _Column], int], Iterator[dict[str, pa.Array]]]


def blocks(
    schema: Schema,
    path: PathLike,
    *,
    seed: int | None = None,
    epoch: int = 0,
    shuffle_rows: int = 2**18,
    shard: tuple[int, int] = (0, 1),
    targets: bool = True,
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
      targets: whether to read labels, weight, timestamp, task_id, domain and group, which rows to
        be scored need not have.

    Yields:
      Arrays by column name, of the rows of `schema.only_domains` if any are named: features int64
      `[n]`, bytes (UTF-8, as objects) `[n]` or float32 `[n]`; lists `[n, max_length]`, padded at
      the end with 0 or b"", with `<name>_length` int64 `[n]`; labels and weight float32 `[n]`,
      labels NaN in rows whose domain does not have them; what other domains own, as padding;
      timestamp, task_id and domain int64 `[n]`; group as bytes `[n]`, unless its column is also
      one of the int64 columns above.

    Raises:
      DataError: the data do not fit the schema or cannot be read.
      ValueError: two roles in the schema ask one column for two types.
    """
    if shuffle_rows < 1:
        raise ValueError(f"`shuffle_rows` should be >= 1. Received: {shuffle_rows}")
    columns = _columns(schema, targets)
    return _blocks(columns, _plan(columns, path, shard), path, seed, epoch, shuffle_rows)


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

    Returns:
      A dataset whose `features` are the tensors of `schema.input_names` (lists `[B, L]`) and whose
      `targets` are `labels` float32 `[B, K]` in the schema's order, `weight` float32 `[B]` (ones
      if none is declared, times the rows' `domain_weights`) and, where declared, `task_id`,
      `domain`, `timestamp` int64 `[B]` and `group` `[B]`.

    Raises:
      DataError: no such files, or their columns do not fit the schema.
      ValueError: two roles in the schema ask one column for two types.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` should be >= 1. Received: {batch_size}")
    columns = _columns(schema)
    plan = _plan(columns, path, shard)

    def generate() -> Iterator[tuple[Block, Block]]:
        skip = skip_batches * batch_size
        for block in _blocks(columns, plan, path, seed, epoch, shuffle_rows):
            skipped = min(skip, num_rows(block))
            skip -= skipped
            if skipped == num_rows(block):
                continue
            yield batch(schema, {name: values[skipped:] for name, values in block.items()})

    rows = tf.data.Dataset.from_generator(generate, output_signature=signature(schema))
    return rows.rebatch(batch_size, drop_remainder=drop_remainder).prefetch(tf.data.AUTOTUNE)


def batch(schema: Schema, block: Block) -> tuple[Block, Block]:
    """The features and targets of a block, as `dataset` gives them."""
    labels = np.stack([block[name] for name in schema.labels], axis=1)
    weight = block[schema.weight] if schema.weight else np.ones(len(labels), np.float32)
    for domain, factor in schema.domain_weights:
        weight = np.where(block[schema.domain] == domain, np.float32(factor) * weight, weight)
    features = {name: block[name] for name in schema.input_names}
    targets = {role: block[name] for role, name in _roles(schema).items()}
    return features, {"labels": labels, "weight": weight, **targets}


def signature(schema: Schema) -> tuple[dict[str, tf.TensorSpec], dict[str, tf.TensorSpec]]:
    """The types and shapes of `batch`, with any number of rows."""
    columns = _columns(schema)

    def spec(column: _Column) -> tf.TensorSpec:
        shape = [None, column.max_length] if column.max_length else [None]
        return tf.TensorSpec(shape, tf.as_dtype(column.dtype))

    lengths = [f.length_name for f in schema.categorical if f.is_list]
    return (
        {
            **{feature.name: spec(columns[feature.name]) for feature in schema.features},
            **{name: tf.TensorSpec([None], tf.int64) for name in lengths},
        },
        {
            "labels": tf.TensorSpec([None, len(schema.labels)], tf.float32),
            "weight": tf.TensorSpec([None], tf.float32),
            **{role: spec(columns[name]) for role, name in _roles(schema).items()},
        },
    )


def _roles(schema: Schema) -> dict[str, str]:
    """The columns that describe a row, where declared."""
    roles = ("task_id", "domain", "timestamp", "group")
    return {role: getattr(schema, role) for role in roles if getattr(schema, role)}


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


def count_rows(schema: Schema, path: PathLike, *, targets: bool = True) -> int:
    """Counts the rows; Parquet's are written in the files, others are read once."""
    columns = _columns(schema, targets)
    plan = _plan(columns, path, (0, 1))
    if schema.only_domains:
        kept = {name: column for name, column in columns.items() if column.tells_domain}
        return sum(map(num_rows, _in_order(kept, plan, path, _DECODED_ROWS)))
    count = 0
    for part in plan.parts:
        if part.metadata is not None:
            count += part.metadata.row_group(part.row_group).num_rows
            continue
        for arrays in _reader(part.file)(part, columns, _DECODED_ROWS):
            count += len(next(iter(arrays.values())))
    return count


def sha256(path: PathLike) -> str:
    """Hash of the files' bytes, one file after the other in the order of their names."""
    digest = hashlib.sha256()
    for file in files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()


def _columns(schema: Schema, targets: bool = True) -> dict[str, _Column]:
    """The columns that the schema's features and, with `targets`, its other roles ask for."""
    found: dict[str, _Column] = {}

    def add(column: _Column, role: str) -> None:
        first = found.setdefault(column.name, column)
        if first.expected != column.expected:
            raise ValueError(
                f"column `{column.name}` should be of one type. Received: {first.expected} and, "
                f"as the {role}, {column.expected}; copy it under another name."
            )
        low, high = max(first.low, column.low), min(first.high, column.high)
        found[column.name] = dataclasses.replace(
            first,
            low=low,
            high=high,
            tells_domain=first.tells_domain or column.tells_domain,
            only=first.only or column.only,
            owners=first.owners if first.owners == column.owners else (),
        )

    for feature in schema.features:
        if isinstance(feature, Dense):
            add(_Column(name=feature.name, dtype="float32", owners=feature.domains), "feature")
        else:
            column = _Column(
                name=feature.name,
                dtype=feature.dtype,
                max_length=feature.max_length,
                keep=feature.keep,
                tells_domain=feature.name == schema.domain,
                owners=feature.domains,
            )
            add(column, "feature")
    if not targets:
        return found
    for label in schema.labels:
        owners = schema.label_domains.get(label, ())
        column = _Column(
            name=label, dtype="float32", low=0.0, high=1.0, owners=owners, is_label=True
        )
        add(column, "label")
    if schema.weight:
        add(_Column(name=schema.weight, dtype="float32", low=0.0), "weight")
    for role in ("timestamp", "task_id"):
        if name := getattr(schema, role):
            add(_Column(name=name, dtype="int64"), role)
    if schema.domain:
        column = _Column(
            name=schema.domain, dtype="int64", tells_domain=True, only=schema.only_domains
        )
        add(column, "domain")
    if schema.group and getattr(found.get(schema.group), "expected", "") not in ("int64", "string"):
        add(_Column(name=schema.group, dtype="string", any_key=True), "group")
    for feature in schema.categorical:
        if feature.is_list and feature.length_name in found:
            raise ValueError(
                f"column `{feature.length_name}` is the length of the list `{feature.name}`; "
                "rename the column."
            )
    return found


def files(path: PathLike) -> list[pathlib.Path]:
    """The data files at `path`, by name.

    Raises:
      DataError: there is none.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        listed = [file for file in pathlib.Path(name).iterdir() if has_format(file)]
        hint = f"The folder holds no file that ends in {', '.join(_READERS)}."
    elif os.path.isfile(name):
        listed = [pathlib.Path(name)]
        hint = ""
    else:
        listed = [pathlib.Path(file) for file in glob.glob(name, recursive=True)]
        hint = "There is no such file, folder or glob; check the path."
    if not listed:
        raise DataError(f"{name}: no data. {hint}")
    for file in listed:
        _reader(file)
    return sorted(listed)


def has_format(file: pathlib.Path) -> bool:
    """Whether a file's name says that it holds rows; hidden ones and `_...` do not."""
    return file.name.endswith(tuple(_READERS)) and not file.name.startswith((".", "_"))


def _reader(file: pathlib.Path) -> _Reader:
    for extension, reader in _READERS.items():
        if file.name.endswith(extension):
            return reader
    raise DataError(
        f"{file}: its name should end in one of {', '.join(_READERS)}, which tells the format. "
        "Rename or convert it."
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The parts a worker reads, and of their rows every `stride`-th from `offset` on."""

    parts: Sequence[_Part]
    offset: int = 0
    stride: int = 1


def _plan(columns: Mapping[str, _Column], path: PathLike, shard: tuple[int, int]) -> _Plan:
    """Checks the files' columns as far as they tell them, and shares them among workers."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"`shard` should be (index, count), 0 <= index < count. Received: {shard}")
    found = files(path)
    by_file = len(found) >= count
    parts = [part for file in found for part in _parts(file, columns)]
    if all(p.metadata is not None for p in parts) and not any(
        p.metadata.row_group(p.row_group).num_rows for p in parts
    ):
        raise _no_rows(path)
    if by_file:
        own = set(found[index::count])
        return _Plan([part for part in parts if part.file in own])
    if len(parts) >= count:
        return _Plan(parts[index::count])
    return _Plan(parts, index, count)


def _no_rows(path: PathLike) -> NoRowsError:
    return NoRowsError(f"{os.fspath(path)}: no rows. Write the data again, or give another path.")


def _parts(file: pathlib.Path, columns: Mapping[str, _Column]) -> list[_Part]:
    """The parts of a file, its columns' names checked and, if it gives any, their types."""
    if file.name.endswith(".tfrecord"):
        _tfrecord_kinds(file, columns)
        return [_Part(file)]
    if not file.name.endswith(".parquet"):
        _check_names(file, _csv_header(file), columns)
        return [_Part(file)]
    with _readable(file, "Parquet"):
        opened = pq.ParquetFile(file)
    _check_names(file, opened.schema_arrow.names, columns)
    # The types of a shard without rows mean nothing, and writers get them wrong.
    present = [c for c in columns.values() if c.name in opened.schema_arrow.names]
    for column in present if opened.metadata.num_rows else ():
        _check_type(_Part(file), column, opened.schema_arrow.field(column.name).type)
    parts = []
    row = 0
    for group in range(opened.num_row_groups):
        parts.append(_Part(file, row, group, opened.metadata))
        row += opened.metadata.row_group(group).num_rows
    return parts


def _blocks(
    columns: Mapping[str, _Column],
    plan: _Plan,
    path: PathLike,
    seed: int | None,
    epoch: int,
    shuffle_rows: int,
) -> Iterator[Block]:
    if seed is None:
        yield from _in_order(columns, plan, path, _DECODED_ROWS)
        return
    random = np.random.default_rng([seed, epoch])
    parts = [plan.parts[i] for i in random.permutation(len(plan.parts))]
    plan = dataclasses.replace(plan, parts=parts)
    decoded_rows = min(_DECODED_ROWS, shuffle_rows)
    yield from _shuffled(_in_order(columns, plan, path, decoded_rows), random, shuffle_rows)


def _in_order(
    columns: Mapping[str, _Column], plan: _Plan, path: PathLike, decoded_rows: int
) -> Iterator[Block]:
    """Yields the plan's rows, checked, in the order of its parts.

    Raises:
      DataError: there are none, or they do not fit the schema.
    """
    empty = none_kept = True
    ordered = _domain_first(columns)
    for part in plan.parts:
        row = part.first_row
        is_text = part.file.name.endswith((".csv", ".csv.gz"))
        for arrays in _reader(part.file)(part, columns, decoded_rows):
            here = dataclasses.replace(part, first_row=row)
            block = _block(here, ordered, arrays, is_text)
            rows = num_rows(block)
            empty = empty and not rows
            if plan.stride > 1:
                own = slice((plan.offset - row) % plan.stride, None, plan.stride)
                block = {name: values[own] for name, values in block.items()}
            row += rows
            if only := ordered[0].only:
                block = taken(block, np.flatnonzero(np.isin(block[ordered[0].name], only)))
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


def _domain_first(columns: Mapping[str, _Column]) -> list[_Column]:
    """The columns in the order to convert them: the domain says which rows have the others'."""
    return sorted(columns.values(), key=lambda column: not column.tells_domain)


def _block(
    part: _Part, ordered: Sequence[_Column], arrays: Mapping[str, pa.Array], is_text: bool
) -> Block:
    """Checks consecutive rows' columns and makes them a block."""
    block: Block = {}
    domain: npt.NDArray[np.int64] | None = None
    for column in ordered:
        block.update(_convert(part, column, arrays[column.name], is_text, domain))
        if column.tells_domain:
            domain = block[column.name]
    return block


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
    columns = _columns(schema)
    arrays = {}
    for name, column in columns.items():
        key = name.encode()
        cells = pa.array([row.get(key) for row in rows], pa.binary())
        arrays[name] = _split(cells) if column.max_length else cells
    return _block(_Entries(pathlib.Path(source), ids=ids), _domain_first(columns), arrays, True)


def _shuffled(
    ordered: Iterable[Block], random: np.random.Generator, shuffle_rows: int
) -> Iterator[Block]:
    """Passes rows through a buffer: new ones take the places of as many drawn at random."""
    ordered = iter(ordered)
    first: list[Block] = []
    while sum(map(num_rows, first)) < shuffle_rows and (block := next(ordered, None)):
        first.append(block)
    if not first:
        return
    # A column at a time, so that the rows are not held twice.
    buffer = {name: np.concatenate([block.pop(name) for block in first]) for name in [*first[0]]}
    size = num_rows(buffer)
    for block in ordered:
        for start in range(0, num_rows(block), size):
            new = {name: values[start : start + size] for name, values in block.items()}
            places = random.choice(size, num_rows(new), replace=False)
            yield taken(buffer, places)
            for name, values in new.items():
                buffer[name][places] = values
    yield taken(buffer, random.permutation(size))


def taken(block: Block, rows: npt.NDArray[np.int64]) -> Block:
    """Some rows of a block."""
    return {name: values[rows] for name, values in block.items()}


def num_rows(block: Block) -> int:
    """How many rows a block has."""
    return len(next(iter(block.values()), ()))


@contextlib.contextmanager
def _readable(file: pathlib.Path, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises on a bad file into a `DataError`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(
            f"{file}: cannot be read as {kind}: {reason}. It is empty, truncated or corrupt; "
            "write it again."
        ) from error


def _check_names(file: pathlib.Path, names: Sequence[str], columns: Mapping[str, _Column]) -> None:
    for name, column in columns.items():
        if name not in names:
            if column.owners:
                continue  # a file of other domains' rows
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it holds: {', '.join(names)}."
            raise DataError(
                f"{file}: no column `{name}`; {hint} Add it to the file or take it out of the "
                "schema."
            )
        if names.count(name) > 1:
            raise DataError(f"{file}: column `{name}` is there twice; rename one of the two.")


def _is_list(found: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    )


def _is_string(found: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(found)
        or types.is_large_string(found)
        or types.is_string_view(found)
        or types.is_binary(found)
        or types.is_large_binary(found)
    )


def _check_type(part: _Part, column: _Column, found: pa.DataType) -> None:
    """Checks the type that a file gives to a column; CSV gives none."""
    if pa.types.is_null(found) and column.owners:
        return  # no row of this file has one
    value = found
    if _is_list(found) == bool(column.max_length):
        value = found.value_type if _is_list(found) else found
        if pa.types.is_dictionary(value):
            value = value.value_type
        is_int = pa.types.is_integer(value) or pa.types.is_boolean(value)
        fits = {
            "int64": is_int,
            "string": _is_string(value) or (column.any_key and pa.types.is_integer(value)),
            "float32": is_int or pa.types.is_floating(value),
        }
        if fits[column.dtype] or pa.types.is_null(value):
            return
    fault = f"should be {column.expected}. Found: {found} in the whole column. Convert it"
    raise part.error(column.name, part.first_row, f"{fault}, or declare it so.")


def _convert(
    part: _Part,
    column: _Column,
    array: pa.Array,
    is_text: bool,
    domain: npt.NDArray[np.int64] | None,
) -> Block:
    """Checks a column's values and makes them NumPy arrays.

    Args:
      part: where they come from; its `first_row` is that of the array's first value.
      column: what they should be.
      array: the values.
      is_text: whether they are a CSV's, still to be parsed.
      domain: of the rows, where it is known.
    """
    if not is_text:
        _check_type(part, column, array.type)
    rows = np.arange(len(array))
    if not column.owners or domain is None:  # what has owners has a column of domains beside it
        return _converted(part, column, array, is_text, rows)
    if column.max_length and pa.types.is_null(array.type):
        array = pa.nulls(len(array), pa.list_(pa.null()))
    own = np.isin(domain, column.owners)
    is_given = pc.is_valid(array).to_numpy(zero_copy_only=False)
    if column.max_length:
        is_given &= pc.fill_null(pc.list_value_length(array), 0).to_numpy() > 0
    foreign = is_given & ~own
    if foreign.any() and not column.is_label:
        row = int(np.argmax(foreign))
        raise part.error(
            column.name,
            part.first_row + row,
            f"belongs to domains {column.owners} and should be absent from a row of domain "
            f"{domain[row]}. Received: {array[row].as_py()!r}. Leave it empty, or let the "
            "feature's `domains` name that domain.",
        )
    found = _converted(part, column, array.filter(pa.array(own)), is_text, rows[own])
    block = {}
    for name, values in found.items():
        fill = math.nan if column.is_label else b"" if values.dtype == object else 0
        block[name] = np.full((len(array), *values.shape[1:]), fill, values.dtype)
        block[name][own] = values
    return block


def _converted(
    part: _Part, column: _Column, array: pa.Array, is_text: bool, rows: npt.NDArray[np.int64]
) -> Block:
    """Checks a column's values, of the part's `rows`, and makes them NumPy arrays."""
    if array.null_count:
        row = part.first_row + int(rows[pc.index(pc.is_null(array), True).as_py()])
        raise part.error(column.name, row, "is null or absent. Give it a value.")
    if not column.max_length:
        return {column.name: _values(part, column, array, is_text, rows)}

    lengths = pc.list_value_length(array).to_numpy().astype(np.int64)
    flat = pc.list_flatten(array)
    ends = np.cumsum(lengths)
    if flat.null_count:
        value = pc.index(pc.is_null(flat), True).as_py()
        row = part.first_row + int(rows[np.searchsorted(ends, value, side="right")])
        raise part.error(column.name, row, "its list holds a null. Leave it out of the list.")
    values = _values(part, column, flat, is_text, np.repeat(rows, lengths))
    kept = np.minimum(lengths, column.max_length)
    starts = ends - (kept if column.keep == "last" else lengths)
    padded = np.full(
        (len(array), column.max_length), b"" if column.dtype == "string" else 0, values.dtype
    )
    place = np.arange(column.max_length)
    is_value = place < kept[:, None]
    padded[is_value] = values[(starts[:, None] + place)[is_value]]
    return {column.name: padded, f"{column.name}_length": kept}


def _values(
    part: _Part, column: _Column, array: pa.Array, is_text: bool, rows: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Checks flat values, `rows[i]` being the row of value i, and makes them a NumPy array."""

    def cast(values: pa.Array, dtype: pa.DataType) -> pa.Array:
        try:
            return values.cast(dtype)
        except pa.ArrowInvalid:
            i = _first_uncastable(values, dtype)
            raise fault(
                i, f"should be {column.expected}. Received: {values[i].as_py()!r}"
            ) from None

    def fault(i: int, text: str) -> DataError:
        row = part.first_row + int(rows[i])
        return part.error(column.name, row, f"{text}. Correct the value or leave the row out.")

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_text or column.dtype == "string":
        array = cast(array, pa.string())
    if column.dtype == "string":
        # A batch has few distinct strings: each becomes one Python object.
        encoded = array.dictionary_encode()
        distinct = encoded.dictionary.cast(pa.binary()).to_numpy(zero_copy_only=False)
        return np.asarray(distinct[encoded.indices.to_numpy()])
    if column.dtype == "int64":
        return np.asarray(cast(array, pa.int64()).to_numpy(zero_copy_only=False))

    if is_text:
        array = cast(array, pa.float64())
    values = np.asarray(array.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False))
    with np.errstate(invalid="ignore"):
        fits = np.isfinite(values) & (values >= column.low) & (values <= column.high)
    if not fits.all():
        i = int(np.argmin(fits))
        expected = "a finite number"
        if column.high < math.inf:
            expected = f"in [{column.low:g}, {column.high:g}]"
        elif column.low > -math.inf:
            expected = f"finite and >= {column.low:g}"
        raise fault(i, f"should be {expected}. Received: {array[i].as_py()}")
    return values


def _first_uncastable(values: pa.Array, dtype: pa.DataType) -> int:
    """Index of the first value that does not cast; there is one."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values.slice(low, middle - low).cast(dtype)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _read_parquet(
    part: _Part, columns: Mapping[str, _Column], decoded_rows: int
) -> Iterator[dict[str, pa.Array]]:
    # Without pre_buffer and with a buffer size, a row group of any size streams page by page.
    with _readable(part.file, "Parquet"):
        file = pq.ParquetFile(
            part.file,
            metadata=part.metadata,
            buffer_size=2**18,
            pre_buffer=False,
            page_checksum_verification=True,
        )
        names = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(
            decoded_rows, row_groups=[part.row_group], columns=names, use_threads=False
        ):
            absent = dict.fromkeys(columns, pa.nulls(len(batch)))
            yield absent | {name: batch.column(name) for name in names}


def _csv_header(file: pathlib.Path) -> list[str]:
    with _readable(file, "CSV"), pa.input_stream(str(file)) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
        header = next(csv.reader(text), None)
    if header is None:
        raise DataError(f"{file}: empty, without even the header line that names the columns.")
    return header


def _read_csv(
    part: _Part, columns: Mapping[str, _Column], decoded_rows: int
) -> Iterator[dict[str, pa.Array]]:
    del decoded_rows  # a block has a size in bytes
    header = _csv_header(part.file)
    names = [name for name in columns if name in header]
    with _readable(part.file, "CSV"), _equal_rows(part.file) as remember:
        reader = pa_csv.open_csv(
            str(part.file),
            read_options=pa_csv.ReadOptions(use_threads=False, block_size=_CSV_BYTES),
            parse_options=pa_csv.ParseOptions(
                newlines_in_values=True, invalid_row_handler=remember
            ),
            # An empty cell is a null; "" in quotes is an empty string.
            convert_options=pa_csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.binary()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        for batch in reader:
            absent = dict.fromkeys(columns, pa.nulls(len(batch), pa.binary()))
            arrays = absent | {name: batch.column(name) for name in names}
            for name, column in columns.items():
                if column.max_length:
                    arrays[name] = _split(arrays[name])
            yield arrays


@contextlib.contextmanager
def _equal_rows(file: pathlib.Path) -> Iterator[Callable[[Any], str]]:
    """Gives a handler of rows with too few or too many cells, and raises the error that names one.

    What a handler itself raises, pyarrow would only print.
    """
    invalid = []

    def remember(row: Any) -> str:
        invalid.append(row)
        return "error"

    try:
        yield remember
    except pa.ArrowInvalid:
        if not invalid:
            raise
        row = invalid[0]
        raise DataError(
            f"{file}, row {row.number - 2} (counted from 0): should have {row.expected_columns} "
            f"cells, as the header has. Received: {row.actual_columns}. Correct the row."
        ) from None


def _split(cells: pa.Array) -> pa.Array:
    """Lists of the items between vertical bars; of none when a cell is empty."""
    cells = pc.fill_null(cells, b"")
    none = pa.scalar([], pa.list_(pa.binary()))
    return pc.if_else(pc.equal(cells, b""), none, pc.split_pattern(cells, pattern="|"))


def _read_tfrecord(
    part: _Part, columns: Mapping[str, _Column], decoded_rows: int
) -> Iterator[dict[str, pa.Array]]:
    kinds = _tfrecord_kinds(part.file, columns)
    features = {
        name: tf.io.RaggedFeature(_TFRECORD_DTYPES[kind], row_splits_dtype=tf.int64)
        for name, kind in kinds.items()
    }
    row = 0
    with tf.device("CPU:0"):
        records = iter(tf.data.TFRecordDataset(str(part.file)).batch(decoded_rows))
    while True:
        batch: Any = None
        try:
            batch = next(records, None)
            if batch is None:
                return
            parsed = tf.io.parse_example(batch, features)
        except tf.errors.DataLossError as error:
            raise _tfrecord_loss(part.file) from error
        except tf.errors.InvalidArgumentError as error:
            raise _tfrecord_mismatch(part.file, batch.numpy(), row, kinds, columns) from error
        arrays = {}
        for name, column in columns.items():
            splits = parsed[name].row_splits.numpy()
            values = parsed[name].flat_values.numpy()
            values = pa.array(values, pa.binary() if values.dtype == object else None)
            if column.max_length:
                values = pa.LargeListArray.from_arrays(splits, values)
            else:
                lengths = np.diff(splits)
                wrong = lengths > 1 if column.owners else lengths != 1
                if wrong.any():
                    i = int(np.argmax(wrong))
                    held = f"holds {lengths[i]} values. Write one" if lengths[i] else "is absent"
                    fault = f"{held}. Give it a value." if not lengths[i] else f"{held} value."
                    raise part.error(name, row + i, fault)
                if column.owners:
                    values = values.take(pa.array(splits[:-1], mask=lengths == 0))
            arrays[name] = values
        yield arrays
        row += len(batch)


_TFRECORD_DTYPES = {"int64_list": tf.int64, "bytes_list": tf.string, "float_list": tf.float32}
_TFRECORD_LOOKED_AT = 1000  # records
_TFRECORD_KINDS = {"int64": "int64_list", "string": "bytes_list", "float32": "float_list"}


def _tfrecord_kinds(file: pathlib.Path, columns: Mapping[str, _Column]) -> dict[str, str]:
    """How the first record that has a column stores it; the others should do likewise."""
    kinds: dict[str, str] = {}
    # Only what domains own may be absent from the first record.
    count = _TFRECORD_LOOKED_AT if any(c.owners for c in columns.values()) else 1
    try:
        for row, record in enumerate(tf.data.TFRecordDataset(str(file)).take(count)):
            found = tf.train.Example.FromString(record.numpy()).features.feature
            if not row:
                # A list that is empty in the first row need not be there.
                required = {n: c for n, c in columns.items() if not (c.max_length or c.owners)}
                _check_names(file, [*found], required)
            for name in columns.keys() - kinds.keys():
                if name in found and (kind := found[name].WhichOneof("kind")):
                    kinds[name] = kind
            if len(kinds) == len(columns):
                break
    except tf.errors.DataLossError as error:
        raise _tfrecord_loss(file) from error
    except DecodeError as error:
        raise DataError(
            f"{file}, row {row} (counted from 0): should be a tf.train.Example; write it again."
        ) from error
    return {name: kinds.get(name, _TFRECORD_KINDS[c.dtype]) for name, c in columns.items()}


def _tfrecord_loss(file: pathlib.Path) -> DataError:
    """Names the first record that cannot be read."""
    row = 0
    with contextlib.suppress(tf.errors.DataLossError):
        for _ in tf.data.TFRecordDataset(str(file)):
            row += 1
    return DataError(
        f"{file}: row {row} (counted from 0) cannot be read as TFRecord: it is truncated or "
        "corrupt; write it again."
    )


def _tfrecord_mismatch(
    file: pathlib.Path,
    records: Iterable[bytes],
    first_row: int,
    kinds: Mapping[str, str],
    columns: Mapping[str, _Column],
) -> DataError:
    """Names the first record that is no Example, or stores a column unlike the first one does."""
    part = _Part(file)
    for row, record in enumerate(records, first_row):
        try:
            found = tf.train.Example.FromString(record).features.feature
        except DecodeError:
            return DataError(
                f"{file}, row {row} (counted from 0): should be a tf.train.Example; write it again."
            )
        for name, kind in kinds.items():
            stored = found[name].WhichOneof("kind") if name in found else None
            if stored not in (kind, None):
                fault = f"should be {columns[name].expected}, stored as {kind}. Found: {stored}."
                return part.error(name, row, f"{fault} Write it as in the other rows.")
    return DataError(f"{file}: cannot be parsed as tf.train.Example; write it again.")


_READERS: dict[str, _Reader] = {
    ".parquet": _read_parquet,
    ".tfrecord": _read_tfrecord,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
}
