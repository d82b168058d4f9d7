"""What a schema leaves to be counted from the training rows: vocabularies, means and variances."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from qianmo.layers.features import Categorical, Dense, Feature
from qianmo.layers.schema import Domain, Schema
from qianmo.pipelines.data import readers


@dataclasses.dataclass
class _Moments:
    """Count, mean and sum of squared deviations of the values seen so far, in float64.

    Two sets A and B are joined by Chan's formula, with d = mean_B - mean_A and n = n_A + n_B:

      mean = mean_A + d n_B / n
      M2 = M2_A + M2_B + d^2 n_A n_B / n

    It does not cancel where a sum of squares would.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    missing: int = 0

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Counts the values that are not NaN, and those that are."""
        is_there = ~np.isnan(values)
        self.missing += int((~is_there).sum())
        values = values[is_there].astype(np.float64)
        if not values.size:
            return
        mean = float(values.mean())
        count = self.count + len(values)
        delta = mean - self.mean
        self.squares += float(np.square(values - mean).sum())
        self.squares += delta**2 * self.count * len(values) / count
        self.mean += delta * len(values) / count
        self.count = count

    @property
    def is_constant(self) -> bool:
        """Whether the spread is no more than the rounding of float32 inputs."""
        return self.squares / self.count <= (1e-7 * self.mean) ** 2

    @property
    def variance(self) -> float:
        """The variance; 1 for a constant, which then enters as 0 and any other value stays tame."""
        return 1.0 if self.is_constant else self.squares / self.count


def without_empty_domains(schema: Schema, path: readers.PathLike) -> Schema:
    """Takes domains that no training row has out of the domain feature's given vocabulary.

    Parts of their own would have learned nothing; as unknown domains they get the shared parts.

    Raises:
      DataError: a feature belongs to such domains alone.
    """
    feature = schema.domain_feature
    if feature is None or not feature.vocabulary:
        return schema
    alone = Schema(features=(feature,), labels=schema.labels, domain=schema.domain)
    seen: set[Domain] = set()
    for block in readers.blocks(alone, path, targets=False):
        seen.update(map(_plain, set(block[feature.name].tolist())))
    empty = [domain for domain in feature.vocabulary if domain not in seen]
    if not empty or not seen.intersection(feature.vocabulary):
        return schema
    print(f"No training row is of domains {empty}: they are scored as unknown ones.")
    features: list[Feature] = []
    for each in schema.features:
        domains = tuple(domain for domain in each.domains if domain not in empty)
        if each.domains and not domains:
            raise readers.DataError(
                f"{path}: feature `{each.name}` belongs to domains {each.domains}, of which there "
                "is no row. Give such rows, or take the feature out of the schema."
            )
        each = dataclasses.replace(each, domains=domains)
        if isinstance(each, Categorical) and each.table == feature.table:
            kept = tuple(domain for domain in feature.vocabulary if domain not in empty)
            each = dataclasses.replace(each, vocabulary=kept)
        features.append(each)
    return schema.with_features(features)


def _plain(value: Any) -> Any:
    """A value as schemas hold it."""
    return value.decode() if isinstance(value, bytes) else value


def inherit(schema: Schema, start: Schema) -> Schema:
    """Takes what is not counted yet from another schema's features and labels of the same names."""
    known = {feature.name: feature for feature in start.features}
    features: list[Feature] = []
    for feature in schema.features:
        other = known.get(feature.name)
        if isinstance(feature, Dense) and isinstance(other, Dense) and feature.mean is None:
            feature = dataclasses.replace(feature, mean=other.mean, variance=other.variance)
        elif (
            isinstance(feature, Categorical)
            and isinstance(other, Categorical)
            and feature.vocabulary is None
            and not (feature.num_ids or feature.hash_buckets)
        ):
            feature = dataclasses.replace(feature, vocabulary=other.vocabulary)
        features.append(feature)
    moments = {
        label: start.label_moments[label]
        for label in _ratings(schema)
        if label in start.label_moments
    }
    schema = dataclasses.replace(schema, label_moments={**moments, **schema.label_moments})
    return schema.with_features(features)


def _ratings(schema: Schema) -> list[str]:
    return [label for label in schema.labels if schema.kind(label) == "rating"]


def _own_rows(schema: Schema, feature: Feature, block: readers.Block) -> Any:
    """Index of the rows whose domains have the feature."""
    if not feature.domains:
        return slice(None)
    return readers.is_of(block[schema.domain], feature.domains)


class Counted(NamedTuple):
    """What a pass over the training rows gave.

    Attributes:
      schema: the schema with what was left to count.
      constant: single features and labels that have one value in all rows that have them, and
        that value; among numbers also those that differ by no more than float32 rounds.
      tally: how many rows there are, and what was left out of them.
    """

    schema: Schema
    constant: dict[str, Any]
    tally: readers.Tally

    def lines(self) -> list[str]:
        """What a reader of the schema alone would not expect, a sentence each."""
        lines = self.tally.lines(self.schema)
        for name, value in self.constant.items():
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            lines.append(f"`{name}` is {shown} in all rows: nothing can be learned from it.")
        return lines


def complete(
    schema: Schema,
    path: readers.PathLike,
    observe: Callable[[readers.Block], object] | None = None,
) -> Schema:
    """Counts what the schema does not give, and says what was left out and what is constant.

    Args, and what is raised, are those of `count`. Without `observe`, a schema of which nothing is
    left to count is returned as it is, and no row is read.
    """
    if schema.is_complete and observe is None:
        return schema
    counted = count(schema, path, observe)
    for line in counted.lines():
        print(f"{path}: {line}")
    return counted.schema


