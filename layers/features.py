"""The features of a row: what each holds and how it enters the model."""

from __future__ import annotations

import dataclasses
import keyword
import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typeguard

from qianmo.layers.names import nearest

Side = Literal["user", "item", "context"]
Pooling = Literal["mean", "sum", "sqrtn", "max"]
Keep = Literal["last", "first"]


def from_mapping(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Builds dataclass `cls` from `values`, which may come from JSON: lists become tuples.

    Raises:
      ValueError: an unknown key, named with its nearest known one; a missing key; a value of
        another type than the field's.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} should be a mapping. Received: {values!r}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean `{near}`?" if near else f"; known keys: {', '.join(known)}."
            raise ValueError(f"{where}: unknown key `{key}`{hint}")
    for name, field in known.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ValueError(f"{where}: missing key `{name}`.")
    hints = get_type_hints(cls)
    arguments = {key: _as_tuples(value) for key, value in values.items()}
    for key, value in values.items():
        check_type(where, key, value, hints[key])
    return cls(**arguments)


def check_type(where: str, key: str, value: Any, hint: Any) -> None:
    """Raises a ValueError unless `value`, which may come from JSON, is of the type `hint`."""
    try:
        typeguard.check_type(
            _as_tuples(value),
            hint,
            collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
        )
    except typeguard.TypeCheckError:
        raise ValueError(
            f"{where}: `{key}` should be {_shown(hint)}. Received: {value!r}"
        ) from None


def _shown(hint: Any) -> str:
    """A type as a person would say it."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {parts}"
    if origin in (types.UnionType, Union):
        return " or ".join(_shown(part) for part in parts if part is not type(None))
    if origin is tuple and parts:
        ends = parts[-1] is Ellipsis
        inside = _shown(parts[0]) if ends else ", ".join(map(_shown, parts))
        return f"a list of {inside}" if ends else f"[{inside}]"
    if origin is Sequence:
        return f"a list of {_shown(parts[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"a mapping from {_shown(parts[0])} to {_shown(parts[1])}"
    return "[]" if hint == tuple[()] else getattr(hint, "__name__", str(hint))


def _as_tuples(value: Any) -> Any:
    """A value with tuples for lists, on every level."""
    if isinstance(value, list | tuple):
        return tuple(map(_as_tuples, value))
    if isinstance(value, Mapping):
        return {key: _as_tuples(part) for key, part in value.items()}
    return value


def check_choice(where: str, key: str, value: object, choices: object) -> None:
    """Raises a ValueError unless `value` is one of the values of the Literal `choices`."""
    if value not in get_args(choices):
        raise ValueError(
            f"{where}: `{key}` should be one of {get_args(choices)}. Received: {value!r}"
        )


# Inputs of served signatures that no column may be named like.
RESERVED_NAMES = ("adapt", "request_id", "self", "status", "support_count", "weights")


def check_name(name: Any) -> None:
    """Raises a ValueError unless `name` can be an argument of a served function."""
    fits = isinstance(name, str) and re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name)
    if not fits or keyword.iskeyword(name) or name.lower() in RESERVED_NAMES:
        raise ValueError(
            "A name should be letters, digits and underscores, begin with a letter, and be no "
            f"Python keyword nor one of {RESERVED_NAMES}. Received: {name!r}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical:
    """A feature whose raw values become ids, one a row or a list a row.

    Ids come from one of three encodings. With `num_ids`, the raw value is the id (identity). With
    `hash_buckets`, a hash of it. With neither, its place in a vocabulary, which is `vocabulary`
    when given and otherwise counted from the training rows. Row 0 of every table is kept for values
    that are out of the vocabulary or out of range; known values start at row 1.

    Attributes:
      name: the column's name, and the serving input's.
      dtype: type of the raw values, "int64" or "string".
      dim: width of the embedding vector.
      vocabulary: the raw values that get rows of their own, in row order.
      min_count: a counted vocabulary leaves out values seen less often in the training rows.
      hash_buckets: number of hash buckets.
      num_ids: number of ids; raw values are 0 <= value < num_ids.
      max_length: 0 for one value a row; else the row holds a list, read up to this length. The
        serving input is then `[B, L]` with a second input `<name>_length` of `[B]`.
      keep: which end of a longer list stays: "last" (sequences run from old to new) or "first".
      pooling: how the vectors of a list become one.
      default: what a null is read as, and what a client sends for no value. One that no row holds,
        such as -1, makes "no value" a value of its own. For lists `()`: a null list is empty, and
        nulls within lists are left out. None: a null is an error.
      drop_rate: share of the values that training reads as unknown, at random, so that row 0 learns
        what to expect of a new value. Scoring reads all.
      side: whom it describes.
      domains: the domains that own it; empty when all share it. Rows of other domains lack it, and
        it is never looked up for them.
      table: name of the embedding table; features that name the same one share rows.
    """

    name: str
    dtype: Literal["int64", "string"] = "int64"
    dim: int = 16
    vocabulary: tuple[Any, ...] | None = None
    min_count: int = 1
    hash_buckets: int = 0
    num_ids: int = 0
    max_length: int = 0
    keep: Keep = "last"
    pooling: Pooling = "mean"
    default: int | str | tuple[()] | None = None
    drop_rate: float = 0.0
    side: Side = "context"
    domains: tuple[int | str, ...] = ()
    table: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        where = f"feature `{self.name}`"
        if not self.table:
            object.__setattr__(self, "table", self.name)
        if not re.fullmatch("[A-Za-z0-9_]{1,63}", self.table):
            raise ValueError(
                f"{where}: a table's name should be 1 to 63 letters, digits and underscores, as "
                f"files are named by it. Received: {self.table!r}"
            )
        check_choice(where, "dtype", self.dtype, Literal["int64", "string"])
        check_choice(where, "side", self.side, Side)
        check_choice(where, "pooling", self.pooling, Pooling)
        check_choice(where, "keep", self.keep, Keep)
        for key in ("hash_buckets", "num_ids", "max_length"):
            if getattr(self, key) < 0:
                raise ValueError(f"{where}: `{key}` should be >= 0. Received: {getattr(self, key)}")
        for key in ("dim", "min_count"):
            if getattr(self, key) < 1:
                raise ValueError(f"{where}: `{key}` should be >= 1. Received: {getattr(self, key)}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(
                f"{where}: `drop_rate` should be in [0, 1). Received: {self.drop_rate}"
            )
        given = [
            key
            for key, is_given in (
                ("vocabulary", self.vocabulary is not None),
                ("hash_buckets", self.hash_buckets > 0),
                ("num_ids", self.num_ids > 0),
            )
            if is_given
        ]
        if len(given) > 1:
            raise ValueError(f"{where}: give one encoding. Received: {' and '.join(given)}.")
        kind = int if self.dtype == "int64" else str
        if self.default is not None:
            expected = "()" if self.is_list else self.dtype
            fits = self.default == () if self.is_list else isinstance(self.default, kind)
            if not fits:
                raise ValueError(
                    f"{where}: `default` should be {expected}. Received: {self.default!r}"
                )
        if self.num_ids and self.dtype != "int64":
            raise ValueError(f"{where}: `num_ids` needs dtype int64. Received: {self.dtype}")
        if self.vocabulary is not None:
            wrong = [v for v in self.vocabulary if not isinstance(v, kind)]
            if wrong:
                raise ValueError(
                    f"{where}: `vocabulary` should hold {self.dtype}. Received: {wrong[0]!r}"
                )
            if len(set(self.vocabulary)) != len(self.vocabulary):
                raise ValueError(f"{where}: `vocabulary` holds a value twice.")

    @property
    def is_list(self) -> bool:
        """Whether a row holds a list of values."""
        return self.max_length > 0

    @property
    def length_name(self) -> str:
        """Name of the input that holds the lists' lengths."""
        return f"{self.name}_length"

    @property
    def num_rows(self) -> int:
        """Rows of its table, the out-of-vocabulary row included.

        Raises:
          ValueError: the vocabulary has not been counted yet.
        """
        known = self.num_ids or self.hash_buckets
        if not known:
            if self.vocabulary is None:
                raise ValueError(
                    f"feature `{self.name}`: its vocabulary has not been counted; give `vocabulary`"
                    ", or count it from the training rows first."
                )
            known = len(self.vocabulary)
        return known + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A numeric feature; it enters the model as (x - mean) / sqrt(variance).

    NaN stands for no value, in files as on the wire; a null is read as NaN. Without `default` and
    `indicator` a null is an error in files, and on the wire NaN is read as the mean, with a bit in
    the row's status.

    Attributes:
      name: the column's name, and the serving input's.
      mean, variance: of the training rows' values; counted from them when None.
      default: what no value is read as; None for the mean.
      indicator: whether "no value" is a value of its own: a second input of the model, which is 1
        in rows without a value and else 0.
      side, domains: as for `Categorical`.
    """

    name: str
    mean: float | None = None
    variance: float | None = None
    default: float | None = None
    indicator: bool = False
    side: Side = "context"
    domains: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name)
        check_choice(f"feature `{self.name}`", "side", self.side, Side)
        if (self.mean is None) != (self.variance is None):
            raise ValueError(f"feature `{self.name}`: give `mean` and `variance`, or neither.")
        for key in ("mean", "variance", "default"):
            value = getattr(self, key)
            if value is not None and not math.isfinite(value):
                raise ValueError(
                    f"feature `{self.name}`: `{key}` should be finite. Received: {value}"
                )
        if self.variance is not None and not self.variance > 0:
            raise ValueError(
                f"feature `{self.name}`: `variance` should be > 0. Received: {self.variance}"
            )

    @property
    def may_be_missing(self) -> bool:
        """Whether a row may be without a value."""
        return self.indicator or self.default is not None


Feature = Categorical | Dense
