"""Metrics of a model on rows: per head, label, domain and group of users."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from tqdm import tqdm

from qianmo.layers import metrics
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines.data import readers
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.recipe import Data

FEWEST_ROWS = 100  # of which a metric is worth a line


@dataclasses.dataclass(frozen=True)
class Scored:
    """Probabilities beside what happened: head -> [N, K], [N, K], and a column each of [N]."""

    probabilities: Mapping[str, np.ndarray]
    labels: np.ndarray
    columns: Mapping[str, np.ndarray]


def score(model: Ranker, path: str, batch_size: int = 8192, *, progress: bool = False) -> Scored:
    """Scores every row of `path`, in file order."""
    probabilities: dict[str, list[np.ndarray]] = {name: [] for name in model.head_names}
    columns: dict[str, list[np.ndarray]] = {}
    data = readers.dataset(model.schema, path, batch_size=batch_size)
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


def measure(
    labels: np.ndarray, probabilities: np.ndarray, task_id: np.ndarray | None
) -> dict[str, float]:
    """AUC, GAUC, log loss and PCOC of one label on some rows, with the counts behind them.

    Rows that do not have the label, where it is NaN, are left out.
    """
    is_there = ~np.isnan(labels)
    labels, probabilities = labels[is_there], probabilities[is_there]
    task_id = None if task_id is None else task_id[is_there]
    is_binary = bool(np.isin(labels, (0, 1)).all())  # ranks of other labels have no AUC
    found = {
        "rows": len(labels),
        "positives": float(labels.sum()),
        "auc": metrics.auc(labels, probabilities) if is_binary else float("nan"),
        "log_loss": metrics.log_loss(labels, probabilities),
        "pcoc": metrics.pcoc(labels, probabilities),
    }
    if task_id is not None:
        found["gauc"] = metrics.gauc(labels, probabilities, task_id) if is_binary else float("nan")
    return found


def _names(values: np.ndarray) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in values]


def evaluate(scored: Scored, schema: Schema) -> dict[str, Any]:
    """All metrics: head -> label -> {"all": ..., "domain": {id: ...}, "group": {name: ...}}."""
    task_id = scored.columns.get("task_id")
    report: dict[str, Any] = {}
    for head, probabilities in scored.probabilities.items():
        report[head] = {}
        for k, label in enumerate(schema.labels):
            y, p = scored.labels[:, k], probabilities[:, k]
            parts: dict[str, Any] = {"all": measure(y, p, task_id)}
            for column in ("domain", "group"):
                if column in scored.columns:
                    values, inverse = np.unique(scored.columns[column], return_inverse=True)
                    parts[column] = {
                        name: measure(
                            y[inverse == i],
                            p[inverse == i],
                            None if task_id is None else task_id[inverse == i],
                        )
                        for i, name in enumerate(_names(values))
                    }
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


def table(report: Mapping[str, Any]) -> str:
    """The metrics as text, a line for each head, label and part."""
    header = f"{'head':<10}{'label':<14}{'rows of':<22}{'rows':>9}{'AUC':>9}{'GAUC':>9}"
    lines = [header + f"{'log loss':>10}{'PCOC':>8}"]
    for head, label, name, m in parts_of(report):
        lines.append(
            f"{head:<10}{label:<14}{name:<22}{m['rows']:>9,}{m['auc']:>9.4f}"
            f"{m.get('gauc', float('nan')):>9.4f}{m['log_loss']:>10.4f}{m['pcoc']:>8.3f}"
        )
    return "\n".join(filter(None, [*lines, left_out(report)]))


class Measured(NamedTuple):
    """Metrics of a file's rows, their table, and the scores, where rows are scored at all."""

    report: dict[str, Any]
    text: str
    scored: Scored | None


def measured(model: Ranker, data: Data, path: str, progress: bool = False) -> Measured:
    """Scores a file's rows, or finds their items where the recipe's data has a catalogue."""
    if data.items:
        report = retrieval.of_recipe(cast(TwoTower, model), data, path)
        return Measured(report, retrieval.table(report), None)
    scored = score(model, path, progress=progress)
    report = evaluate(scored, model.schema)
    return Measured(report, table(report), scored)
