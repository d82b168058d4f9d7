"""A thousand adgroups, a thousand models: one trunk, and a tower for each adgroup in a table.

Signatures of an export, all [B, ...] and row-independent, of stock ops:

    serving_default   the score by the row's own tower; by the shared one where it has none
    plain             the score by the shared tower
    put_towers        adds or replaces towers, without a new trunk
    expire_towers     takes towers away
    stats             how many towers there are

An adgroup is whatever `schema.task_id` tells: an adgroup, an advertiser, a scene.
"""

from __future__ import annotations

import os
import pathlib

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from qianmo.export.adapted import read_labels, without_nan
from qianmo.export.calibration import NONE, Calibration, calibrated
from qianmo.export.precision import served_in_full
from qianmo.export.publishing import NO_ORIGIN, Origin, drafting, write_serving_files
from qianmo.export.saved_model import (
    STATUS,
    ExportError,
    Rows,
    Signature,
    Specs,
    answer,
    cast,
    fill,
    raw_specs,
    replay_signatures,
    scorer,
    task_keys,
    tensors,
    weight_bytes,
    with_task,
)
from qianmo.layers.inner_loop import (
    Adaptation,
    InnerLoop,
    Support,
    flat,
    of_flat,
    tower_size,
)
from qianmo.layers.label_heads import label_moments
from qianmo.models.ranker import Ranker

SHARED_TOWER = 64  # status: the adgroup has no tower of its own
BAD_TOWER = 128  # status: the weights are not finite; nothing was stored
WEIGHTS = "weights"


class TowerTable(tf.Module):
    """Towers by adgroup, as what they differ by from the shared one.

    Args:
      size: numbers in a tower, see `tower_size`.

    Cost: 4 * size bytes an adgroup, and one lookup for each distinct adgroup of a batch.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        # The last place tells a tower of zeros from none; a hash table's values have rank 1.
        self._table = tf.lookup.experimental.MutableHashTable(
            tf.int64, tf.float32, [0.0] * (size + 1)
        )

    def put(self, task_id: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """Adds or replaces towers: int64 [B], float32 [B, size] -> status, int32 [B]."""
        good = tf.reduce_all(tf.math.is_finite(weights), 1)
        values = tf.concat([weights, tf.ones([tf.shape(weights)[0], 1])], 1)
        insert = self._table.insert(tf.boolean_mask(task_id, good), tf.boolean_mask(values, good))
        with tf.control_dependencies([insert]):
            return tf.where(good, 0, BAD_TOWER)

    def expire(self, task_id: tf.Tensor) -> tf.Tensor:
        """Takes towers away: int64 [B] -> status, int32 [B]: `SHARED_TOWER` where was none."""
        known = self.get(task_id)[1]
        with tf.control_dependencies([known]):
            removed = self._table.remove(task_id)
        with tf.control_dependencies([removed]):
            return tf.where(known, 0, SHARED_TOWER)

    def get(self, task_id: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Towers [U, size] of distinct adgroups, and whether there is one, bool [U]."""
        values = tf.reshape(self._table.lookup(task_id), [-1, self.size + 1])
        return values[:, :-1], values[:, -1] > 0

    def count(self) -> tf.Tensor:
        """How many towers there are, an int64 scalar."""
        return self._table.size()


