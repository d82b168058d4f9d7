"""Metrics of a model on rows: per head, label, domain and group of users."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from qianmo.layers import metrics
from qianmo.layers.schema import LabelKind, Schema
from qianmo.models.ranker import Ranker
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines.data import look, readers
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.recipe import Data

FEWEST_ROWS = 100  # of which a metric is worth a line
LOWER_IS_BETTER = ("log_loss", "rmse", "mae")


@dataclasses.dataclass(frozen=True)
class Scored:
    """Predictions beside what happened.

    Attributes:
      probabilities: head -> probabilities, or means of ratings, [N, K].
      labels: [N, K]; NaN where a row does not have the label.
      columns: what describes the rows, such as `task_id`, [N] each.
    """

    probabilities: Mapping[str, np.ndarray]
    labels: np.ndarray
    columns: Mapping[str, np.ndarray]

    @property
    def gauc_groups(self) -> np.ndarray | None:
        """The group of each row for GAUC: that of `schema.gauc_by`, or the task."""
        return self.columns.get("gauc", self.columns.get("task_id"))


def score(
    model: Ranker,
    path: str,
    batch_size: int = 8192,
    *,
    progress: bool = False,
    watched: look.Look | None = None,
) -> Scored:
    """Scores every row of `path`, in file order.

    Args:
      model: the model.
      path: the rows.
      batch_size: rows scored at a time.
      progress: whether to show a bar.
      watched: sees the rows on the way.
    """
    probabilities: dict[str, list[np.ndarray]] = {name: [] for name in model.head_names}
    columns: dict[str, list[np.ndarray]] = {}
    data = readers.dataset(
        model.schema,
        path,
        batch_size=batch_size,
        gauc=True,
        observe=watched.observe if watched else None,
        tally=watched.tally if watched else None,
    )
    # One graph for all batch sizes, made before it is called.
    predict = model.probabilities.get_concrete_function(readers.signature(model.schema)[0])
    total = readers.count_rows(model.schema, path)
    bar = tqdm(total=total, unit=" rows", disable=not progress, desc="evaluate")
    with bar, readers.own_errors():
        for features, targets in data:
            for name, value in predict(features).items():
                probabilities[name].append(value.numpy())
            for name, value in targets.items():
                columns.setdefault(name, []).append(value.numpy())
            bar.update(len(targets["labels"]))
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Scored(
        {name: np.concatenate(parts) for name, parts in probabilities.items()},
        joined.pop("labels"),
        joined,
    )


def mean_loss(schema: Schema, labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over labels of the log loss, or of the squared error in variances for ratings.

    Args:
      schema: of the rows.
      labels: [N, K]; NaN where a row does not have the label.
      predictions: probabilities, or means of ratings, [N, K].
    """
    losses = []
    for k, label in enumerate(schema.labels):
        is_there = ~np.isnan(labels[:, k])
        y, p = labels[is_there, k], predictions[is_there, k]
        if not len(y):
            continue
        if schema.kind(label) == "binary":
            losses.append(metrics.log_loss(y, p))
        else:
            losses.append(float(np.mean((y - p) ** 2) / schema.label_moments[label][1]))
    return float(np.mean(losses)) if losses else float("nan")


def measure(
    labels: np.ndarray,
    predictions: np.ndarray,
    groups: np.ndarray | None = None,
    kind: LabelKind = "binary",
) -> dict[str, float]:
    """Metrics of one label on some rows, with the counts behind them.

    Args:
      labels: [N]; rows that do not have the label, where it is NaN, are left out.
      predictions: probabilities, or means of a rating, [N].
      groups: the group of each row for GAUC, [N].
      kind: of the label.

    Returns:
      Of a binary label `rows`, `positives`, `rate`, `auc`, `log_loss`, `pcoc`, and `gauc` with
      groups; of a rating `rows`, `mean`, `mae`, `rmse` and `bias`, the mean of prediction - label.
      NaN where a metric is not defined.
    """
    is_there = ~np.isnan(labels)
    labels, predictions = labels[is_there].astype(np.float64), predictions[is_there]
    groups = None if groups is None else groups[is_there]
    nan = float("nan")
    if kind == "rating":
        errors = predictions.astype(np.float64) - labels
        return {
            "rows": len(labels),
            "mean": float(np.mean(labels)) if len(labels) else nan,
            "mae": float(np.mean(np.abs(errors))) if len(labels) else nan,
            "rmse": float(np.sqrt(np.mean(np.square(errors)))) if len(labels) else nan,
            "bias": float(np.mean(errors)) if len(labels) else nan,
        }
    is_binary = bool(np.isin(labels, (0, 1)).all())  # ranks of other labels have no AUC
    found = {
        "rows": len(labels),
        "positives": float(labels.sum()),
        "rate": float(labels.mean()) if len(labels) else nan,
        "auc": metrics.auc(labels, predictions) if is_binary else nan,
        "log_loss": metrics.log_loss(labels, predictions) if len(labels) else nan,
        "pcoc": metrics.pcoc(labels, predictions) if len(labels) else nan,
    }
    if groups is not None:
        found["gauc"] = metrics.gauc(labels, predictions, groups) if is_binary else nan
    return found


