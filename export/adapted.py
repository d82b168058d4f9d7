"""SavedModels whose tower adapts, within each request, to the tasks that the request is about.

Signatures, all [B, ...] and row-independent; stock ops only, unless the store is a `SupportStore`:

    serving_default      the plain score
    adapted              the score of the row's task, whose support the store holds
    adapted_by_request   the same with the support in the request, where one row of a task brings it
    put_support          stores a row that has got its labels
    stats                what the store holds

Tasks that stand in a batch many times are adapted once.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

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
    replay,
    replay_signatures,
    scorer,
    task_keys,
    tensors,
    weight_bytes,
    with_task,
)
from qianmo.export.shared_support import (
    BAD_SUPPORT,
    COUNT,
    REQUEST_ID,
    brought,
    in_request,
    support_name,
    with_empty,
)
from qianmo.export.support_rows import FeatureRows, HiddenRows, Keep, kept
from qianmo.export.support_table import SupportTable
from qianmo.layers.inner_loop import Support
from qianmo.layers.meta import Meta
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.ops.support_store import TOO_OLD, SupportStore

UNDEFINED = -1.0  # a binary label that a row does not have
Store = SupportTable | SupportStore
ADAPT = "adapt"


def _meta(model: Ranker) -> Meta:
    if model.meta is None:
        raise ExportError("The model has no `meta`, which says how its tower adapts.")
    return model.meta


def _column(name: str, dtype: tf.DType) -> tf.TensorSpec:
    return tf.TensorSpec([None], dtype, name)


def adapted_specs(schema: Schema) -> dict[str, tf.TensorSpec]:
    """Inputs of `adapted`: the raw features, the task, and whether to adapt."""
    return {**with_task(schema, raw_specs(schema)), ADAPT: _column(ADAPT, tf.bool)}


def support_specs(specs: Specs, max_support: int) -> dict[str, tf.TensorSpec]:
    """Inputs for support rows of these columns, and for who brings them.

    The columns are [B, S], oldest first, or [B, S, L] for lists, S being `max_support`;
    `support_count` of the S rows are valid. Rows of equal `request_id` and task share the support
    that one of them brings; the others bring a count of 0.
    """
    found = {REQUEST_ID: _column(REQUEST_ID, tf.int64)}
    for column, spec in specs.items():
        name = support_name(column)
        found[name] = tf.TensorSpec([None, max_support, *spec.shape[1:]], spec.dtype, name)
    return {**found, COUNT: _column(COUNT, tf.int64)}


def by_request_specs(schema: Schema, max_support: int) -> dict[str, tf.TensorSpec]:
    """Inputs of `adapted_by_request`: those of `adapted`, and features and labels of support rows.

    A label that a support row does not have is -1, or NaN for a rating.
    """
    labels = {label: _column(label, tf.float32) for label in schema.labels}
    columns = {**raw_specs(schema), **labels}
    return {**adapted_specs(schema), **support_specs(columns, max_support)}


def event_name(schema: Schema) -> str:
    """Input of `put_support` for the event id: the schema's column, or `event_id`."""
    return schema.event_id or "event_id"


def put_specs(schema: Schema) -> dict[str, tf.TensorSpec]:
    """Inputs of `put_support`: features, task, event time and id, and labels (`read_labels`)."""
    specs = with_task(schema, raw_specs(schema))
    for name in (schema.timestamp, event_name(schema)):
        specs.setdefault(name, _column(name, tf.int64))
    return {**specs, **{label: _column(label, tf.float32) for label in schema.labels}}


def with_events(schema: Schema, rows: Rows) -> Rows:
    """Rows with event ids: the schema's column, or the rank among rows of equal task and time.

    The rank, in the order of the rows, depends on them alone, so that a file put twice is put once.
    """
    if schema.event_id:
        return rows
    task = np.unique(rows[schema.task_id], return_inverse=True)[1]
    time = np.asarray(rows[schema.timestamp])
    order = np.lexsort((time, task))  # which is stable
    place = np.arange(len(order))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(task[order]) != 0) | (np.diff(time[order]) != 0)
    rank = np.empty(len(order), np.int64)
    rank[order] = place - np.maximum.accumulate(np.where(is_first, place, 0))
    return {**rows, event_name(schema): rank}


