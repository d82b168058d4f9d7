"""What the columns of a schema should hold, and where values come from."""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy.typing as npt
import pyarrow as pa

from qianmo.layers.features import Dense, Keep
from qianmo.layers.schema import Domain, Schema
from qianmo.pipelines.data.errors import DataError

Block = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
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
        """The type, as messages say it."""
        kind = "string or int64" if self.any_key else self.dtype
        return f"a list of {kind}" if self.max_length else kind


@dataclasses.dataclass(frozen=True)
class Part:
    """What is read in one go: a file, or a row group of a Parquet file."""

    file: pathlib.Path
    first_row: int = 0
    row_group: int = 0
    metadata: Any = None

    def error(self, column: str, row: int, fault: str) -> DataError:
        """What to raise for a value."""
        return DataError(f"{self.file}, column `{column}`, row {row} (counted from 0): {fault}")


@dataclasses.dataclass(frozen=True)
class Entries(Part):
    """Rows that came one by one, each with an id of its own, from what `file` names."""

    ids: Sequence[str] = ()

    def error(self, column: str, row: int, fault: str) -> DataError:
        """What to raise for a value."""
        return DataError(f"{self.file}, entry {self.ids[row]}, column `{column}`: {fault}")


def of_schema(schema: Schema, targets: bool = True) -> dict[str, Column]:
    """The columns that the schema's features and, with `targets`, its other roles ask for."""
    found: dict[str, Column] = {}

    def add(column: Column, role: str) -> None:
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
            add(Column(name=feature.name, dtype="float32", owners=feature.domains), "feature")
        else:
            column = Column(
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
        column = Column(
            name=label, dtype="float32", low=0.0, high=1.0, owners=owners, is_label=True
        )
        add(column, "label")
    if schema.weight:
        add(Column(name=schema.weight, dtype="float32", low=0.0), "weight")
    for role in ("timestamp", "task_id"):
        if name := getattr(schema, role):
            add(Column(name=name, dtype="int64"), role)
    if schema.domain:
        column = Column(
            name=schema.domain, dtype="int64", tells_domain=True, only=schema.only_domains
        )
        add(column, "domain")
    if schema.group and getattr(found.get(schema.group), "expected", "") not in ("int64", "string"):
        add(Column(name=schema.group, dtype="string", any_key=True), "group")
    for feature in schema.categorical:
        if feature.is_list and feature.length_name in found:
            raise ValueError(
                f"column `{feature.length_name}` is the length of the list `{feature.name}`; "
                "rename the column."
            )
    return found


def check_names(file: pathlib.Path, names: Sequence[str], columns: Mapping[str, Column]) -> None:
    """Checks the names of a file's columns.

    Raises:
      DataError: a column of the schema is missing, or there twice.
    """
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


def is_list(found: pa.DataType) -> bool:
    """Whether an Arrow type is one of lists."""
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


def check_type(part: Part, column: Column, found: pa.DataType) -> None:
    """Checks the type that a file gives to a column; CSV gives none."""
    if pa.types.is_null(found) and column.owners:
        return  # no row of this file has one
    value = found
    if is_list(found) == bool(column.max_length):
        value = found.value_type if is_list(found) else found
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
