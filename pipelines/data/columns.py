"""What the columns of a schema should hold, and where values come from."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt
import pyarrow as pa

from qianmo.layers.features import Categorical, Dense, Keep
from qianmo.layers.schema import DAY, UNITS, Domain, Schema
from qianmo.pipelines.data.errors import DataError
from qianmo.pipelines.data.files import DataFile

Block = dict[str, npt.NDArray[Any]]
Kind = Literal["int64", "string", "float32", "time", "name", "key"]

_EXPECTED = {
    "time": "int64 or a time such as 2024-05-01T12:30:00Z",
    "name": "string or int64",
    "key": "one value a row",
}
_DEFAULT = "Give it a value, or give the feature a `default`."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """What a column should hold.

    Attributes:
      kind: besides the types of values that stay as they are, "time" (int64, or datetimes, which
        become int64), "name" (strings, or integers, which become strings) and "key" (anything,
        which becomes an int64 that is equal where values are).
      max_length, keep: as for `Categorical`.
      default: what a null is read as; None: it is an error. NaN for float32, () for lists.
      low, high: bounds of float32 values, themselves allowed.
      unit: of a time, in a second.
      tells_domain: whether it is the column of the rows' domains.
      only: the domains whose rows are kept; empty for all. Of the domains' column.
      owners: the domains whose rows have a value; empty for all.
      is_label: whether values in rows of other domains are passed over instead of refused.
      is_declared: whether the schema tells its `dtype`, as for categorical features.
      remedy: what to do when the file holds another type.
      null_remedy: what to do when a value is missing.
    """

    name: str
    kind: Kind
    max_length: int = 0
    keep: Keep = "last"
    default: int | float | str | tuple[()] | None = None
    low: float = -math.inf
    high: float = math.inf
    unit: int = 1
    tells_domain: bool = False
    only: tuple[Domain, ...] = ()
    owners: tuple[Domain, ...] = ()
    is_label: bool = False
    is_declared: bool = False
    remedy: str = "Convert it."
    null_remedy: str = "Give it a value."

    @property
    def dtype(self) -> Literal["int64", "string", "float32"]:
        """The type of the block's array."""
        if self.kind in ("time", "key"):
            return "int64"
        return "string" if self.kind == "name" else self.kind  # type: ignore[return-value]

    @property
    def expected(self) -> str:
        """The type, as messages say it."""
        kind = _EXPECTED.get(self.kind, self.kind)
        return f"a list of {kind}" if self.max_length else kind

    @property
    def may_be_absent(self) -> bool:
        """Whether a row may be without a value."""
        return self.default is not None or bool(self.owners)


@dataclasses.dataclass(frozen=True)
class Part:
    """What is read in one go: a file, or a row group of a Parquet file."""

    file: DataFile
    first_row: int = 0
    row_group: int = 0
    metadata: Any = None

    def error(self, column: str, row: int, fault: str) -> DataError:
        """What to raise for a value."""
        return DataError(f"{self.file}, column `{column}`, row {row} (counted from 0): {fault}")

    def constants(self, count: int) -> dict[str, pa.Array]:
        """What the folders' names say of each of `count` rows, as text."""
        return {
            name: pa.repeat(pa.scalar(value and value.encode(), pa.binary()), count)
            for name, value in self.file.partitions.items()
        }


@dataclasses.dataclass(frozen=True)
class Entries(Part):
    """Rows that came one by one, each with an id of its own, from what `file` names."""

    ids: Sequence[str] = ()

    def error(self, column: str, row: int, fault: str) -> DataError:
        """What to raise for a value."""
        return DataError(f"{self.file}, entry {self.ids[row]}, column `{column}`: {fault}")


