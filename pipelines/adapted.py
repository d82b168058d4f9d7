"""Metrics of towers adapted on their tasks' support rows, beside the plain ones.

    qianmo-adapt --model_dir=runs/meta --inner_steps=16 --min_support=3

What suits the rows of a later day is then given to `qianmo-export --form=adapted`, by the same two
flags.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from absl import flags

from qianmo.layers.inner_loop import Support
from qianmo.models.ranker import Ranker
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines import program, readers, run_dir
from qianmo.pipelines.evaluate import Scored, evaluate, table
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


def least_support(curve: Mapping[str, Any]) -> int | None:
    """The least k from which on adapting on the newest k support rows loses no AUC, label by label.

    None if it loses however many are used. What `measure` calls `curve` should be of rows that are
    neither in training nor in the test.
    """
    least = None
    for k in sorted(map(int, curve), reverse=True):
        plain, found = curve[str(k)]["plain"], curve[str(k)]["adapted"]
        if any(found[label]["auc"] < plain[label]["auc"] for label in plain):
            break
        least = k
    return least


def define_serving_flags() -> None:
    """Defines the flags that `as_served` reads."""
    flags.DEFINE_integer(
        "inner_steps", None, "Steps by which a tower adapts. Default: the recipe's.", lower_bound=1
    )
    flags.DEFINE_integer(
        "min_support",
        None,
        "Labels of which a task has fewer support rows get the plain score. Default: the recipe's.",
        lower_bound=1,
    )


def as_served(model: Ranker) -> Ranker:
    """The model, with a tower that adapts as the flags say.

    Raises:
      ValueError: they say how, and the model has no `meta`.
    """
    steps, least = flags.FLAGS.inner_steps, flags.FLAGS.min_support
    if model.meta is None:
        if steps or least:
            raise ValueError("--inner_steps and --min_support need a model trained with `meta`.")
        return model
    model.meta.serving_steps = steps or model.meta.serving_steps
    model.meta.min_support = least or model.meta.min_support
    return model


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string("data", None, "Rows to score. Default: the recipe's test rows.")
    flags.DEFINE_string(
        "support",
        None,
        "Support rows of their tasks, all older, those of a task in order of time. Default: the "
        "recipe's, of its test rows.",
    )
    define_serving_flags()
    flags.DEFINE_string("output", None, "Where to write the metrics as JSON.")


def run(_: list[str]) -> None:
    """Prints metrics by tasks' support rows and by how many are used; writes the JSON if asked."""
    values = flags.FLAGS
    try:
        model, recipe = run_dir.load(values.model_dir)
        model = as_served(model)
        if model.meta is None or isinstance(model, TwoTower):
            raise ValueError(
                "This is for rankers trained with `meta`; qianmo-evaluate measures the others, "
                "adapted two-tower models too."
            )
        path = values.data or recipe.data.test
        support = values.support or ("" if values.data else recipe.data.test_support)
        if not path or not support:
            raise ValueError("The recipe names no test rows with support; give --data, --support.")
        found = measure(model, path, support)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if values.output:
        run_dir.write_json(pathlib.Path(values.output), found)
    print(table(found["test"]))
    for label in model.schema.labels:
        print(f"\n{label}\n{curve_table(found['curve'], label)}")
    least = least_support(found["curve"])
    if least is None:
        print("\nHere adapting loses on the plain score; serve that, or try fewer --inner_steps.")
    else:
        least = max(least, model.meta.min_support)  # below it nothing was adapted
        print(f"\nHere adapting loses nothing from {least} support rows on: --min_support={least}")


def main() -> None:
    """Entry of `qianmo-adapt`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
