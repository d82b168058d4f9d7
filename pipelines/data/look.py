"""A look at rows before anything is made of them: what they hold, and what is wrong with them.

Rows, labels, weights and missing values are counted exactly, in a pass that is made anyway. The
rest is told by a uniform sample of `SAMPLE_ROWS` rows, which is all of a smaller data set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qianmo.layers import metrics
from qianmo.layers.features import Categorical, Dense, Feature
from qianmo.layers.hashing import mix64
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import batches, readers
from qianmo.pipelines.data.readers import Block, num_rows
from qianmo.pipelines.data.summaries import Column, Summary, warnings

SAMPLE_ROWS = 2**17
TASK_ROWS = 2**22  # of whole tasks, among which duplicates are looked for

_FEW_POSITIVES = 20  # below which an AUC is chance
_BINS = 10

Floats = npt.NDArray[np.float64]


class Look:
    """Watches the blocks of a pass.

    Args:
      schema: of the rows; vocabularies need not be known yet.
      seed: of the sample.

    Attributes:
      rows: how many were seen.
      tally: for the reader, to count what it leaves out.
    """

    def __init__(self, schema: Schema, seed: int = 0) -> None:
        self._schema = schema
        self._random = np.random.default_rng(seed)
        self.rows = 0
        self.tally = readers.Tally()
        nothing = {"rows": 0.0, "counted": 0.0, "sum": 0.0, "classes": 1.0}
        nothing |= {"low": np.inf, "high": -np.inf}
        self._labels = {label: dict(nothing) for label in schema.labels}
        self._weight = {"sum": 0.0, "low": np.inf, "high": -np.inf, "zeros": 0.0}
        self._missing = dict.fromkeys((f.name for f in schema.features), 0)
        self._kept: list[Block] = []
        self._keys: list[Floats] = []
        self._bound = 1.0  # rows with a greater random key are not in the sample
        self._events: list[npt.NDArray[np.int64]] = []
        self._task_share = 1

    def observe(self, block: Block) -> None:
        """Counts a block's rows, and samples some."""
        rows = num_rows(block)
        self.rows += rows
        self._observe_labels(block)
        if self._schema.weight in block:
            weight = block[self._schema.weight].astype(np.float64)
            self._weight["sum"] += float(weight.sum())
            self._weight["zeros"] += int((weight == 0).sum())
            self._weight["low"] = min(self._weight["low"], float(weight.min(initial=np.inf)))
            self._weight["high"] = max(self._weight["high"], float(weight.max(initial=-np.inf)))
        for feature in self._schema.features:
            if isinstance(feature, Dense):
                self._missing[feature.name] += int(np.isnan(block[feature.name]).sum())
            elif feature.is_list:
                self._missing[feature.name] += int((block[feature.length_name] == 0).sum())
            elif feature.default is not None:
                self._missing[feature.name] += int((block[feature.name] == _raw(feature)).sum())
        self._sample(block, rows)
        self._watch_events(block)

    def _observe_labels(self, block: Block) -> None:
        labels, weights = batches.labels_and_weights(self._schema, block)
        weights = weights * batches.row_weights(self._schema, block)[:, None]
        for k, seen in enumerate(self._labels.values()):
            values = labels[:, k].astype(np.float64)
            counted = values[weights[:, k] > 0]
            values = values[~np.isnan(values)]
            seen["rows"] += len(values)
            seen["counted"] += len(counted)
            seen["sum"] += float(values.sum())
            seen["low"] = min(seen["low"], float(counted.min(initial=np.inf)))
            seen["high"] = max(seen["high"], float(counted.max(initial=-np.inf)))
            seen["classes"] *= float(np.isin(values, (0, 1)).all())

    def _sample(self, block: Block, rows: int) -> None:
        keys = self._random.random(rows)
        own = np.flatnonzero(keys < self._bound)
        self._kept.append({name: values[own] for name, values in block.items()})
        self._keys.append(keys[own])
        if sum(map(len, self._keys)) > 2 * SAMPLE_ROWS:
            self._shrink()

    def _shrink(self) -> None:
        keys = np.concatenate(self._keys)
        own = np.sort(np.argsort(keys, kind="stable")[:SAMPLE_ROWS])
        names = self._kept[0].keys()
        block = {name: np.concatenate([b[name] for b in self._kept])[own] for name in names}
        self._kept, self._keys = [block], [keys[own]]
        if len(keys) > SAMPLE_ROWS:
            self._bound = float(keys[own].max())

    def _watch_events(self, block: Block) -> None:
        schema = self._schema
        if not (schema.task_id in block and schema.timestamp in block):
            return
        columns = [readers.task_ids(schema, block), block[schema.timestamp]]
        if schema.event_id in block:
            columns.append(block[schema.event_id])
        keys = np.stack(columns, 1)
        self._events.append(keys[mix64(keys[:, 0]) % self._task_share == 0])
        if sum(map(len, self._events)) > TASK_ROWS:  # half of the tasks, each whole, stay
            self._task_share *= 2
            keys = np.concatenate(self._events)
            self._events = [keys[mix64(keys[:, 0]) % self._task_share == 0]]

    def sample(self) -> Block:
        """The sampled rows."""
        if not self._kept:
            return {}
        self._shrink()
        return self._kept[0]

    def summary(self, schema: Schema, reference: Summary | None = None) -> Summary:
        """What was found.

        Args:
          schema: the completed one, with vocabularies.
          reference: of other rows, whose bins are taken, so that `drift` can compare the two.
        """
        bins = {c.name: c.edges for c in reference.columns} if reference else {}
        sample = self.sample()
        sampled = num_rows(sample)
        labels = {
            label: {
                **seen,
                "mean": seen["sum"] / seen["rows"] if seen["rows"] else float("nan"),
            }
            for label, seen in self._labels.items()
        }
        weight = {}
        if self._schema.weight and self.rows:
            weight = {
                "mean": self._weight["sum"] / self.rows,
                "low": self._weight["low"],
                "high": self._weight["high"],
                "zeros": self._weight["zeros"] / self.rows,
            }
        columns = [
            _column(
                schema,
                feature,
                sample,
                self._missing[feature.name] / max(self.rows, 1),
                bins.get(feature.name),
            )
            for feature in schema.features
        ]
        found = Summary(self.rows, sampled, labels, weight, columns, self._duplicates())
        found.left_out = self.tally.lines(schema)
        found.warnings = [*warnings(schema, found)]
        return found

    def _duplicates(self) -> float | None:
        if not self._events:
            return None
        keys = np.concatenate(self._events)
        if not len(keys):
            return 0.0
        _, counts = np.unique(keys, axis=0, return_counts=True)
        return float(counts[counts > 1].sum() / len(keys))


