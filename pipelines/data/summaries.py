"""What a look at rows found: a table for people, warnings, refusals, and drift between two."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qianmo.layers.schema import Schema
from qianmo.pipelines.data.readers import DataError

# Thresholds of warnings; docs/data.md explains them.
UNKNOWN_SHARE = 0.2  # values that read a table's row of unknown values
MISSING_SHARE = 0.5
RARE_LABEL = 0.001  # a label's rate, or its distance from 1
EXTREME_DEVIATIONS = 100.0  # of a dense value from the mean, in standard deviations
DUPLICATE_SHARE = 0.01  # rows of one task and time with another row
LEAK_AUC = 0.99  # of a feature by itself


@dataclasses.dataclass
class Column:
    """What a feature's values are.

    Attributes:
      name: of the feature.
      kind: "dense", "categorical" or "list".
      missing: share of rows without a value; of lists, of empty ones; of a categorical feature with
        a default, of rows that read it.
      distinct: different values in the sample.
      unknown: share of values that are out of the vocabulary or the range.
      top: share of the most frequent value.
      mean, deviation, low, high: of a dense feature's values, or of a list's length.
      full: share of lists that are as long as `max_length`, or were cut to it.
      leak: label -> AUC of the feature by itself.
      histogram: bin -> share of the values, for comparison with other rows.
      edges: of the bins of a dense feature, or the values of a categorical one.
    """

    name: str
    kind: str
    missing: float
    distinct: int = 0
    unknown: float = 0.0
    top: float = 0.0
    mean: float = 0.0
    deviation: float = 0.0
    low: float = 0.0
    high: float = 0.0
    full: float = 0.0
    leak: dict[str, float] = dataclasses.field(default_factory=dict)
    histogram: list[float] = dataclasses.field(default_factory=list)
    edges: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Summary:
    """What a look at a data set found.

    Attributes:
      rows: how many there are.
      sampled: rows of the sample.
      labels: label -> `rows` that have it and their `sum` and `mean`, `classes`, 1 if all are 0 or
        1; rows `counted`, whose loss has a weight above 0, and their `low`est and `high`est value.
      weight: mean, least and greatest weight, and the share of weights 0; empty without weights.
      columns: of the features.
      left_out: what the reader left out and why, a sentence each.
      tasks: share of rows whose task and time (and event) another row has; None where not known.
      warnings: a sentence each.
    """

    rows: int
    sampled: int
    labels: dict[str, dict[str, float]]
    weight: dict[str, float]
    columns: list[Column]
    tasks: float | None
    left_out: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def to_config(self) -> dict[str, Any]:
        """Plain data that `from_config` takes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Summary:
        """Reads what `to_config` made."""
        return cls(**{**config, "columns": [Column(**c) for c in config["columns"]]})


def warnings(schema: Schema, found: Summary) -> Iterator[str]:
    """What a reader of the table should not overlook."""
    for label, seen in found.labels.items():
        if schema.kind(label) == "binary" and seen["rows"]:
            rate = seen["mean"]
            if 0 < rate < RARE_LABEL or 1 - RARE_LABEL < rate < 1:
                yield f"label `{label}` is {rate:.2%} positive"
    if found.weight and found.weight["zeros"] > MISSING_SHARE:
        yield f"{found.weight['zeros']:.0%} of the rows have weight 0"
    for column in found.columns:
        name = f"`{column.name}`"
        if column.missing > MISSING_SHARE:
            what = {"list": "empty", "dense": "missing"}.get(column.kind, "its default")
            yield f"{name} is {what} in {column.missing:.0%} of the rows"
        if column.unknown > UNKNOWN_SHARE:
            yield f"{name}: {column.unknown:.0%} of the values are unknown to its table"
        if column.distinct == 1 and column.kind != "list":
            yield f"{name} is constant, and tells nothing"
        if column.kind == "dense" and column.deviation > 0:
            far = max(column.mean - column.low, column.high - column.mean) / column.deviation
            if far > EXTREME_DEVIATIONS:
                yield (
                    f"{name} has values {far:,.0f} standard deviations from its mean "
                    f"({column.low:g} to {column.high:g}); clip it or take its logarithm"
                )
        for label, area in column.leak.items():
            if area > LEAK_AUC:
                yield (
                    f"{name} alone tells `{label}` with AUC {area:.4f}: it may be made of the "
                    "label itself"
                )
    if found.tasks is not None and found.tasks > DUPLICATE_SHARE:
        event = f", `{schema.event_id}`" if schema.event_id else ""
        yield (
            f"{found.tasks:.1%} of the rows have a twin of the same `{schema.task_id}`, "
            f"`{schema.timestamp}`{event}"
        )


