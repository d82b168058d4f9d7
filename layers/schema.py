"""What a row of data holds: features, labels and the columns that describe the row.

Declared once, as plain data, and used by the readers, the encoder, the embeddings, the exporters
and the serving signatures alike.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from qianmo.layers.features import Categorical, Dense, Feature, check_name, from_mapping

LabelKind = Literal["binary", "rating"]
Domain = int | str
DAY = "day"  # in `gauc_by`: the day of the row's timestamp
UNITS = {"s": 1, "ms": 10**3, "us": 10**6}  # of a timestamp, in a second
_KINDS: dict[str, type[Any]] = {"categorical": Categorical, "dense": Dense}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """All that is known of a row.

    Attributes:
      features: the model's inputs.
      labels: columns to predict.
      label_kinds: label -> "binary", in [0, 1] and learned by cross-entropy, or "rating", any
        number, learned by squared error. Labels not named are binary.
      label_moments: rating -> its mean and variance in the training rows, counted when not given.
      label_weights: label -> what its loss is multiplied by: a number, or the name of a column of
        numbers >= 0. A row where the column holds 0 does not have the label; it is in neither its
        loss nor its metrics. A number of 0 leaves the metrics. 1 if not named.
      optional_labels: labels that may be null or NaN: such a row does not have the label.
      label_domains: label -> the domains whose rows have it. Labels not named here are those of
        every row; those of other domains' rows are not read.
      weight: column of the rows' weights (>= 0), if any.
      timestamp: column of event times, if any: int64, or datetimes, dates and ISO 8601 text, which
        are read as int64 in `timestamp_unit` since 1970, UTC, rounded down.
      timestamp_unit: "s", "ms" or "us".
      event_id: int64 column that tells apart events of one task at one time, if any.
      task_id: column of the task (user, scene, adgroup), if any; the unit of GAUC.
      task_dtype: "int64" or "string". Strings are known by a hash of 64 bits, `task_key`.
      domain: column of the domain (scene), if any: int64 or string. A model whose parts differ by
        domain needs it among its features too, with a vocabulary or `num_ids`.
      domain_weights: pairs of a domain and the weight of its rows in the training loss, by which
        domains are mixed; 1 for those not named.
      only_domains: the domains whose rows are read, so that one recipe trains a model of one domain
        on the rows of all; empty for every row.
      group: column (int64 or string) by which evaluation reports groups of users, if any.
      gauc_by: columns of any type whose equal values make a group of GAUC; "day" is the day of the
        timestamp, UTC. Read by evaluation alone. Default: the task.
    """

    features: tuple[Feature, ...]
    labels: tuple[str, ...]
    label_kinds: Mapping[str, LabelKind] = dataclasses.field(default_factory=dict)
    label_moments: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    label_weights: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    optional_labels: tuple[str, ...] = ()
    label_domains: Mapping[str, tuple[Domain, ...]] = dataclasses.field(default_factory=dict)
    weight: str = ""
    timestamp: str = ""
    timestamp_unit: Literal["s", "ms", "us"] = "us"
    event_id: str = ""
    task_id: str = ""
    task_dtype: Literal["int64", "string"] = "int64"
    domain: str = ""
    domain_weights: tuple[tuple[Domain, float], ...] = ()
    only_domains: tuple[Domain, ...] = ()
    group: str = ""
    gauc_by: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("A schema should have at least one feature.")
        if isinstance(self.labels, str):
            raise ValueError(f"`labels` should be a list of names. Received: {self.labels!r}")
        if not self.labels:
            raise ValueError("A schema should have at least one label.")
        self._check_names()
        self._check_labels()
        self._check_roles()
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

    def _check_names(self) -> None:
        """Every name of a served input or output, and of a table's file, is there once.

        TensorFlow makes names of one graph differ by more than case, and so do file systems.
        """
        origins: dict[str, tuple[str, str]] = {}

        def claim(name: str, what: str) -> None:
            if name.lower() not in origins:
                origins[name.lower()] = (name, what)
                return
            other, before = origins[name.lower()]
            if (other, before) == (name, what):
                raise ValueError(f"`{name}` is declared twice as {what}.")
            by_case = "" if other == name else " Names should differ by more than case."
            raise ValueError(
                f"`{other}` is {before} and `{name}` is {what}. Rename one of them.{by_case}"
            )

        for feature in self.features:
            claim(feature.name, "a feature")
        for label in self.labels:
            check_name(label)
            claim(label, "a label")
        for feature in self.categorical:
            if feature.is_list:
                claim(feature.length_name, f"the length of the list `{feature.name}`")
        for name in (*self.input_names, *self.labels):
            claim(f"support_{name}", f"the input for the support rows' `{name}`")
        roles = {self.task_id, self.timestamp, self.event_id, self.domain} - {""}
        for name in sorted(roles - set(self.input_names)):
            check_name(name)
            claim(name, "a column that describes the row")
        if self.task_id and self.timestamp and not self.event_id:
            claim("event_id", "the input for an event's id, which `schema.event_id` may name")
        if self.domain and f"{self.domain}_id".lower() in map(str.lower, self.input_names):
            raise ValueError(
                f"`{self.domain}_id` is a feature and the input for the raw domain beside vectors. "
                "Rename the feature."
            )
        tables: dict[str, str] = {}
        for table in self.tables:
            other = tables.setdefault(table.lower(), table)
            if other != table:
                raise ValueError(
                    f"tables `{other}` and `{table}` differ by case alone; rename one."
                )

    def _check_labels(self) -> None:
        for key in ("label_kinds", "label_moments", "label_weights", "label_domains"):
            for label in getattr(self, key):
                if label not in self.labels:
                    raise ValueError(
                        f"`{key}` should name labels. Received: {label!r}, and the labels are "
                        f"{self.labels}"
                    )
        for label in self.optional_labels:
            if label not in self.labels:
                raise ValueError(
                    f"`optional_labels` should name labels. Received: {label!r}, and the labels "
                    f"are {self.labels}"
                )
        for label, weight in self.label_weights.items():
            if not isinstance(weight, str) and not 0 <= weight < math.inf:
                raise ValueError(
                    f"`label_weights`: that of {label} should be a column or a number >= 0. "
                    f"Received: {weight}"
                )
        for label, (mean, variance) in self.label_moments.items():
            if not (math.isfinite(mean) and 0 < variance < math.inf):
                raise ValueError(
                    f"`label_moments`: those of {label} should be a mean and a variance > 0. "
                    f"Received: {(mean, variance)}"
                )

    def _check_roles(self) -> None:
        if self.event_id and not (self.task_id and self.timestamp):
            raise ValueError("`event_id` needs `task_id` and `timestamp`, within which it tells.")
        if DAY in self.gauc_by and not self.timestamp:
            raise ValueError(f"`gauc_by`: {DAY!r} needs `timestamp`, which names no column.")
        task = next((f for f in self.features if f.name == self.task_id), None)
        dtype = getattr(task, "dtype", "float32") if task else self.task_dtype
        if dtype != self.task_dtype or (isinstance(task, Categorical) and task.is_list):
            raise ValueError(
                f"`task_id` names the feature `{self.task_id}`, which should hold one "
                f"{self.task_dtype} a row, as `task_dtype` says. Received: {dtype}"
            )

    def _check_domains(self) -> None:
        owned = {f"feature `{f.name}`": f.domains for f in self.features if f.domains}
        for label in self.label_domains:
            if not self.domain:
                raise ValueError(f"label `{label}` has domains; `domain` should name a column.")
        for key in ("only_domains", "domain_weights"):
            if getattr(self, key) and not self.domain:
                raise ValueError(f"`{key}` needs `domain`, which names no column.")
        for domain, weight in self.domain_weights:
            if not 0 <= weight < math.inf:
                raise ValueError(
                    f"`domain_weights`: that of domain {domain} should be >= 0. Received: {weight}"
                )
        feature = self.domain_feature
        if owned and feature is None:
            raise ValueError(
                f"{next(iter(owned))} is owned by domains: the column that `domain` names should "
                "be a feature too, with a vocabulary or `num_ids`, one value a row. "
                f"Received: {self.domain!r}"
            )
        if feature is not None and feature.domains:
            raise ValueError(f"feature `{feature.name}` tells the domain; no domain can own it.")
        kind = int if self.domain_dtype == "int64" else str
        for where, domains in (
            *owned.items(),
            *((f"`label_domains`: {label}", d) for label, d in self.label_domains.items()),
            ("`only_domains`", self.only_domains),
            ("`domain_weights`", tuple(domain for domain, _ in self.domain_weights)),
        ):
            for domain in domains:
                if not isinstance(domain, kind):
                    raise ValueError(
                        f"{where}: domains should be {self.domain_dtype}. Received: {domain!r}"
                    )
        for where, domains in owned.items():
            if feature is None or (feature.vocabulary is None and not feature.num_ids):
                break  # checked again when the vocabulary has been counted
            for domain in domains:
                if not self._index(domain):
                    raise ValueError(f"{where}: domain {domain} is not in `{feature.name}`.")

    def kind(self, label: str) -> LabelKind:
        """What a label is."""
        return self.label_kinds.get(label, "binary")

    @property
    def domain_dtype(self) -> Literal["int64", "string"]:
        """The type of domains, which a feature of that name tells, or else those named here."""
        for f in self.categorical:
            if f.name == self.domain:
                return f.dtype
        named = [*self.only_domains, *(domain for domain, _ in self.domain_weights)]
        named += [domain for domains in self.label_domains.values() for domain in domains]
        return "string" if named and isinstance(named[0], str) else "int64"

    @property
    def domain_feature(self) -> Categorical | None:
        """The feature that tells a row's domain, if there is one."""
        for f in self.categorical:
            if f.name == self.domain and not f.is_list and not f.hash_buckets:
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
                "among the features: one value a row, with a vocabulary or `num_ids`. "
                f"Received: {self.domain!r}"
            )
        return feature.num_rows - 1

    def _index(self, domain: Domain) -> int:
        feature = self.domain_feature
        if feature is None:
            return 0
        if feature.num_ids and isinstance(domain, int):
            return domain + 1 if 0 <= domain < feature.num_ids else 0
        known = feature.vocabulary or ()
        return known.index(domain) + 1 if domain in known else 0

    def owners(self, domains: Iterable[Domain]) -> tuple[bool, ...]:
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
    def dense_columns(self) -> tuple[str, ...]:
        """The feature of each column of `Encoded.dense`: values in order, then indicators."""
        values = [f.name for f in self.dense]
        return (*values, *(f.name for f in self.dense if f.indicator))

    @property
    def dense_width(self) -> int:
        """Columns of `Encoded.dense`."""
        return len(self.dense_columns)

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
        moments = all(f.mean is not None for f in self.dense)
        ratings = [label for label in self.labels if self.kind(label) == "rating"]
        return vocabularies and moments and all(label in self.label_moments for label in ratings)

    def with_features(self, features: Iterable[Feature]) -> Schema:
        """This schema with other features."""
        return dataclasses.replace(self, features=tuple(features))

    def narrowed(self, *names: str) -> Schema:
        """Some features and the labels, as a schema to read them alone.

        The domain stays, which tells the rows that have a feature or label and those to be read.
        """
        kept = (*names, self.domain)
        return dataclasses.replace(
            self,
            features=tuple(f for f in self.features if f.name in kept),
            label_weights={},
            weight="",
            timestamp="",
            event_id="",
            task_id="",
            task_dtype="int64",
            group="",
            gauc_by=(),
        )

    def to_config(self) -> dict[str, Any]:
        """Plain data that `from_config` takes, and JSON can hold."""
        config = {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)
            if f.name != "features" and getattr(self, f.name) not in (f.default, {})
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
        return {"features": features, **config}

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
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