def read_labels(
    schema: Schema, columns: Mapping[str, tf.Tensor]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Labels and their weights [..., K], and whether all labels of a row can be read [...].

    A row that does not have a label has -1 for a binary one, and NaN for a rating, which may be any
    number.
    """
    labels = tf.stack([columns[label] for label in schema.labels], -1)
    is_rating = tf.constant([schema.kind(label) == "rating" for label in schema.labels])
    undefined = tf.where(is_rating, tf.math.is_nan(labels), labels == UNDEFINED)
    fits = tf.where(is_rating, tf.math.is_finite(labels), (labels >= 0.0) & (labels <= 1.0))
    labels = tf.where(fits, labels, 0.0)
    return labels, tf.cast(~undefined, tf.float32), tf.reduce_all(fits | undefined, -1)


def without_nan(schema: Schema, rows: Rows) -> dict[str, np.ndarray]:
    """Labels as `read_labels` takes them, of columns where NaN is one that a row does not have."""
    return {
        label: column
        if schema.kind(label) == "rating"
        else np.where(np.isnan(column), np.float32(UNDEFINED), column)
        for label in schema.labels
        for column in [rows[label].astype(np.float32)]
    }


def _scored(
    model: Ranker,
    features: Mapping[str, tf.Tensor],
    adapt: tf.Tensor,
    place: tf.Tensor,
    support: Support,
    status: tf.Tensor,
    calibration: Calibration,
) -> dict[str, tf.Tensor]:
    head = model.serving_head
    plain, read = model.one_head(features, head)
    adapted, how = _meta(model).score(model.tower_of(head), plain, place, support)
    logits = tf.where(adapt[:, None], adapted, plain.logits)
    logits = calibrated(model, calibration.get(head), logits, features)
    return answer(model.schema, logits, read | tf.where(adapt, how | status, 0))


def _adapted(
    model: Ranker, store: Store, rows_of: HiddenRows | FeatureRows, calibration: Calibration
) -> Signature:
    def adapted(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        tasks, place = tf.unique(task_keys(model.schema, inputs))
        version = tf.constant(rows_of.version, tf.int64)
        found = store.get(tasks, version, _meta(model).inner.max_support)
        support = Support(rows_of.hidden(found.h), found.labels, found.weights)
        status = tf.zeros_like(place)
        return _scored(model, inputs, inputs[ADAPT], place, support, status, calibration)

    return adapted


def _adapted_by_request(model: Ranker, calibration: Calibration) -> Signature:
    schema = model.schema
    most = _meta(model).inner.max_support
    names = (*schema.input_names, *schema.labels)

    def adapted_by_request(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        held = in_request(inputs, task_keys(schema, inputs), names, most)
        features = {name: held.columns[name] for name in schema.input_names}
        output, read = model.one_head(features, model.serving_head)
        labels, weights, good = read_labels(schema, held.columns)
        good &= tf.reduce_all(tf.math.is_finite(output.h), 1) & (read == 0)
        h = tf.where(good[:, None], output.h, 0.0)
        inside = tf.reshape(held.inside, [-1])
        weights *= tf.cast(inside & good, tf.float32)[:, None]
        parts = (tf.reshape(part, [-1, most, part.shape[-1]]) for part in (h, labels, weights))
        bad = tf.reduce_any(tf.reshape(inside & ~good, [-1, most]), 1)
        status = held.status | tf.where(held.of_rows(bad), BAD_SUPPORT, 0)
        support = Support(*map(with_empty, parts))
        return _scored(model, inputs, inputs[ADAPT], held.index, support, status, calibration)

    return adapted_by_request


def _put(model: Ranker, store: Store, rows_of: HiddenRows | FeatureRows) -> Signature:
    schema = model.schema

    def put_support(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        rows, read = rows_of.pack(inputs)
        labels, weights, good = read_labels(schema, inputs)
        # What cannot be read is not stored: a value that is not finite says so to the store.
        nan = float("nan")
        rows = tf.where((read == 0)[:, None], rows, nan)
        labels = tf.where(good[:, None], labels, nan)
        task, time = task_keys(schema, inputs), inputs[schema.timestamp]
        version = tf.fill(tf.shape(task), tf.constant(rows_of.version, tf.int64))
        event = inputs[event_name(schema)]
        return {STATUS: store.put(task, rows, labels, weights, time, event, version)}

    return put_support


def _stats(model: Ranker, store: Store) -> Signature:
    def stats(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"stats": store.stats(task_keys(model.schema, inputs))}

    return stats


def rows_by_task(schema: Schema, rows: Rows) -> dict[Any, Rows]:
    """Features and labels of each task's rows, in the order of the rows."""
    order = np.argsort(rows[schema.task_id], kind="stable")
    tasks, starts = np.unique(rows[schema.task_id][order], return_index=True)
    own = np.split(order, starts[1:])
    names = (*schema.input_names, *schema.labels)
    return {
        task: {name: rows[name][index] for name in names}
        for task, index in zip(tasks.tolist(), own, strict=True)
    }


@served_in_full
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
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
) -> tuple[pathlib.Path, float]:
    """Writes a model with its plain score, and the score of a tower adapted to the row's task.

    Args:
      model: a model with `meta`.
      base_path: folder of the versions.
      rows: real rows: features and the task's column.
      support: real support rows, in order of time: features, the columns of task and time, of the
        event's id if the schema names one, labels. The table, or the store, gets them; a store
        keeps them even if the export is refused.
      store: where support rows live instead of a table in the graph: beyond a version, and for all
        versions. Its ops must be linked into the server. It is as wide as the rows kept.
      keep: what a support row holds. "hidden": the tower's input, which is of no use to a model of
        other weights. "features": the encoded features, of which every request makes the tower's
        input anew; rows are of use as long as the schema and its vocabularies stay.
      ttl_seconds: of the table: support that was written longer ago is not used; 0: for ever.
      version: default: one above the highest.
      calibration: head -> scaling of its plain logits, see `export_in_graph`; the adapted logits
        are scaled by the same, so that a row without support keeps its plain score.
      origin: what the version comes from, see `write_origin`.

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
    support = with_events(schema, support)
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
        "serving_default": scorer(model, head, calibration),
        "adapted": _adapted(model, held, of_support, calibration),
        "adapted_by_request": _adapted_by_request(model, calibration),
        "put_support": _put(model, held, of_support),
        "stats": _stats(model, held),
    }
    by_request = by_request_specs(schema, meta.inner.max_support)
    specs: dict[str, Specs] = {
        "serving_default": raw_specs(schema),
        "adapted": adapted_specs(schema),
        "adapted_by_request": by_request,
        "put_support": put_specs(schema),
        "stats": with_task(schema, {}),
    }
    on = {**rows, ADAPT: np.ones(len(rows[schema.task_id]), bool)}
    one = {name: column[:1] for name, column in support.items()}
    own = brought(by_request, rows[schema.task_id], rows_by_task(schema, support))
    inputs: dict[str, Rows] = {
        "serving_default": cast(rows, raw_specs(schema)),
        "adapted": cast(on, adapted_specs(schema)),
        "adapted_by_request": cast({**on, **own}, by_request),
        # Loading a version should change nothing, and a row of time 0 is refused.
        "put_support": cast({**one, schema.timestamp: np.zeros(1)}, put_specs(schema)),
        "stats": cast(one, specs["stats"]),
    }
    base = pathlib.Path(base_path)
    needed = weight_bytes(model)
    if isinstance(held, SupportTable):
        needed += held.task_bytes * len(np.unique(support[schema.task_id]))
    with drafting(base, version, needed_bytes=needed) as draft:
        module = tf.Module()
        module.store = held
        fill(
            draft.folder,
            base.name,
            model,
            functions,
            specs,
            inputs,
            module,
            own_ops=store is not None,
            origin=origin,
        )
        raw, plain = inputs["serving_default"], {"serving_default": head}
        scored = ("adapted", "adapted_by_request")
        worst = max(
            replay(draft.folder, model, plain, raw, raw, calibration=calibration),
            replay_signatures(draft.folder, schema, scored, functions, inputs, calibration),
        )
    write_serving_files(base)
    return draft.folder, worst
