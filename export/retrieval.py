"""SavedModels of a two-tower model: vectors of users and items, and the items found for a user.

Signatures of stock ops, all [B, ...] and row-independent. Each answers `status` too.

    serving_default, user   the user's features -> `vector` [B, D]
    item                    the item's features -> `vector` [B, D]
    recommend               the user's features -> `<item id>` and `score`, [B, k], the best first
    adapted_user            with `meta`: also the user's support, and `adapt` -> `vector`
    adapted_recommend       the same -> items

An index outside takes the vectors; their inner product ranks. Where items belong to domains, the
domain is an input of both sides, and what is found are items of the user's domain, or of any where
it is unknown; an index outside needs a part for each domain. Support is the list that the model
names, which is among the features, or comes in the request: `support_<column>` [B, S] for each item
feature, oldest first, `support_count` of them valid; one row of each request and task brings it for
all of them. `adapt`, bool [B], is a switch for each row: off gives the plain vector.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from qianmo.export.adapted import ADAPT, support_specs
from qianmo.export.precision import served_in_full
from qianmo.export.publishing import NO_ORIGIN, Origin, drafting, write_serving_files
from qianmo.export.saved_model import (
    BAD_SCORE,
    STATUS,
    TOLERANCE,
    ExportError,
    Rows,
    Signature,
    Specs,
    cast,
    fill,
    raw_specs,
    session,
    task_keys,
    tensors,
    weight_bytes,
    with_task,
)
from qianmo.export.shared_support import BAD_SUPPORT, brought, in_request
from qianmo.layers.encode import OK
from qianmo.models.two_tower import TwoTower

VECTOR, SCORE = "vector", "score"
Vectors = tuple[tf.Tensor, tf.Tensor]  # [B, D], and the rows' status
OfInputs = Callable[[Mapping[str, tf.Tensor]], Vectors]


def side_specs(model: TwoTower, item: bool) -> dict[str, tf.TensorSpec]:
    """Serving inputs of one side's features."""
    specs = raw_specs(model.schema)
    features = (model.item_features if item else model.user_features).features
    names = set(features)
    for f in model.schema.categorical:
        if f.name in features and f.is_list:
            names.add(f.length_name)
    return {name: spec for name, spec in specs.items() if name in names}


def by_request_specs(model: TwoTower) -> dict[str, tf.TensorSpec]:
    """Inputs of the adapted signatures where the model names no list."""
    assert model.meta is not None
    items = support_specs(side_specs(model, item=True), model.meta.inner.max_support)
    return {**with_task(model.schema, side_specs(model, item=False)), **items}


def _by_list(model: TwoTower) -> OfInputs:
    return lambda inputs: model.adapted_user_vectors(inputs, inputs[ADAPT])


def _by_request(model: TwoTower) -> OfInputs:
    names = [*side_specs(model, item=True)]
    assert model.meta is not None
    most = model.meta.inner.max_support

    def vectors(inputs: Mapping[str, tf.Tensor]) -> Vectors:
        held = in_request(inputs, task_keys(model.schema, inputs), names, most)
        items, read = model.item_vectors(held.columns)
        items = tf.reshape(items, [-1, most, model.tower.dim])
        readable = tf.reshape(read == OK, [-1, most])
        features = {name: inputs[name] for name in side_specs(model, item=False)}
        found, status = model.adapted_user_vectors(
            features, inputs[ADAPT], held.of_rows(items), held.of_rows(held.inside & readable)
        )
        bad = held.of_rows(tf.reduce_any(held.inside & ~readable, 1))
        of_support = held.status | tf.where(bad, BAD_SUPPORT, 0)
        return found, status | tf.where(inputs[ADAPT], of_support, 0)

    return vectors


def _answer(found: tf.Tensor, status: tf.Tensor) -> dict[str, tf.Tensor]:
    finite = tf.reduce_all(tf.math.is_finite(found), 1)
    vector = tf.where(tf.math.is_finite(found), found, 0.0)
    return {VECTOR: vector, STATUS: status | tf.where(finite, OK, BAD_SCORE)}