def of_schema(schema: Schema, targets: bool = True, gauc: bool = False) -> dict[str, Column]:
    """The columns that the schema asks for.

    Args:
      schema: the schema.
      targets: whether to read what its other roles name beside its features.
      gauc: whether to read what `gauc_by` names.

    Raises:
      ValueError: two roles ask one column for two types.
    """
    columns = {feature.name: _of_feature(schema, feature) for feature in schema.features}
    for role, column in _of_roles(schema, gauc) if targets else ():
        before = columns.get(column.name)
        columns[column.name] = column if before is None else _merged(before, column, role)
    for feature in schema.categorical:
        if feature.is_list and feature.length_name in columns:
            raise ValueError(
                f"column `{feature.length_name}` is the length of the list `{feature.name}`; "
                "rename the column."
            )
    return columns


def _of_feature(schema: Schema, feature: Categorical | Dense) -> Column:
    if isinstance(feature, Dense):
        return Column(
            name=feature.name,
            kind="float32",
            default=math.nan if feature.may_be_missing else None,
            owners=feature.domains,
            null_remedy=_DEFAULT,
        )
    return Column(
        name=feature.name,
        kind=feature.dtype,
        max_length=feature.max_length,
        keep=feature.keep,
        default=feature.default,
        tells_domain=feature.name == schema.domain,
        owners=feature.domains,
        is_declared=True,
        null_remedy=_DEFAULT,
    )


def _of_roles(schema: Schema, gauc: bool) -> list[tuple[str, Column]]:
    """Role and column, for each that describes a row or is to be predicted."""
    found: list[tuple[str, Column]] = []

    def add(role: str, name: str, kind: Kind, **more: Any) -> None:
        if name:
            found.append((role, Column(name=name, kind=kind, **more)))

    for label in schema.labels:
        is_binary = schema.kind(label) == "binary"
        own = {"owners": schema.label_domains.get(label, ()), "is_label": True}
        add(
            "label",
            label,
            "float32",
            low=0.0 if is_binary else -math.inf,
            high=1.0 if is_binary else math.inf,
            default=math.nan if label in schema.optional_labels else None,
            null_remedy="Give it a value, or name the label in `optional_labels`.",
            **own,
        )
        weight = schema.label_weights.get(label, 1.0)
        if isinstance(weight, str):
            remedy = "Give it a value, 0 where the row does not have the label."
            add("label's weight", weight, "float32", low=0.0, null_remedy=remedy, **own)
    add("weight", schema.weight, "float32", low=0.0)
    add("timestamp", schema.timestamp, "time", unit=UNITS[schema.timestamp_unit])
    add("event_id", schema.event_id, "int64")
    other = {"int64": "string", "string": "int64"}
    task, domain = schema.task_dtype, schema.domain_dtype
    remedy = f'Convert it, or set `task_dtype` to "{other[task]}".'
    add("task_id", schema.task_id, task, remedy=remedy)
    remedy = f'Convert it, or declare it as a feature of dtype "{other[domain]}".'
    only = schema.only_domains
    add("domain", schema.domain, domain, tells_domain=True, only=only, remedy=remedy)
    add("group", schema.group, "name")
    for name in schema.gauc_by if gauc else ():
        add("gauc_by", name if name != DAY else "", "key")
    return found


def _merged(first: Column, other: Column, role: str) -> Column:
    """One column for two roles.

    Raises:
      ValueError: they ask for two types.
    """
    kinds = {first.kind, other.kind}
    takes_any = other.kind == "key" or (other.kind == "name" and first.kind != "float32")
    is_time = kinds == {"int64", "time"}
    if first.max_length or not (len(kinds) == 1 or takes_any or is_time):
        raise ValueError(
            f"column `{first.name}` should be of one type. Received: {first.expected} and, "
            f"as the {role}, {other.expected}. Copy it under another name."
        )
    # What a feature reads nulls as may name a task or a domain, but is no label, weight or time.
    needs_value = other.default is None and other.kind in ("float32", "time")
    return dataclasses.replace(
        first,
        kind="time" if is_time else first.kind,
        unit=max(first.unit, other.unit),
        default=None if needs_value else first.default,
        null_remedy=other.null_remedy if needs_value else first.null_remedy,
        low=max(first.low, other.low),
        high=min(first.high, other.high),
        tells_domain=first.tells_domain or other.tells_domain,
        only=first.only or other.only,
        owners=first.owners if first.owners == other.owners else (),
    )