@served_in_full
def fine_tune(
    model: Ranker,
    inner: InnerLoop,
    rows: Rows,
    *,
    tasks_per_batch: int = 64,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Fine-tunes a tower for each adgroup on its own rows, many adgroups at once.

    New adgroups start from the shared tower; the trunk and the embeddings stay as they are.

    Args:
      model: a trained model; its serving head's tower is the shared one.
      inner: steps, step size and shrinkage; the last `max_support` rows of an adgroup are used.
      rows: features, the task's column and the labels, in order of time. A binary label of -1 or
        NaN, or a rating of NaN, is undefined; a row with a binary one outside [0, 1] is left out.
      tasks_per_batch: adgroups that are fine-tuned together.
      progress: whether to show a bar.

    Returns:
      The adgroups' ids, rising, and what their towers differ by, [A, `tower_size`].

    Raises:
      ExportError: `inner` has other labels than the model.
    """
    schema, head = model.schema, model.serving_head
    if inner.label_moments != label_moments(schema):
        raise ExportError(
            f"`inner` should have `label_moments` {label_moments(schema)}, those of the schema. "
            f"Received: {inner.label_moments}"
        )
    tower = model.tower_of(head)
    inputs = cast(rows, raw_specs(schema))
    tower_input = tf.function(
        lambda features: model.tower_input(features, head), reduce_retracing=True
    )
    size = len(rows[schema.task_id])
    h = np.concatenate(
        [
            tower_input({k: tf.constant(v[i : i + 8192]) for k, v in inputs.items()}).numpy()
            for i in range(0, size, 8192)
        ]
    )
    columns = tensors(without_nan(schema, rows))
    labels, defined, good = (part.numpy() for part in read_labels(schema, columns))
    label_weights = defined * good[:, None]
    shapes = tower.dense_shapes(h.shape[1])
    tune = tf.function(
        lambda *support: flat(inner.adapt(tower, Support(*support)), shapes), reduce_retracing=True
    )
    order = np.argsort(rows[schema.task_id], kind="stable")
    ids, starts, counts = np.unique(
        rows[schema.task_id][order], return_index=True, return_counts=True
    )
    found = np.empty((len(ids), tower_size(shapes)), np.float32)
    by_size = np.argsort(counts, kind="stable")  # a batch is padded to its longest
    batches = range(0, len(ids), tasks_per_batch)
    for first in tqdm(batches, disable=not progress, desc="fine-tune", unit=" batches"):
        own = by_size[first : first + tasks_per_batch]
        used = np.minimum(counts[own], inner.max_support)
        place = np.arange(used.max())
        places = place + (starts[own] + counts[own] - used)[:, None]
        inside = place < used[:, None]
        index = order[np.where(inside, places, 0)]
        weights = label_weights[index] * inside[:, :, None]
        found[own] = tune(
            tf.constant(h[index]), tf.constant(labels[index]), tf.constant(weights)
        ).numpy()
    return ids, found


def _personal(model: Ranker, table: TowerTable, calibration: Calibration) -> Signature:
    head = model.serving_head

    def score(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        output, status = model.one_head(inputs, head)
        tasks, place = tf.unique(task_keys(model.schema, inputs))
        vectors, known = table.get(tasks)
        tower = model.tower_of(head)
        correction: Adaptation = of_flat(vectors, tower.dense_shapes(output.h.shape[-1]))
        personal = tower(output.h[:, None], correction=correction.rows(place)).logits[:, 0]
        known = tf.gather(known, place)
        logits = tf.where(known[:, None], personal, output.logits)
        logits = calibrated(model, calibration.get(head), logits, inputs)
        return answer(model.schema, logits, status | tf.where(known, 0, SHARED_TOWER))

    return score


@served_in_full
def export_personal(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    task_id: np.ndarray,
    towers: np.ndarray,
    *,
    version: int | None = None,
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
) -> tuple[pathlib.Path, float]:
    """Writes a trunk with the towers of its adgroups.

    Args:
      model: the trunk and the shared tower.
      base_path: folder of the versions.
      rows: real rows: features and the task's column.
      task_id: adgroups, as the schema's `task_dtype` says, [A].
      towers: what their towers differ by from the shared one, [A, `tower_size`]. One that is not
        finite is left out, and its adgroup keeps the shared tower; a log line says how many.
      version: default: one above the highest.
      calibration: head -> scaling of the shared tower's logits, see `export_in_graph`; those of
        the others are scaled by the same.
      origin: what the version comes from, see `write_origin`.

    Returns:
      The version's folder, and the largest difference to the Keras model on `rows`.

    Raises:
      ExportError: no `task_id` in the schema, scores that differ, a version that exists.
    """
    schema = model.schema
    if not schema.task_id:
        raise ExportError("Personal towers need `schema.task_id`, which tells the adgroup.")
    finite = np.isfinite(towers).all(1)
    if not finite.all():
        tf.get_logger().warning(
            "%d of %d towers are not finite and left out, the first that of adgroup %s.",
            np.sum(~finite),
            len(finite),
            task_id[np.argmin(finite)],
        )
        task_id, towers = task_id[finite], towers[finite]
    table = TowerTable(towers.shape[1])
    for first in range(0, len(task_id), 1024):
        part = slice(first, first + 1024)
        keys = task_keys(schema, {schema.task_id: tf.constant(task_id[part])})
        table.put(keys, tf.constant(towers[part]))
    task = with_task(schema, {})
    weights = tf.TensorSpec([None, table.size], tf.float32, WEIGHTS)
    raw = raw_specs(schema)
    own = with_task(schema, raw)
    functions: dict[str, Signature] = {
        "serving_default": _personal(model, table, calibration),
        "plain": scorer(model, model.serving_head, calibration),
        "put_towers": lambda **x: {STATUS: table.put(task_keys(schema, x), x[WEIGHTS])},
        "expire_towers": lambda **x: {STATUS: table.expire(task_keys(schema, x))},
        "stats": lambda **x: {"towers": tf.fill([tf.shape(x[schema.task_id])[0]], table.count())},
    }
    specs: dict[str, Specs] = {
        "serving_default": own,
        "plain": raw,
        "put_towers": {**task, WEIGHTS: weights},
        "expire_towers": task,
        "stats": task,
    }
    # Warming up must change nothing: it puts a tower that is there, and expires one that is not.
    absent = np.arange(-1, -len(task_id) - 2, -1)
    if schema.task_dtype == "string":
        absent = absent.astype("S").astype(object)
    absent = np.setdiff1d(absent, task_id)[-1:]
    inputs: dict[str, Rows] = {
        "serving_default": cast(rows, own),
        "plain": cast(rows, raw),
        "put_towers": {schema.task_id: task_id[:1], WEIGHTS: towers[:1]},
        "expire_towers": {schema.task_id: absent},
        "stats": {schema.task_id: task_id[:1]},
    }
    base = pathlib.Path(base_path)
    needed = weight_bytes(model) + towers.nbytes
    with drafting(base, version, needed_bytes=needed) as draft:
        module = tf.Module()
        module.table = table
        fill(draft.folder, base.name, model, functions, specs, inputs, module, origin=origin)
        scored = ("serving_default", "plain")
        worst = replay_signatures(draft.folder, schema, scored, functions, inputs, calibration)
    write_serving_files(base)
    return draft.folder, worst