def _raw(feature: Categorical) -> Any:
    value = feature.default
    return value.encode() if isinstance(value, str) else value


def _own(schema: Schema, feature: Feature, sample: Block) -> npt.NDArray[np.bool_]:
    """Which sampled rows have the feature."""
    if not feature.domains:
        return np.ones(num_rows(sample), bool)
    domains = [d.encode() if isinstance(d, str) else d for d in feature.domains]
    return np.isin(sample[schema.domain], domains)


def _column(
    schema: Schema, feature: Feature, sample: Block, missing: float, edges: list[Any] | None
) -> Column:
    own = _own(schema, feature, sample)
    if isinstance(feature, Dense):
        found = Column(feature.name, "dense", missing)
        x = sample[feature.name][own].astype(np.float64)
        present = x[~np.isnan(x)]
        if len(present):
            found.distinct = len(np.unique(present))
            found.mean, found.deviation = float(present.mean()), float(present.std())
            found.low, found.high = float(present.min()), float(present.max())
            if edges is None:
                quantiles = np.quantile(present, np.linspace(0, 1, _BINS + 1)[1:-1])
                edges = np.unique(quantiles).tolist()
            found.edges = edges
            found.histogram = shares(found, sample[feature.name][own])
    else:
        found = Column(feature.name, "list" if feature.is_list else "categorical", missing)
        values = sample[feature.name][own]
        if feature.is_list:
            lengths = sample[feature.length_name][own]
            values = values[np.arange(feature.max_length) < lengths[:, None]]
            if len(lengths):
                found.mean, found.deviation = float(lengths.mean()), float(lengths.std())
                found.full = float((lengths == feature.max_length).mean())
        if len(values):
            distinct, counts = np.unique(values, return_counts=True)
            found.distinct = len(distinct)
            found.top = float(counts.max() / counts.sum())
            found.unknown = float(counts[~_is_known(feature, distinct)].sum() / counts.sum())
            if edges is None:
                most = np.argsort(-counts, kind="stable")[: 2 * _BINS]
                edges = [_text(value) for value in distinct[np.sort(most)].tolist()]
            found.edges = edges
            found.histogram = shares(found, values)
    for label in schema.labels:
        if schema.kind(label) == "binary" and label in sample:
            leak = _auc_alone(feature, sample, sample[label], own, schema)
            if leak is not None:
                found.leak[label] = leak
    return found


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _is_known(feature: Categorical, values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which values have a row of their own in the feature's table."""
    if feature.num_ids:
        return np.asarray((values >= 0) & (values < feature.num_ids))
    if feature.hash_buckets or feature.vocabulary is None:
        return np.ones(len(values), bool)
    known = [v.encode() if isinstance(v, str) else v for v in feature.vocabulary]
    return np.isin(values, np.array(known, values.dtype))


def shares(column: Column, values: npt.NDArray[Any]) -> list[float]:
    """The share of values in each bin of a column.

    Bins of a dense feature lie between its `edges`, with one more for missing values; those of a
    categorical one are the values in `edges`, with one more for all others.
    """
    if not len(values):
        return []
    if column.kind == "dense":
        x = values.astype(np.float64)
        present = x[~np.isnan(x)]
        counts = np.bincount(
            np.searchsorted(column.edges, present), minlength=len(column.edges) + 1
        )
        counts = np.append(counts, len(x) - len(present))
    else:
        distinct, times = np.unique(values, return_counts=True)
        known = dict(zip(map(_text, distinct.tolist()), times.tolist(), strict=True))
        counts = np.array([known.get(value, 0) for value in column.edges])
        counts = np.append(counts, len(values) - counts.sum())
    return [float(count) for count in counts / len(values)]


def _auc_alone(
    feature: Feature,
    sample: Block,
    labels: npt.NDArray[Any],
    own: npt.NDArray[np.bool_],
    schema: Schema,
) -> float | None:
    """AUC of a feature by itself, above 1/2; None where too little is there to tell.

    A categorical value scores as the label's rate among its rows in the other half of the sample; a
    list by whether it holds the row's own value of another feature of the same table.
    """
    rows = own & np.isin(labels, (0, 1))
    y = labels[rows]
    if not _FEW_POSITIVES <= y.sum() <= len(y) - _FEW_POSITIVES:
        return None
    if isinstance(feature, Dense):
        x = sample[feature.name][rows].astype(np.float64)
        x = np.where(np.isnan(x), np.nanmean(x) if not np.isnan(x).all() else 0.0, x)
    elif feature.is_list:
        item = next(
            (f for f in schema.categorical if f.table == feature.table and not f.is_list), None
        )
        if item is None:
            return None
        inside = np.arange(feature.max_length) < sample[feature.length_name][rows][:, None]
        x = ((sample[feature.name][rows] == sample[item.name][rows][:, None]) & inside).any(1)
    else:
        _, codes = np.unique(sample[feature.name][rows], return_inverse=True)
        half = np.arange(len(y)) % 2
        x = np.empty(len(y))
        for part in (0, 1):
            other = half != part
            count = np.bincount(codes[other], minlength=codes.max() + 1)
            clicks = np.bincount(codes[other], y[other], minlength=codes.max() + 1)
            rate = (clicks + y.mean()) / (count + 1)
            x[half == part] = rate[codes[half == part]]
    area = metrics.auc(y, x.astype(np.float64))
    return max(area, 1 - area)
