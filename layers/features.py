"""What a row of data holds: features, labels and the columns that describe the row.

Declared once, as plain data, and used by the readers, the encoder, the embeddings, the exporters
and the serving signatures alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import keyword
import math
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

Side = Literal["user", "item", "context"]
Pooling = Literal["mean", "sum", "sqrtn", "max"]
Keep = Literal["last", "first"]


def from_mapping(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Builds dataclass `cls` from `values`; for an unknown key the error names a near one.

    Raises:
      ValueError: an unknown key, or a missing one.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known keys: {', '.join(known)}."
            raise ValueError(f"{where}: unknown key `{key}`{hint}")
    for name, field in known.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ValueError(f"{where}: missing key `{name}`.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _check_choice(where: str, key: str, value: object, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(
            f"{where}: `{key}` should be one of {get_args(choices)}. Received: {value!r}"
        )


def _check_name(name: Any) -> None:
    """Names become arguments of the served functions, next to the output `status`."""
    fits = isinstance(name, str) and re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name)
    if not fits or keyword.iskeyword(name) or name in ("self", "status"):
        raise ValueError(
            "A name should be letters, digits and underscores, begin with a letter, and be no "
            f"Python keyword, nor `self` or `status`. Received: {name!r}"
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
      drop_rate: share of the values that training reads as unknown, at random, so that row 0 learns
        what to expect of a new value. Scoring reads all.
      side: whom it describes.
      domains: ids of the domains that own it; empty when all share it. Rows of other domains lack
        it, and it is never looked up for them.
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
    drop_rate: float = 0.0
    side: Side = "context"
    domains: tuple[int, ...] = ()
    table: str = ""

    def __post_init__(self) -> None:
        _check_name(self.name)
        where = f"feature `{self.name}`"
        if not self.table:
            object.__setattr__(self, "table", self.name)
        _check_choice(where, "dtype", self.dtype, Literal["int64", "string"])
        _check_choice(where, "side", self.side, Side)
        _check_choice(where, "pooling", self.pooling, Pooling)
        _check_choice(where, "keep", self.keep, Keep)
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
        if self.num_ids and self.dtype != "int64":
            raise ValueError(f"{where}: `num_ids` needs dtype int64. Received: {self.dtype}")
        if self.vocabulary is not None:
            kind = int if self.dtype == "int64" else str
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

    Attributes:
      name: the column's name, and the serving input's.
      mean, variance: of the training rows; counted from them when None.
      side, domains: as for `Categorical`.
    """

    name: str
    mean: float | None = None
    variance: float | None = None
    side: Side = "context"
    domains: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_choice(f"feature `{self.name}`", "side", self.side, Side)
        if (self.mean is None) != (self.variance is None):
            raise ValueError(f"feature `{self.name}`: give `mean` and `variance`, or neither.")
        if self.variance is not None and not self.variance > 0:
            raise ValueError(
                f"feature `{self.name}`: `variance` should be > 0. Received: {self.variance}"
            )


