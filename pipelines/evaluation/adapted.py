"""Metrics of towers adapted on their tasks' support rows, beside the plain ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.layers.inner_loop import Support
from qianmo.layers.label_heads import predictions
from qianmo.models.ranker import Ranker
from qianmo.pipelines.data import readers
from qianmo.pipelines.evaluation.scores import LOWER_IS_BETTER, Scored, evaluate
from qianmo.pipelines.evaluation.task_rows import TaskRows, support_rows

SIZES = (1, 2, 5, 10, 20)
STEP_FACTORS = (1, 2, 4)
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
        logits = {"plain": plain.logits, **adapted}
        return {name: predictions(model.schema, z) for name, z in logits.items()}

    found: dict[str, list[Any]] = {}
    columns: dict[str, list[Any]] = {}
    with readers.own_errors():
        for features, targets in readers.dataset(
            model.schema, path, batch_size=batch_size, gauc=True
        ):
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
    first = next(iter(curve.values()))["plain"][label]
    names = ("rmse", "mae") if "rmse" in first else ("auc", "gauc")
    lines = [f"{'support rows used':<20}" + "".join(f"{name.upper():>9}" for name in names)]
    rows = [("none (plain tower)", first)]
    rows += [(f"newest {k}", heads["adapted"][label]) for k, heads in curve.items()]
    for name, found in rows:
        values = (f"{found.get(metric, math.nan):>9.4f}" for metric in names)
        lines.append(f"{name:<20}" + "".join(values))
    return "\n".join(lines)


def with_all_support(model: Ranker, path: str, support_path: str) -> dict[str, Any]:
    """Metrics of rows scored with all support of their tasks, as of `evaluate`: label -> parts."""
    assert model.meta is not None
    support = support_rows(model, support_path, model.meta.inner.max_support)
    most = int(support.count.max(initial=1))
    return evaluate(score(model, path, support, [most]), model.schema)[str(most)]


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


def least_support(curve: Mapping[str, Any]) -> int | None:
    """The least k from which on adapting on the newest k support rows loses nothing on any label.

    What counts is the AUC, and of a rating the RMSE; a label of rows that do not define it does not
    count. None if adapting loses however many rows are used. What `measure` calls `curve` should be
    of rows that are neither in training nor in the test.
    """
    least = None
    for k in sorted(map(int, curve), reverse=True):
        plain, found = curve[str(k)]["plain"], curve[str(k)]["adapted"]
        if any(_loses(plain[label], found[label]) for label in plain):
            break
        least = k
    return least


def _loses(plain: Mapping[str, float], adapted: Mapping[str, float]) -> bool:
    if "rmse" in plain:
        return adapted["rmse"] > plain["rmse"]
    return adapted.get("auc", math.nan) < plain.get("auc", math.nan)


class Serving(NamedTuple):
    """How a tower adapts in serving, and how that was chosen.

    Attributes:
      inner_steps: gradient steps.
      min_support: labels of which a task has fewer support rows get the plain score.
      tried: for each number of steps, the metric with all support; "plain" for no adaptation.
    """

    inner_steps: int
    min_support: int
    tried: dict[str, float]


def choose(model: Ranker, path: str, support_path: str, monitor: str = "auc") -> Serving:
    """Chooses steps and least support on rows that training has not seen.

    Steps are the recipe's and 1, 2 and 4 times as many; those with the best mean of the metric over
    labels win, the fewest of equals. From the least support on, adapting loses nothing on any label
    (`least_support`); if it loses however many rows a task has, no task ever has enough.

    Args:
      model: with `meta`; it is left as chosen.
      path: rows to score.
      support_path: support rows of their tasks.
      monitor: metric of the choice of steps, see `scores.measure`.
    """
    assert model.meta is not None
    meta, sign = model.meta, -1 if monitor in LOWER_IS_BETTER else 1
    support = support_rows(model, support_path, meta.inner.max_support)
    meta.min_support = 1
    tried: dict[str, float] = {}
    for steps in sorted({1, *(factor * meta.inner.steps for factor in STEP_FACTORS)}):
        meta.serving_steps = steps
        most = int(support.count.max(initial=1))
        report = evaluate(score(model, path, support, [most]), model.schema)
        for name, head in (("plain", "plain"), (str(steps), str(most))):
            values = [parts["all"].get(monitor, np.nan) for parts in report[head].values()]
            tried[name] = float(np.nanmean(values))
    steps = max((int(k) for k in tried if k != "plain"), key=lambda k: (sign * tried[str(k)], -k))
    meta.serving_steps = steps
    least = least_support(measure(model, path, support_path)["curve"])
    meta.min_support = least or meta.inner.max_support + 1
    return Serving(steps, meta.min_support, tried)


def as_served(model: Ranker, steps: int | None, least: int | None) -> Ranker:
    """The model, with a tower that adapts by so many steps from so many support rows on.

    Args:
      model: a model.
      steps: gradient steps in serving; None for those of the model.
      least: least support rows of a task and label; None for that of the model.

    Raises:
      ValueError: one is given, and the model has no `meta`.
    """
    if model.meta is None:
        if steps or least:
            raise ValueError("--inner_steps and --min_support need a model trained with `meta`.")
        return model
    model.meta.serving_steps = steps or model.meta.serving_steps
    model.meta.min_support = least or model.meta.min_support
    return model