def _names(values: np.ndarray) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def evaluate(scored: Scored, schema: Schema) -> dict[str, Any]:
    """All metrics: head -> label -> {"all": ..., "domain": {id: ...}, "group": {name: ...}}."""
    groups = scored.gauc_groups
    report: dict[str, Any] = {}
    for head, predictions in scored.probabilities.items():
        report[head] = {}
        for k, label in enumerate(schema.labels):
            y, p, kind = scored.labels[:, k], predictions[:, k], schema.kind(label)
            parts: dict[str, Any] = {"all": measure(y, p, groups, kind)}
            for column in ("domain", "group"):
                if column in scored.columns:
                    values, inverse = np.unique(scored.columns[column], return_inverse=True)
                    parts[column] = {}
                    for i, name in enumerate(_names(values)):
                        own = inverse == i
                        of_groups = None if groups is None else groups[own]
                        parts[column][name] = measure(y[own], p[own], of_groups, kind)
            report[head][label] = parts
    return report


def parts_of(
    report: Mapping[str, Any], fewest: int = FEWEST_ROWS
) -> Iterator[tuple[str, str, str, Mapping[str, float]]]:
    """Head, label, name of the rows and their metrics, for each line of a table.

    Domains and groups of fewer than `fewest` rows are left out.
    """
    for head, labels in report.items():
        for label, parts in labels.items():
            yield head, label, "all", parts["all"]
            for column in ("domain", "group"):
                for value, found in parts.get(column, {}).items():
                    if found["rows"] >= fewest:
                        yield head, label, f"{column} {value}", found


def left_out(report: Mapping[str, Any]) -> str:
    """A sentence on the parts that have no line in a table; empty if all have."""
    count = sum(1 for _ in parts_of(report, 0)) - sum(1 for _ in parts_of(report))
    return f"({count} lines of fewer than {FEWEST_ROWS} rows left out.)" if count else ""


# Metric -> its title, width and format, in the order of a table's columns.
COLUMNS = {
    "binary": {
        "rows": ("rows", 9, ","),
        "rate": ("rate", 8, ".4f"),
        "auc": ("AUC", 8, ".4f"),
        "gauc": ("GAUC", 8, ".4f"),
        "log_loss": ("log loss", 10, ".4f"),
        "pcoc": ("PCOC", 8, ".3f"),
    },
    "rating": {
        "rows": ("rows", 9, ","),
        "mean": ("mean", 9, ".4g"),
        "mae": ("MAE", 9, ".4f"),
        "rmse": ("RMSE", 9, ".4f"),
        "bias": ("bias", 9, ".4f"),
    },
}


def kind_of(found: Mapping[str, float]) -> str:
    """Whether metrics are those of a binary label or of a rating."""
    return "rating" if "rmse" in found else "binary"


def table(report: Mapping[str, Any]) -> str:
    """The metrics as text, a line for each head, label and part."""
    lines = []
    for kind, columns in COLUMNS.items():
        parts = [part for part in parts_of(report) if kind_of(part[3]) == kind]
        if not parts:
            continue
        titles = "".join(f"{title:>{width}}" for title, width, _ in columns.values())
        lines.append(f"{'head':<10}{'label':<14}{'rows of':<22}{titles}")
        for head, label, name, m in parts:
            numbers = "".join(
                f"{m.get(key, float('nan')):>{width}{shown}}"
                for key, (_, width, shown) in columns.items()
            )
            lines.append(f"{head:<10}{label:<14}{name:<22}{numbers}")
    return "\n".join(filter(None, [*lines, left_out(report)]))


class Measured(NamedTuple):
    """Metrics of a file's rows, their table, and the scores, where rows are scored at all."""

    report: dict[str, Any]
    text: str
    scored: Scored | None


def measured(
    model: Ranker,
    data: Data,
    path: str,
    progress: bool = False,
    watched: look.Look | None = None,
) -> Measured:
    """Scores a file's rows, or finds their items where the recipe's data has a catalogue.

    Args:
      model: the model.
      data: of its recipe.
      path: the rows.
      progress: whether to show a bar.
      watched: sees the rows on the way, where they are scored.
    """
    if data.catalogue:
        report = retrieval.of_recipe(cast(TwoTower, model), data, path)
        return Measured(report, retrieval.table(report), None)
    scored = score(model, path, progress=progress, watched=watched)
    report = evaluate(scored, model.schema)
    return Measured(report, table(report), scored)