def _vector(of: OfInputs) -> Signature:
    def vector(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return _answer(*of(inputs))

    return vector


class _Catalogue(NamedTuple):
    """What `recommend` searches: the items, and how many of them it gives."""

    ids: tf.Variable
    vectors: tf.Variable
    domain: tf.Variable
    best: int


def _catalogue(model: TwoTower, items: Rows, vectors: tf.Tensor, best: int) -> _Catalogue:
    """Puts the items into variables, which a graph may have more of than of constants.

    Raises:
      ExportError: a domain without items.
    """
    domain = np.zeros(len(vectors), np.int64)
    sizes = [len(domain)]
    if model.items_have_domains:
        domain = model.encode.domain(tensors(items)).numpy()
        sizes = np.bincount(domain, minlength=model.schema.num_domains + 1)[1:].tolist()
    if not len(domain):
        raise ExportError("`items` has no rows.")
    if not min(sizes):
        place = 1 + sizes.index(0)
        raise ExportError(f"`items`: domain number {place} has no item there. Add some.")
    columns = (items[model.item.name], vectors, domain)
    ids, vectors, domain = (tf.Variable(column, trainable=False) for column in columns)
    return _Catalogue(ids, vectors, domain, min([best, *sizes]))


def _recommend(of: OfInputs, catalogue: _Catalogue, model: TwoTower) -> Signature:
    def recommend(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        found = _answer(*of(inputs))
        # tensorflow-recommenders' indexes know no domains, or need ops that a stock server lacks.
        scores = tf.matmul(found[VECTOR], catalogue.vectors, transpose_b=True)
        if model.items_have_domains:
            domain = model.encode.domain(inputs)[:, None]
            scores = tf.where((domain == catalogue.domain) | (domain == 0), scores, -np.inf)
        score, at = tf.math.top_k(scores, catalogue.best)
        return {
            model.item.name: tf.gather(catalogue.ids, at),
            SCORE: score,
            STATUS: found[STATUS],
        }

    return recommend


@served_in_full
def export_retrieval(
    model: TwoTower,
    base_path: str | os.PathLike[str],
    rows: Rows,
    items: Rows,
    *,
    best: int = 100,
    version: int | None = None,
    origin: Origin = NO_ORIGIN,
) -> tuple[pathlib.Path, float]:
    """Writes a two-tower model with the vectors of a catalogue.

    Args:
      model: the model.
      base_path: folder of the versions.
      rows: real rows, input name -> column, replayed through the session loader.
      items: the item's features, a row for each item of the catalogue.
      best: k, how many items are recommended; at most all, of any domain.
      version: default: one above the highest.
      origin: what the version comes from, see `write_origin`.

    Returns:
      The version's folder, and the largest difference to the Keras model on `rows`.

    Raises:
      ExportError: a catalogue that cannot be read, foreign ops, answers that differ, a version that
        exists. Nothing is left behind.
    """
    user, item = side_specs(model, item=False), side_specs(model, item=True)
    columns = cast(items, item)
    vectors, status = model.item_vectors(tensors(columns))
    bad = np.flatnonzero((status.numpy() != OK) | ~np.isfinite(vectors.numpy()).all(1))
    if len(bad):
        raise ExportError(f"`items`: row {bad[0]} cannot be read: status {status.numpy()[bad[0]]}.")
    catalogue = _catalogue(model, columns, vectors, best)
    functions: dict[str, Signature] = {
        "serving_default": _vector(model.user_vectors),
        "user": _vector(model.user_vectors),
        "item": _vector(model.item_vectors),
        "recommend": _recommend(model.user_vectors, catalogue, model),
    }
    users = cast(rows, user)
    specs: dict[str, Specs] = {**dict.fromkeys(functions, user), "item": item}
    inputs: dict[str, Rows] = {**dict.fromkeys(functions, users), "item": cast(rows, item)}
    if model.meta is not None:
        size = len(next(iter(users.values())))
        spec, given, adapted = user, users, _by_list(model)
        if not model.support_feature:
            spec, adapted = by_request_specs(model), _by_request(model)
            # A row's own item stands for its support, and its number for a task that `rows` lack.
            task = model.schema.task_id
            numbers = np.arange(size)
            if spec[task].dtype == tf.string:
                numbers = numbers.astype("S").astype(object)
            tasks = rows.get(task, numbers)
            own = {
                name: {column: inputs["item"][column][row : row + 1] for column in item}
                for row, name in enumerate(tasks.tolist())
            }
            given = cast({**rows, task: tasks, **brought(spec, tasks, own)}, spec)
        spec = {**spec, ADAPT: tf.TensorSpec([None], tf.bool, ADAPT)}
        given = {**given, ADAPT: np.ones(size, bool)}
        functions["adapted_user"] = _vector(adapted)
        functions["adapted_recommend"] = _recommend(adapted, catalogue, model)
        for name in ("adapted_user", "adapted_recommend"):
            specs[name], inputs[name] = spec, given
    base = pathlib.Path(base_path)
    needed = weight_bytes(model) + vectors.numpy().nbytes
    with drafting(base, version, needed_bytes=needed) as draft:
        fill(draft.folder, base.name, model, functions, specs, inputs, origin=origin)
        worst = _replay(draft.folder, functions, inputs)
    write_serving_files(base)
    return draft.folder, worst


def _replay(
    folder: pathlib.Path, functions: Mapping[str, Signature], inputs: Mapping[str, Rows]
) -> float:
    """Largest difference of vectors and scores between the session loader and Keras."""
    worst = 0.0
    keras: dict[str, Rows] = {}
    for name, function in functions.items():
        answers = tf.function(function)(**tensors(inputs[name]))
        keras[name] = {key: value.numpy() for key, value in answers.items()}
    with session(folder) as run:
        for name, expected in keras.items():
            served = run(name, inputs[name])
            for key in sorted({VECTOR, SCORE} & expected.keys()):
                found = float(np.abs(served[key] - expected[key]).max())
                if not found <= TOLERANCE:
                    raise ExportError(
                        f"signature `{name}`: `{key}` differs from the Keras model's by {found}."
                    )
                worst = max(worst, found)
    return worst
