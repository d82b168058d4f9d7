"""What a sample says of a column."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from qianmo.layers import metrics
from qianmo.pipelines.data import keys
from qianmo.pipelines.data.columns import is_list, is_string, is_time

_ISO_TIME = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}(:\d{2}(:\d{2}(\.\d+)?)?)?(Z|[+-]\d{2}(:?\d{2})?)?)?$"
_TIME_NAME = re.compile("(^|_)(time|timestamp|ts|datetime|date|day)(_|$)|_at$")
_UNITS = {"s": (1e8, 5e9), "ms": (1e11, 5e12), "us": (1e14, 5e15)}  # of int64 since 1970
_LEAST_ROWS = 200  # from which dependence on the label says something
_LEAST_ROWS_A_VALUE = 50


@dataclasses.dataclass(frozen=True)
class Facts:
    """A column of a sample.

    Attributes:
      name: its name.
      column: its rows.
      is_list: whether a row holds a list.
      values: the values that are there, also of lists.
      nulls: rows without a value, NaN included.
    """

    name: str
    column: pa.Array
    is_list: bool
    values: pa.Array
    nulls: int

    @classmethod
    def of(cls, name: str, column: pa.ChunkedArray) -> Facts:
        """Looks at a column."""
        whole = column.combine_chunks()
        if pa.types.is_dictionary(whole.type):
            whole = whole.dictionary_decode()
        lists = is_list(whole.type)
        values = pc.list_flatten(whole) if lists else whole
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        values = values.drop_null()
        nulls = whole.null_count
        if pa.types.is_floating(values.type):
            is_nan = pc.is_nan(values)
            nulls += 0 if lists else pc.sum(is_nan).as_py() or 0
            values = values.filter(pc.invert(is_nan))
        return cls(name, whole, lists, values, nulls)

    @property
    def rows(self) -> int:
        """Rows of the sample."""
        return len(self.column)

    @functools.cached_property
    def distinct(self) -> int:
        """How many values differ."""
        return int(pc.count_distinct(self.values).as_py())

    @property
    def is_float(self) -> bool:
        """Whether values are numbers that are no integers by type."""
        kind = self.values.type
        return bool(pa.types.is_floating(kind) or pa.types.is_decimal(kind))

    @property
    def is_integer(self) -> bool:
        """Whether values are integers by type."""
        kind = self.values.type
        return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))

    @property
    def is_string(self) -> bool:
        """Whether values are strings."""
        return is_string(self.values.type)

    @functools.cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """The values as numbers."""
        return np.asarray(self.values.cast(pa.float64()).to_numpy(zero_copy_only=False))

    @functools.cached_property
    def is_binary(self) -> bool:
        """Whether the values are 0 and 1."""
        if self.is_list or not (self.is_float or self.is_integer):
            return False
        return self.distinct == 2 and bool(np.isin(self.numbers, (0, 1)).all())

    @functools.cached_property
    def time_unit(self) -> str:
        """Empty if it is no time; "time" if by its type or text, else the unit of its integers."""
        if self.is_list or not len(self.values):
            return ""
        if is_time(self.values.type):
            return "time"
        if self.is_string:
            found = pc.match_substring_regex(self.values.cast(pa.string()), _ISO_TIME)
            return "time" if pc.all(found).as_py() else ""
        if not self.is_integer or not _TIME_NAME.search(self.name.lower()):
            return ""
        low, high = self.numbers.min(), self.numbers.max()
        return next((unit for unit, (a, b) in _UNITS.items() if a <= low <= high <= b), "")

    @property
    def is_day(self) -> bool:
        """Whether integers are days as in 20240501."""
        if not self.is_integer or self.is_list or not _TIME_NAME.search(self.name.lower()):
            return False
        year, month, day = (self.numbers // part for part in (10_000, 100, 1))
        month, day = month % 100, day % 100
        fits = (year >= 1900) & (year < 2200) & (month >= 1) & (month <= 12)
        return bool((fits & (day >= 1) & (day <= 31)).all())

    @property
    def has_null_items(self) -> bool:
        """Whether its lists hold nulls."""
        return self.is_list and bool(pc.list_flatten(self.column).null_count)

    @property
    def null_share(self) -> str:
        """The share of rows without a value, as text."""
        return f"{100 * self.nulls / self.rows:.2g} %"

    @property
    def first(self) -> str:
        """The first value, as text."""
        value = self.values[0].as_py()
        return repr(value.decode() if isinstance(value, bytes) else value)

    @functools.cached_property
    def hashed(self) -> npt.NDArray[np.int64]:
        """The distinct values as integers, equal where values are."""
        distinct = pc.unique(self.values)
        if self.is_string:
            return keys.of_strings(distinct)
        return np.asarray(distinct.cast(pa.int64(), safe=False).to_numpy(zero_copy_only=False))

    def common(self, times: int) -> int:
        """How many values occur so often."""
        counts = pc.value_counts(self.values).field("counts")
        return int(pc.sum(pc.greater_equal(counts, times)).as_py() or 0)

    def unused(self) -> int | str:
        """A value that no row of the sample holds."""
        if self.is_string:
            present = set(pc.unique(self.values.cast(pa.string())).to_pylist())
            names = ("", "none", *(f"none {number}" for number in range(len(present))))
            return next(name for name in names if name not in present)
        held = set(pc.unique(self.values.cast(pa.int64(), safe=False)).to_pylist())
        return next(-number for number in range(1, len(held) + 2) if -number not in held)


def dependence(f: Facts, label: Facts) -> float:
    """How well a column tells a label alone: AUC of a binary one, else the correlation's size.

    Strings and integers of few values stand for the mean label of their rows. 0 where there are too
    few rows to say.
    """
    if f.is_list or f.nulls == f.rows:
        return 0.0
    y = label.column.cast(pa.float64())
    good = pc.and_(pc.is_valid(f.column), pc.is_valid(y))
    target = _floats(y.filter(good))
    if len(target) < _LEAST_ROWS:
        return 0.0
    x: Any = None
    if f.is_string or (f.is_integer and f.distinct * _LEAST_ROWS_A_VALUE <= len(target)):
        encoded = f.column.filter(good).dictionary_encode().indices.to_numpy()
        counts = np.bincount(encoded)
        if counts.mean() >= _LEAST_ROWS_A_VALUE:
            x = (np.bincount(encoded, target) / counts)[encoded]
    elif f.is_integer or f.is_float:
        x = _floats(f.column.filter(good).cast(pa.float64()))
    if x is None:
        return 0.0
    finite = np.isfinite(x) & np.isfinite(target)
    x, target = x[finite], target[finite]
    if len(x) < _LEAST_ROWS or not (x.std() > 0 and target.std() > 0):
        return 0.0
    if label.is_binary:
        area = metrics.auc(target, x)
        return max(area, 1 - area)
    return abs(float(np.corrcoef(x, target)[0, 1]))


def _floats(values: pa.Array) -> npt.NDArray[np.float64]:
    return np.asarray(values.to_numpy(zero_copy_only=False))
