"""Scores rows by towers adapted on their tasks' support rows, beside the plain scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.layers.inner_loop import Support
from qianmo.models.ranker import Ranker
from qianmo.pipelines import readers
from qianmo.pipelines.evaluate import Scored, evaluate
from qianmo.pipelines.task_rows import TaskRows, support_rows

SIZES = (1, 2, 5, 10, 20)
# Bounds of the groups of tasks by their support rows.
GROUPS = ((0, 0), (1, 2), (3, 5), (6, 10), (11, 20), (21, None))


def score(
    model: Ranker,
    path: str,
    support: TaskRows,
    sizes: Sequence[int],
    batch_size: int = 4096,
) -> Scored:
    """Scores rows by the plain tower and by towers adapted on the newest support rows.

    Args:
      model: a model with `meta`.
      path: rows to score.
      support: support rows of their tasks.
      sizes: how many support rows to use at most.
      batch_size: rows scored at a time.

    Returns:
      Heads "plain" and, for each size, its number; the rows' group tells their tasks' support.
    """
    if model.meta is None:
        raise ValueError("The model has no `meta`, which says how a tower adapts.")
    meta, head = model.meta, model.serving_head
    supports = {str(k): support.newest(k) for k in sizes}

    @tf.function(reduce_retracing=True)
    def scores(
        features: Mapping[str, tf.Tensor], task: tf.Tensor, rows: Mapping[str, Support]
    ) -> dict[str, tf.Tensor]:
        plain, _ = model.one_head(features, head)
        tower = model.tower_of(head)
        adapted = {k: meta.score(tower, plain, task, rows[k])[0] for k in rows}
        return {name: tf.sigmoid(z) for name, z in {"plain": plain.logits, **adapted}.items()}

    found: dict[str, list[Any]] = {}
    columns: dict[str, list[Any]] = {}
    with readers.own_errors():
        for features, targets in readers.dataset(model.schema, path, batch_size=batch_size):
            task_id = targets["task_id"].numpy()
            place, every = support.of(task_id)
            rows = {k: Support(*map(tf.constant, s.of(task_id)[1])) for k, s in supports.items()}
            for name, value in scores(features, tf.constant(place), rows).items():
                found.setdefault(name, []).append(value.numpy())
            targets["group"] = _named(every.weights.max(2).sum(1)[place])
            for name, value in targets.items():
                columns.setdefault(name, []).append(np.asarray(value))
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    heads = {name: np.concatenate(values) for name, values in found.items()}
    return Scored(heads, joined.pop("labels"), joined)


def _named(counts: npt.NDArray[np.floating]) -> npt.NDArray[Any]:
    """Names of the groups by support rows, in an order that sorting keeps."""
    names = np.empty(len(counts), object)
    for first, last in GROUPS:
        inside = (counts >= first) & (counts <= (np.inf if last is None else last))
        names[inside] = f"support {first:02d}" + (f"-{last:02d}" if last else "+" * (last is None))
    return names


def curve_table(curve: Mapping[str, Any], label: str) -> str:
    """The curve as text: plain and adapted metrics by support rows used."""
    lines = [f"{'support rows used':<20}{'AUC':>9}{'GAUC':>9}"]
    first = next(iter(curve.values()))["plain"][label]
    rows = [("none (plain tower)", first)]
    rows += [(f"newest {k}", heads["adapted"][label]) for k, heads in curve.items()]
    for name, found in rows:
        lines.append(f"{name:<20}{found['auc']:>9.4f}{found.get('gauc', float('nan')):>9.4f}")
    return "\n".join(lines)


def measure(model: Ranker, path: str, support_path: str) -> dict[str, Any]:
    """What adaptation brings on rows whose tasks have support.

    Args:
      model: a model with `meta`.
      path: rows to score.
      support_path: support rows of their tasks, all older, those of a task in order of time.

    Returns:
      `test`: metrics as of `evaluate`, with all support, by group of support rows; `curve`: for
      each number of support rows used, metrics of all rows: {k: {head: {label: metrics}}}.
    """
    assert model.meta is not None
    support = support_rows(model, support_path, model.meta.inner.max_support)
    most = int(support.count.max(initial=1))
    sizes = sorted({*(size for size in SIZES if size < most), most})
    scored = score(model, path, support, sizes)
    report = evaluate(scored, model.schema)
    curve = {
        str(k): {
            name: {label: parts["all"] for label, parts in report[head].items()}
            for name, head in (("plain", "plain"), ("adapted", str(k)))
        }
        for k in sizes
    }
    return {"test": {"plain": report["plain"], "adapted": report[str(most)]}, "curve": curve}
