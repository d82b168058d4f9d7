"""SavedModels whose tower adapts, within each request, to the tasks that the request is about.

Signatures, all [B, ...] and row-independent; stock ops only, unless the store is a `SupportStore`:

    serving_default      the plain score
    adapted              the score of the row's task, whose support the store holds
    adapted_by_request   the same with the support in the request
    put_support          stores a row that has got its labels
    stats                what the store holds

Tasks that stand in a batch many times are adapted once.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qianmo.export.saved_model import (
    STATUS,
    ExportError,
    Rows,
    Signature,
    Specs,
    answer,
    cast,
    check_parity,
    fill,
    next_version,
    publishing,
    raw_specs,
    replay,
    scorer,
    session,
    tensors,
    write_serving_files,
)
from qianmo.export.support_rows import FeatureRows, HiddenRows, Keep, kept
from qianmo.export.support_table import SupportTable
from qianmo.layers.inner_loop import Support
from qianmo.layers.meta import Meta
from qianmo.models.ranker import Ranker
from qianmo.ops.support_store import TOO_OLD, SupportStore

UNDEFINED = -1.0  # a label that a row does not have
BAD_SUPPORT = 32  # a support row in the request could not be read and was left out
Store = SupportTable | SupportStore
ADAPT = "adapt"
COUNT = "support_count"


def _meta(model: Ranker) -> Meta:
    if model.meta is None:
        raise ExportError("The model has no `meta`, which says how its tower adapts.")
    return model.meta


def support_name(name: str) -> str:
    """Input of `adapted_by_request` for a column of the support rows."""
    return f"support_{name}"


def _column(name: str, dtype: tf.DType) -> tf.TensorSpec:
    return tf.TensorSpec([None], dtype, name)


def adapted_specs(schema: Any) -> dict[str, tf.TensorSpec]:
    """Inputs of `adapted`: the raw features, the task, and whether to adapt."""
    specs = raw_specs(schema)
    task = specs.setdefault(schema.task_id, _column(schema.task_id, tf.int64))
    if task.dtype != tf.int64 or task.shape.rank != 1:
        raise ExportError(f"feature `{schema.task_id}`, the task, should be one int64 a row.")
    return {**specs, ADAPT: _column(ADAPT, tf.bool)}


def by_request_specs(schema: Any) -> dict[str, tf.TensorSpec]:
    """Inputs of `adapted_by_request`: features, and features and labels of support rows.

    The latter are [B, S], oldest first, or [B, S, L] for lists; `support_count` of them are valid.
    A label of -1 is not defined for the row.
    """
    specs = {**raw_specs(schema), ADAPT: _column(ADAPT, tf.bool)}
    for name, spec in raw_specs(schema).items():
        shape = [None, None, *spec.shape[1:]]
        specs[support_name(name)] = tf.TensorSpec(shape, spec.dtype, support_name(name))
    for label in schema.labels:
        name = support_name(label)
        specs[name] = tf.TensorSpec([None, None], tf.float32, name)
    return {**specs, COUNT: _column(COUNT, tf.int64)}


def put_specs(schema: Any) -> dict[str, tf.TensorSpec]:
    """Inputs of `put_support`: features, task, event time, and labels; -1 is not defined."""
    specs = raw_specs(schema)
    for name in (schema.task_id, schema.timestamp):
        specs.setdefault(name, _column(name, tf.int64))
    return {**specs, **{label: _column(label, tf.float32) for label in schema.labels}}


def read_labels(columns: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Labels and their weights [..., K], and whether all labels of a row can be read [...]."""
    labels = tf.stack(columns, -1)
    defined = labels != UNDEFINED
    good = tf.logical_or(tf.logical_and(labels >= 0.0, labels <= 1.0), ~defined)
    labels = tf.where(tf.logical_and(good, defined), labels, 0.0)
    return labels, tf.cast(defined, tf.float32), tf.reduce_all(good, -1)


def _scored(
    model: Ranker,
    features: Mapping[str, tf.Tensor],
    adapt: tf.Tensor,
    place: tf.Tensor,
    support: Support,
    status: tf.Tensor,
) -> dict[str, tf.Tensor]:
    head = model.serving_head
    plain, read = model.one_head(features, head)
    adapted, how = _meta(model).score(model.tower_of(head), plain, place, support)
    logits = tf.where(adapt[:, None], adapted, plain.logits)
    return answer(model.schema, logits, read | tf.where(adapt, how | status, 0))