def check_names(file: DataFile, names: Sequence[str], columns: Mapping[str, Column]) -> None:
    """Checks the names of a file's columns.

    Raises:
      DataError: a column of the schema is missing, or there twice.
    """
    for name, column in columns.items():
        if name in file.partitions:
            if name in names:
                raise DataError(
                    f"{file}: column `{name}` is in the file and in the name of its folder, "
                    f"{name}={file.partitions[name]}. Take it out of one of them."
                )
            if column.max_length:
                raise DataError(
                    f"{file}: column `{name}` should be {column.expected}. Found: the name of its "
                    f"folder, {name}={file.partitions[name]}. Declare it without `max_length`."
                )
            continue
        if name not in names:
            if column.owners:
                continue  # a file of other domains' rows
            known = [*names, *file.partitions]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it holds: {', '.join(known)}."
            raise DataError(
                f"{file}: no column `{name}`; {hint} Add it to the file or take it out of the "
                "schema."
            )
        if names.count(name) > 1:
            raise DataError(f"{file}: column `{name}` is there twice; rename one of the two.")


def is_list(found: pa.DataType) -> bool:
    """Whether an Arrow type is one of lists."""
    types = pa.types
    return bool(
        types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found)
    )


def is_string(found: pa.DataType) -> bool:
    """Whether an Arrow type is one of strings or bytes."""
    types = pa.types
    return bool(
        types.is_string(found)
        or types.is_large_string(found)
        or types.is_string_view(found)
        or types.is_binary(found)
        or types.is_large_binary(found)
        or types.is_binary_view(found)
    )


def is_time(found: pa.DataType) -> bool:
    """Whether an Arrow type is one of datetimes or dates."""
    return bool(pa.types.is_timestamp(found) or pa.types.is_date(found))


def check_type(part: Part, column: Column, found: pa.DataType) -> None:
    """Checks the type that a file gives to a column; CSV gives none.

    Raises:
      DataError: it is another one.
    """
    if pa.types.is_null(found):
        return  # no row of this file has a value; where one should, that is found later
    value = found.value_type if is_list(found) else found
    if pa.types.is_dictionary(value):
        value = value.value_type
    is_int = bool(pa.types.is_integer(value) or pa.types.is_boolean(value))
    is_float = bool(pa.types.is_floating(value))
    is_text = is_string(value)
    fits = {
        "int64": is_int,
        "string": is_text,
        "float32": is_int or is_float or bool(pa.types.is_decimal(value)),
        "time": is_int or is_time(value) or is_text,
        "name": is_text or is_int,
        "key": is_text or is_int or is_float or is_time(value),
    }
    same_shape = is_list(found) == bool(column.max_length)
    if same_shape and (fits[column.kind] or pa.types.is_null(value)):
        return
    remedy = column.remedy
    if not same_shape and column.is_declared and (is_list(found) or not pa.types.is_nested(found)):
        how = "without `max_length`" if column.max_length else "with `max_length`"
        remedy = f"Convert it, or declare it {how}."
    elif same_shape and is_float and column.dtype == "int64":  # so pandas stores nulls of integers
        remedy = "Convert it to int64, in which nulls may stay null."
    elif same_shape and column.is_declared and (is_int or is_text):
        remedy = f'Convert it, or declare its `dtype` "{"string" if is_text else "int64"}".'
    elif same_shape and column.kind == "float32" and is_text and not column.is_label:
        remedy = "Convert it, or declare it as categorical."
    fault = f"should be {column.expected}. Found: {found} in the whole column. {remedy}"
    raise part.error(column.name, part.first_row, fault)