def check_learnable(
    schema: Schema, found: Summary, path: str, *, positives_alone: bool = False
) -> None:
    """Refuses training rows of which nothing can be learned.

    Args:
      schema: of the rows.
      found: what they are.
      path: of the rows, for messages.
      positives_alone: whether rows of positives are enough, as their negatives are drawn.

    Raises:
      DataError: a label has one value in all rows that count, or none counts; or no feature tells
        rows apart.
    """
    for label, seen in found.labels.items():
        if not seen["rows"]:
            weight = schema.label_weights.get(label, "")
            why = f", or `{weight}` is 0" if isinstance(weight, str) and weight else ""
            raise DataError(f"{path}, column `{label}`: no row has this label{why}. Take it out.")
        is_off = schema.label_weights.get(label) == 0 and len(schema.labels) > 1
        if not seen["counted"] and not is_off:
            raise DataError(
                f"{path}, column `{label}`: all {int(seen['rows']):,} rows have weight 0 in its "
                "loss, so nothing can be learned of it. Check `weight`, `label_weights` and "
                "`domain_weights`, or take the label out of the schema."
            )
        if seen["low"] == seen["high"] and not (positives_alone and seen["high"] > 0):
            raise DataError(
                f"{path}, column `{label}`: it is {seen['low']:g} in all {int(seen['counted']):,} "
                "rows that count, so nothing can be learned of it. Check how the column is made, "
                "or take the label out of the schema."
            )
    useless = [c for c in found.columns if c.distinct <= 1 or c.unknown == 1]
    if len(useless) == len(found.columns):
        told = ", ".join(
            f"`{c.name}` is {'unknown' if c.unknown == 1 else 'constant'}" for c in useless
        )
        raise DataError(
            f"{path}: no feature tells the rows apart: {told}. Check the columns, and the "
            "vocabularies or `num_ids` of the schema."
        )


def drift(before: Summary, now: Summary) -> dict[str, float]:
    """Population stability index of each feature against other rows.

        PSI = sum over bins of (q - p) ln(q / p)

    with p and q the bins' shares before and now, each at least 0.0001. Below .1 little has moved;
    above .25 the rows are of another kind.

    Args:
      before: of the rows to compare with, such as the training rows.
      now: of the present rows, in the same bins: `Look.summary` with `before` as its `reference`.
    """
    known = {column.name: column for column in before.columns}
    result = {}
    for column in now.columns:
        other = known.get(column.name)
        if (
            other is None
            or other.edges != column.edges
            or not (other.histogram and column.histogram)
        ):
            continue
        p, q = (np.maximum(each.histogram, 1e-4) for each in (other, column))
        result[column.name] = float(((q - p) * np.log(q / p)).sum())
    return result


def table(found: Summary, drifts: Mapping[str, float] | None = None) -> str:
    """A summary as text: rows, labels, a line for each feature, warnings."""
    lines = [f"{found.rows:,} rows"]
    for label, seen in found.labels.items():
        absent = found.rows - int(seen["rows"])
        more = f", absent in {absent:,}" if absent else ""
        lines.append(f"  label {label}: mean {seen['mean']:.4g}{more}")
    if found.weight:
        w = found.weight
        lines.append(f"  weight: mean {w['mean']:.4g}, {w['low']:.4g} to {w['high']:.4g}")
    width = max([len(c.name) for c in found.columns] + [7])
    header = f"  {'feature':<{width}}  {'kind':<11}{'distinct':>9}{'missing':>9}{'unknown':>9}"
    lines.append(header + f"{'mean':>11}{'deviation':>11}" + (f"{'PSI':>7}" if drifts else ""))
    for c in found.columns:
        numbers = f"{c.mean:>11.4g}{c.deviation:>11.4g}" if c.kind != "categorical" else " " * 22
        line = f"  {c.name:<{width}}  {c.kind:<11}{c.distinct:>9,}{c.missing:>9.1%}"
        line += f"{c.unknown:>9.1%}" if c.kind != "dense" else f"{'':>9}"
        drifted = f"{drifts.get(c.name, np.nan):>7.3f}" if drifts else ""
        lines.append(f"{line}{numbers}{drifted}".rstrip())
    lines += [f"  {line}" for line in found.left_out]
    lines += [f"warning: {warning}" for warning in found.warnings]
    return "\n".join(lines)