Feature = Categorical | Dense
_KINDS: dict[str, type[Any]] = {"categorical": Categorical, "dense": Dense}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """All that is known of a row.

    Attributes:
      features: the model's inputs.
      labels: columns to predict, each in [0, 1].
      weight: column of the rows' weights (>= 0), if any.
      timestamp: int64 column of event times, if any.
      task_id: int64 column of the task (user, scene, adgroup); the unit of GAUC.
      domain: int64 column of the domain (scene), if any. A model whose parts differ by domain needs
        it among its features too, with a vocabulary or `num_ids`.
      label_domains: label -> ids of the domains whose rows have it. Labels not named here are those
        of every row; those of other domains' rows are not read.
      domain_weights: pairs of a domain's id and the weight of its rows in the training loss, by
        which domains are mixed; 1 for those not named.
      only_domains: ids of the domains whose rows are read, so that one recipe trains a model of one
        domain on the rows of all; empty for every row.
      group: column (int64 or string) by which evaluation reports groups of users, if any.
    """

    features: tuple[Feature, ...]
    labels: tuple[str, ...]
    weight: str = ""
    timestamp: str = ""
    task_id: str = ""
    domain: str = ""
    label_domains: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    domain_weights: tuple[tuple[int, float], ...] = ()
    only_domains: tuple[int, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("A schema should have at least one feature.")
        if isinstance(self.labels, str):
            raise ValueError(f"`labels` should be a list of names. Received: {self.labels!r}")
        if not self.labels:
            raise ValueError("A schema should have at least one label.")
        for kind, names in (
            ("feature", self.input_names),
            ("label", self.labels),
        ):
            seen: set[str] = set()
            for name in names:
                if name in seen:
                    raise ValueError(f"{kind} `{name}` is declared twice.")
                seen.add(name)
        for label in self.labels:
            _check_name(label)
            if label in self.input_names:
                raise ValueError(f"`{label}` is declared both as a label and as a feature.")
        self._check_domains()
        tables: dict[str, Categorical] = {}
        for feature in self.categorical:
            first = tables.setdefault(feature.table, feature)
            for key in ("dtype", "dim", "vocabulary", "min_count", "hash_buckets", "num_ids"):
                if getattr(first, key) != getattr(feature, key):
                    raise ValueError(
                        f"features `{first.name}` and `{feature.name}` share table "
                        f"`{feature.table}` and should agree in `{key}`. Received: "
                        f"{getattr(first, key)!r} and {getattr(feature, key)!r}"
                    )

    def _check_domains(self) -> None:
        owned = {f"feature `{f.name}`": f.domains for f in self.features if f.domains}
        for label, domains in self.label_domains.items():
            if label not in self.labels:
                raise ValueError(
                    f"`label_domains` should name labels. Received: {label!r}, and the labels are "
                    f"{self.labels}"
                )
            if not self.domain:
                raise ValueError(f"label `{label}` has domains; `domain` should name a column.")
            object.__setattr__(self, "label_domains", {**self.label_domains, label: tuple(domains)})
        for key in ("only_domains", "domain_weights"):
            if getattr(self, key) and not self.domain:
                raise ValueError(f"`{key}` needs `domain`, which names no column.")
        pairs = tuple((int(domain), float(weight)) for domain, weight in self.domain_weights)
        object.__setattr__(self, "domain_weights", pairs)
        for domain, weight in pairs:
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"`domain_weights`: that of domain {domain} should be >= 0. Received: {weight}"
                )
        feature = self.domain_feature
        if owned and feature is None:
            raise ValueError(
                f"{next(iter(owned))} is owned by domains: the column that `domain` names should "
                "be an int64 feature too, with a vocabulary or `num_ids`, one value a row. "
                f"Received: {self.domain!r}"
            )
        if feature is not None and feature.domains:
            raise ValueError(f"feature `{feature.name}` tells the domain; no domain can own it.")
        for where, domains in owned.items():
            if feature is None or (feature.vocabulary is None and not feature.num_ids):
                break  # checked again when the vocabulary has been counted
            for domain in domains:
                if not self._index(domain):
                    raise ValueError(f"{where}: domain {domain} is not in `{feature.name}`.")

    @property
    def domain_feature(self) -> Categorical | None:
        """The feature that tells a row's domain, if there is one."""
        for f in self.categorical:
            fits = f.dtype == "int64" and not f.is_list and not f.hash_buckets
            if f.name == self.domain and fits:
                return f
        return None

    @property
    def num_domains(self) -> int:
        """P, the known domains. A row's domain is their place from 1 on, 0 when it is unknown.

        Raises:
          ValueError: no feature tells the domain, or its vocabulary has not been counted.
        """
        feature = self.domain_feature
        if feature is None:
            raise ValueError(
                "A model whose parts differ by domain needs the column that `schema.domain` names "
                "among the features: int64, one value a row, with a vocabulary or `num_ids`. "
                f"Received: {self.domain!r}"
            )
        return feature.num_rows - 1

    def _index(self, domain: int) -> int:
        feature = self.domain_feature
        if feature is None:
            return 0
        if feature.num_ids:
            return domain + 1 if 0 <= domain < feature.num_ids else 0
        known = feature.vocabulary or ()
        return known.index(domain) + 1 if domain in known else 0

    def owners(self, domains: Iterable[int]) -> tuple[bool, ...]:
        """Whether each of the P + 1 places is one of these domains."""
        places = {self._index(domain) for domain in domains} - {0}
        return tuple(place in places for place in range(self.num_domains + 1))

    @property
    def categorical(self) -> tuple[Categorical, ...]:
        """The categorical features, in order."""
        return tuple(f for f in self.features if isinstance(f, Categorical))

    @property
    def dense(self) -> tuple[Dense, ...]:
        """The dense features, in order."""
        return tuple(f for f in self.features if isinstance(f, Dense))

    @property
    def tables(self) -> Mapping[str, Categorical]:
        """Embedding tables by name; each is described by the first feature that uses it."""
        found: dict[str, Categorical] = {}
        for feature in self.categorical:
            found.setdefault(feature.table, feature)
        return types.MappingProxyType(found)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs: the features, and the lengths of those that are lists."""
        names = [f.name for f in self.features]
        return (*names, *(f.length_name for f in self.categorical if f.is_list))

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to count from the training rows."""
        vocabularies = all(
            f.vocabulary is not None or f.num_ids or f.hash_buckets for f in self.categorical
        )
        return vocabularies and all(f.mean is not None for f in self.dense)

    def with_features(self, features: Iterable[Feature]) -> Schema:
        """This schema with other features."""
        return dataclasses.replace(self, features=tuple(features))

    def to_config(self) -> dict[str, Any]:
        """Plain data that `from_config` takes, and JSON can hold."""
        config = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "features"
        }
        features = [
            {
                "kind": "categorical" if isinstance(f, Categorical) else "dense",
                **{
                    field.name: _plain(getattr(f, field.name))
                    for field in dataclasses.fields(f)
                    if getattr(f, field.name) != field.default
                },
            }
            for f in self.features
        ]
        return {"features": features, **{k: _plain(v) for k, v in config.items() if v}}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schema:
        """Builds a schema from plain data.

        Args:
          config: as made by `to_config`: `features` is a list of mappings with `kind`
            ("categorical", the default, or "dense") and the attributes of that kind.

        Raises:
          ValueError: an unknown key or value, or a name declared twice.

        Example:
        >>> schema = Schema.from_config({
        ...     "features": [{"name": "user_id", "num_ids": 10}, {"kind": "dense", "name": "age"}],
        ...     "labels": ["click"],
        ... })
        >>> schema.input_names
        ('user_id', 'age')
        """
        features = []
        for number, entry in enumerate(config.get("features", ())):
            values = dict(entry)
            kind = values.pop("kind", "categorical")
            if kind not in _KINDS:
                raise ValueError(
                    f"schema.features[{number}]: `kind` should be one of {tuple(_KINDS)}. "
                    f"Received: {kind!r}"
                )
            where = f"schema.features[{number}] ({values.get('name', 'no name')})"
            features.append(from_mapping(_KINDS[kind], values, where))
        return cast(Schema, from_mapping(cls, {**config, "features": features}, "schema"))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value