def count(
    schema: Schema,
    path: readers.PathLike,
    observe: Callable[[readers.Block], object] | None = None,
) -> Counted:
    """Counts in one pass what the schema does not give, and checks every row on the way.

    Features that share a table are counted together. A vocabulary is ordered by count, largest
    first, then by value. Items cut off from long lists are not counted. A null is counted as the
    value that it is read as. What a domain owns is counted from its own rows. Means and variances
    are those of the values that are there; of a rating, in the rows whose weight for it is not 0.

    Args:
      schema: any schema.
      path: the training rows, as for `readers.blocks`. Never give it evaluation rows.
      observe: sees each block of rows once, in the files' order, and leaves it as it is.

    Raises:
      DataError: the rows do not fit the schema, no value is as frequent as `min_count` asks, or a
        dense feature or rating has no value at all.
    """
    counts = _Counts(schema)
    tally = readers.Tally()
    for block in readers.blocks(schema, path, tally=tally):
        counts.add(block)
        if observe is not None:
            observe(block)
    constant = counts.constant()
    return Counted(counts.completed(path), constant, tally)


class _Counts:
    """What has been counted for a schema."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self._values: dict[str, collections.Counter[Any]] = {
            name: collections.Counter()
            for name, feature in schema.tables.items()
            if feature.vocabulary is None and not feature.num_ids and not feature.hash_buckets
        }
        self._moments = {feature.name: _Moments() for feature in schema.dense}
        self._moments |= {rating: _Moments() for rating in _ratings(schema)}
        self._only: dict[str, Any] = {}  # the value of each column that has had one value so far
        self._varied: set[str] = set()

    def add(self, block: readers.Block) -> None:
        """Counts a block."""
        for feature in self.schema.categorical:
            own = _own_rows(self.schema, feature, block)
            values = block[feature.name][own]
            if feature.is_list:
                lengths = block[feature.length_name][own]
                values = values[np.arange(feature.max_length) < lengths[:, None]]
            else:
                self._compare(feature.name, values)
            if feature.table in self._values:
                self._count(self._values[feature.table], values)
        for dense in self.schema.dense:
            values = block[dense.name][_own_rows(self.schema, dense, block)]
            self._compare(dense.name, values)
            self._moments[dense.name].add(values)
        labels, _ = readers.labels_and_weights(self.schema, block)
        for label, values in zip(self.schema.labels, labels.T, strict=True):
            self._compare(label, values[~np.isnan(values)])
            if label in self._moments:
                self._moments[label].add(values)

    def _count(self, counter: collections.Counter[Any], values: Any) -> None:
        if values.dtype == object:
            counter.update(values.tolist())
            return
        distinct, times = np.unique(values, return_counts=True)
        for value, number in zip(distinct.tolist(), times.tolist(), strict=True):
            counter[value] += number

    def _compare(self, name: str, values: Any) -> None:
        if name in self._varied or not len(values):
            return
        first = self._only.setdefault(name, values[0])
        for some in (values[:100], values):  # most columns differ soon
            same = some == first if first == first else some != some  # NaN is NaN
            if not same.all():
                self._varied.add(name)
                del self._only[name]
                return

    def constant(self) -> dict[str, Any]:
        """Columns of one value, and that value."""
        found = {
            name: _plain(value.item() if isinstance(value, np.generic) else value)
            for name, value in self._only.items()
        }
        for name, moments in self._moments.items():
            if moments.count and moments.is_constant and not moments.missing:
                found.setdefault(name, moments.mean)
        return found

    def completed(self, path: readers.PathLike) -> Schema:
        """The schema with what was counted.

        Raises:
          DataError: there is nothing to count by.
        """
        schema = self.schema
        given = {f.name for f in schema.dense if f.mean is not None} | {*schema.label_moments}
        moments = {name: one for name, one in self._moments.items() if name not in given}
        for name, seen in moments.items():
            if not seen.count:
                raise readers.DataError(
                    f"{path}, column `{name}`: no row has a value. Take it out of the schema."
                )
        vocabularies = {
            name: self._vocabulary(path, schema.tables[name], counter)
            for name, counter in self._values.items()
        }
        features: list[Feature] = []
        for feature in schema.features:
            if isinstance(feature, Categorical) and feature.table in vocabularies:
                feature = dataclasses.replace(feature, vocabulary=vocabularies[feature.table])
            elif isinstance(feature, Dense) and feature.name in moments:
                seen = moments[feature.name]
                feature = dataclasses.replace(feature, mean=seen.mean, variance=seen.variance)
            features.append(feature)
        of_labels = {
            label: (moments[label].mean, moments[label].variance)
            for label in schema.labels
            if label in moments
        }
        schema = dataclasses.replace(schema, label_moments={**schema.label_moments, **of_labels})
        return schema.with_features(features)

    def _vocabulary(
        self, path: readers.PathLike, table: Categorical, counter: collections.Counter[Any]
    ) -> tuple[Any, ...]:
        frequent = [(-n, value) for value, n in counter.items() if n >= table.min_count]
        if not frequent:
            raise readers.DataError(
                f"{path}, column `{table.name}`: no value occurs `min_count` = {table.min_count} "
                "times. Lower it, or take the feature out of the schema."
            )
        return tuple(_plain(value) for _, value in sorted(frequent))