def _adapted(model: Ranker, store: Store, rows_of: HiddenRows | FeatureRows) -> Signature:
    def adapted(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        tasks, place = tf.unique(inputs[model.schema.task_id])
        version = tf.constant(rows_of.version, tf.int64)
        found = store.get(tasks, version, _meta(model).inner.max_support)
        support = Support(rows_of.hidden(found.h), found.labels, found.weights)
        status = tf.zeros_like(place)
        return _scored(model, inputs, inputs[ADAPT], place, support, status)

    return adapted


def _distinct(columns: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """First row of each distinct content [U], and each row's place among those [B]."""
    prints = [tf.fingerprint(column) for column in columns]
    whole = tf.bitcast(tf.fingerprint(tf.concat(prints, 1)), tf.int64)
    _, place = tf.unique(whole)
    rows = tf.range(tf.size(place))
    size = tf.reduce_max(tf.concat([place, [-1]], 0)) + 1
    return tf.math.unsorted_segment_min(rows, place, size), place


def _adapted_by_request(model: Ranker) -> Signature:
    schema = model.schema
    names = (*schema.input_names, *schema.labels)

    def adapted_by_request(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        columns = {name: inputs[support_name(name)] for name in names}
        first, place = _distinct([*columns.values(), inputs[COUNT]])
        columns = {name: tf.gather(column, first) for name, column in columns.items()}
        shape = tf.shape(columns[schema.labels[0]])
        width = tf.cast(shape[1], tf.int64)
        count = tf.gather(inputs[COUNT], first)
        valid = tf.clip_by_value(count, 0, width)
        kept = tf.minimum(valid, _meta(model).inner.max_support)
        # The newest rows alone, wherever the count ends.
        most = tf.minimum(width, _meta(model).inner.max_support)
        index = tf.minimum((valid - kept)[:, None] + tf.range(most), width - 1)
        columns = {name: tf.gather(c, index, batch_dims=1) for name, c in columns.items()}

        def flat(column: tf.Tensor) -> tf.Tensor:
            # -1 would lose the rows where there are no places.
            return tf.reshape(column, tf.concat([[tf.size(index)], tf.shape(column)[2:]], 0))

        features = {name: flat(columns[name]) for name in schema.input_names}
        for feature in schema.categorical:
            if feature.is_list:
                features[feature.name].set_shape([None, None])
        output, read = model.one_head(features, model.serving_head)
        h = output.h
        readable = tf.reduce_all(tf.math.is_finite(h), 1) & (read == 0)
        labels, weights, good = read_labels([columns[label] for label in schema.labels])
        readable = tf.reshape(readable, tf.shape(good)) & good
        inside = tf.range(most) < kept[:, None]
        h = tf.reshape(h, [*tf.unstack(tf.shape(good)), h.shape[-1]])
        h = tf.where(readable[:, :, None], h, 0.0)
        weights *= tf.cast(inside & readable, tf.float32)[:, :, None]
        bad = tf.reduce_any(inside & ~readable, 1) | (count != valid)
        status = tf.where(tf.gather(bad, place), BAD_SUPPORT, 0)
        support = Support(h, labels, weights)
        return _scored(model, inputs, inputs[ADAPT], place, support, status)

    return adapted_by_request


def _put(model: Ranker, store: Store, rows_of: HiddenRows | FeatureRows) -> Signature:
    schema = model.schema

    def put_support(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, read = rows_of.pack(inputs)
        labels, weights, good = read_labels([inputs[label] for label in schema.labels])
        # What cannot be read is not stored: a value that is not finite says so to the store.
        nan = float("nan")
        rows = tf.where((read == 0)[:, None], rows, nan)
        labels = tf.where(good[:, None], labels, nan)
        task, time = inputs[schema.task_id], inputs[schema.timestamp]
        version = tf.fill(tf.shape(task), tf.constant(rows_of.version, tf.int64))
        return {STATUS: store.put(task, rows, labels, weights, time, version)}

    return put_support


def _stats(model: Ranker, store: Store) -> Signature:
    def stats(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"stats": store.stats(inputs[model.schema.task_id])}

    return stats


def export_adapted(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    support: Rows,
    *,
    store: SupportStore | None = None,
    keep: Keep = "hidden",
    ttl_seconds: float = 0.0,
    version: int | None = None,
) -> tuple[pathlib.Path, float]:
    """Writes a model with its plain score, and the score of a tower adapted to the row's task.

    Args:
      model: a model with `meta`.
      base_path: folder of the versions.
      rows: real rows: features and the task's column.
      support: real support rows, in order of time: features, the columns of task and time, labels.
        The table, or the store, gets them; a store keeps them even if the export is refused.
      store: where support rows live instead of a table in the graph: beyond a version, and for all
        versions. Its ops must be linked into the server. It is as wide as the rows kept.
      keep: what a support row holds. "hidden": the tower's input, which is of no use to a model of
        other weights. "features": the encoded features, of which every request makes the tower's
        input anew; rows are of use as long as the schema and its vocabularies stay.
      ttl_seconds: of the table: support that was written longer ago is not used; 0: for ever.
      version: default: one above the highest.

    Returns:
      The version's folder, and the largest difference to the Keras model on `rows`, plain and
      adapted.

    Raises:
      ExportError: no `meta`; a support row that cannot be stored; foreign ops, scores that differ,
        a version that exists.
    """
    schema, meta = model.schema, _meta(model)
    for role in ("task_id", "timestamp"):
        if not getattr(schema, role):
            raise ExportError(f"Adapted scores need `schema.{role}`.")
    head = model.serving_head
    of_support = kept(model, keep)
    held: Store = store or SupportTable(
        of_support.dim, len(schema.labels), meta.inner.max_support, ttl_seconds=ttl_seconds
    )
    if held.dim != of_support.dim or held.num_labels != len(schema.labels):
        raise ExportError(
            f"The store should hold rows of {of_support.dim} numbers and {len(schema.labels)} "
            f"labels. Received: {held.dim} and {held.num_labels}"
        )
    put = tf.function(_put(model, held, of_support), reduce_retracing=True)
    seeds = tensors(cast(support, put_specs(schema)))
    size = len(support[schema.task_id])
    for first in range(0, size, 8192):
        status = put(**{name: column[first : first + 8192] for name, column in seeds.items()})
        # A row older than those that a full task keeps is no fault.
        bits = status[STATUS].numpy() & ~TOO_OLD
        if bits.any():
            row = int(np.flatnonzero(bits)[0])
            raise ExportError(
                f"support row {first + row} of task {support[schema.task_id][first + row]} cannot "
                f"be stored: status {bits[row]}, see `SupportStore.put`."
            )

    functions: dict[str, Signature] = {
        "serving_default": scorer(model, head),
        "adapted": _adapted(model, held, of_support),
        "adapted_by_request": _adapted_by_request(model),
        "put_support": _put(model, held, of_support),
        "stats": _stats(model, held),
    }
    specs: dict[str, Specs] = {
        "serving_default": raw_specs(schema),
        "adapted": adapted_specs(schema),
        "adapted_by_request": by_request_specs(schema),
        "put_support": put_specs(schema),
        "stats": {schema.task_id: _column(schema.task_id, tf.int64)},
    }
    on = {ADAPT: np.ones(len(rows[schema.task_id]), bool)}
    one = {name: column[:1] for name, column in support.items()}
    inputs: dict[str, Rows] = {
        "serving_default": cast(rows, raw_specs(schema)),
        "adapted": cast({**rows, **on}, adapted_specs(schema)),
        "adapted_by_request": cast(
            {
                **{name: column[:1] for name, column in {**rows, **on}.items()},
                **{support_name(name): column[:, None] for name, column in one.items()},
                COUNT: np.ones(1),
            },
            by_request_specs(schema),
        ),
        # Loading a version should change nothing: a row of time 0 is refused.
        "put_support": cast({**one, schema.timestamp: np.zeros(1)}, put_specs(schema)),
        "stats": cast(one, specs["stats"]),
    }
    base = pathlib.Path(base_path)
    version = version or next_version(base)
    with publishing(base, version) as folder:
        module = tf.Module()
        module.store = held
        fill(folder, base.name, model, functions, specs, inputs, module, own_ops=store is not None)
        raw = inputs["serving_default"]
        worst = replay(folder, model, {"serving_default": head}, raw, raw)
        keras = tf.function(functions["adapted"])(**tensors(inputs["adapted"]))
        with session(folder) as run:
            served = run("adapted", inputs["adapted"])
        expected = np.stack([keras[label] for label in schema.labels], 1)
        worst = max(worst, check_parity(served, expected, schema, inputs["adapted"], "adapted"))
    write_serving_files(base, any(f.is_list for f in schema.categorical))
    return base / str(version), worst
