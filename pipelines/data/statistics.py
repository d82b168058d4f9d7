"""What a schema leaves to be counted from the training rows: vocabularies, means and variances."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

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

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Counts the values that are not NaN."""
        values = values[~np.isnan(values)].astype(np.float64)
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
    def variance(self) -> float:
        """The variance; 1 for a constant, which then enters as 0 and any other value stays tame."""
        variance = self.squares / self.count
        # Below this the spread is the rounding of float32 inputs.
        return variance if variance > (1e-7 * self.mean) ** 2 else 1.0


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


def complete(
    schema: Schema,
    path: readers.PathLike,
    *,
    observe: Callable[[readers.Block], None] | None = None,
) -> Schema:
    """Counts in one pass what the schema does not give, and checks every row on the way.

    Features that share a table are counted together. A vocabulary is ordered by count, largest
    first, then by value. Items cut off from long lists are not counted. A null is counted as the
    value that it is read as. What a domain owns is counted from its own rows. Means and variances
    are those of the values that are there; of a rating, in the rows whose weight for it is not 0.

    Args:
      schema: any schema; returned as it is when nothing is left to count.
      path: the training rows, as for `readers.blocks`. Never give it evaluation rows.
      observe: sees every block, also where nothing is left to count.

    Raises:
      DataError: the rows do not fit the schema, no value is as frequent as `min_count` asks, or a
        dense feature or rating has no value at all.
    """
    if schema.is_complete and observe is None:
        return schema
    counts: dict[str, collections.Counter[Any]] = {
        name: collections.Counter()
        for name, feature in schema.tables.items()
        if feature.vocabulary is None and not feature.num_ids and not feature.hash_buckets
    }
    moments = {feature.name: _Moments() for feature in schema.dense if feature.mean is None}
    moments |= {r: _Moments() for r in _ratings(schema) if r not in schema.label_moments}
    tally = readers.Tally()
    for block in readers.blocks(schema, path, tally=tally):
        if observe is not None:
            observe(block)
        for feature in schema.categorical:
            if feature.table not in counts:
                continue
            own = _own_rows(schema, feature, block)
            values = block[feature.name][own]
            if feature.is_list:
                lengths = block[feature.length_name][own]
                values = values[np.arange(feature.max_length) < lengths[:, None]]
            if feature.dtype == "int64":
                distinct, times = np.unique(values, return_counts=True)
                for value, number in zip(distinct.tolist(), times.tolist(), strict=True):
                    counts[feature.table][value] += number
            else:
                counts[feature.table].update(values.tolist())
        for dense in schema.dense:
            if dense.name in moments:
                moments[dense.name].add(block[dense.name][_own_rows(schema, dense, block)])
        labels, _ = readers.labels_and_weights(schema, block)
        for label, values in zip(schema.labels, labels.T, strict=True):
            if label in moments:
                moments[label].add(values)

    for line in tally.lines(schema):
        print(f"{path}: {line}")
    for name, seen in moments.items():
        if not seen.count:
            raise readers.DataError(
                f"{path}, column `{name}`: no row has a value. Take it out of the schema."
            )
    vocabularies: dict[str, tuple[Any, ...]] = {}
    for name, counter in counts.items():
        feature = schema.tables[name]
        frequent = [(-n, value) for value, n in counter.items() if n >= feature.min_count]
        if not frequent:
            raise readers.DataError(
                f"{path}, column `{feature.name}`: no value occurs `min_count` = "
                f"{feature.min_count} times. Lower it, or take the feature out of the schema."
            )
        vocabularies[name] = tuple(_plain(value) for _, value in sorted(frequent))

    def completed(feature: Feature) -> Feature:
        if isinstance(feature, Categorical):
            if feature.table not in vocabularies:
                return feature
            return dataclasses.replace(feature, vocabulary=vocabularies[feature.table])
        if feature.name not in moments:
            return feature
        seen = moments[feature.name]
        return dataclasses.replace(feature, mean=seen.mean, variance=seen.variance)

    of_labels = {
        label: (moments[label].mean, moments[label].variance)
        for label in schema.labels
        if label in moments
    }
    schema = dataclasses.replace(schema, label_moments={**schema.label_moments, **of_labels})
    return schema.with_features(map(completed, schema.features))
