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
feature, oldest first, `support_count` of them valid. `adapt`, bool [B], is a switch for each row:
off gives the plain vector.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from qianmo.export.adapted import ADAPT, BAD_SUPPORT, COUNT, support_name
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
    next_version,
    publishing,
    raw_specs,
    session,
    tensors,
    write_serving_files,
)
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
    specs = side_specs(model, item=False)
    for name, spec in side_specs(model, item=True).items():
        shape = [None, None, *spec.shape[1:]]
        specs[support_name(name)] = tf.TensorSpec(shape, spec.dtype, support_name(name))
    return {**specs, COUNT: tf.TensorSpec([None], tf.int64, COUNT)}


def _by_list(model: TwoTower) -> OfInputs:
    return lambda inputs: model.adapted_user_vectors(inputs, inputs[ADAPT])


def _by_request(model: TwoTower) -> OfInputs:
    names = side_specs(model, item=True)
    assert model.meta is not None
    most = model.meta.inner.max_support

    def vectors(inputs: Mapping[str, tf.Tensor]) -> Vectors:
        columns = {name: inputs[support_name(name)] for name in names}
        count = inputs[COUNT]
        rows, width = tf.unstack(tf.shape(columns[model.item.name])[:2])  # -1 would not do for 0
        valid = tf.clip_by_value(count, 0, tf.cast(width, tf.int64))
        flat = {
            name: tf.reshape(c, tf.concat([[rows * width], tf.shape(c)[2:]], 0))
            for name, c in columns.items()
        }
        for f in model.schema.categorical:
            if f.is_list and f.name in flat:
                flat[f.name].set_shape([None, None])
        items, read = model.item_vectors(flat)
        readable = tf.reshape(read == OK, [rows, width])
        place = tf.range(tf.cast(width, tf.int64))[None]
        inside = (place < valid[:, None]) & (place >= valid[:, None] - most)
        items = tf.reshape(items, [rows, width, model.tower.dim])
        features = {name: inputs[name] for name in side_specs(model, item=False)}
        adapt = inputs[ADAPT]
        found, status = model.adapted_user_vectors(features, adapt, items, inside & readable)
        bad = adapt & (tf.reduce_any(inside & ~readable, 1) | (count != valid))
        return found, status | tf.where(bad, BAD_SUPPORT, 0)

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


def export_retrieval(
    model: TwoTower,
    base_path: str | os.PathLike[str],
    rows: Rows,
    items: Rows,
    *,
    best: int = 100,
    version: int | None = None,
) -> tuple[pathlib.Path, float]:
    """Writes a two-tower model with the vectors of a catalogue.

    Args:
      model: the model.
      base_path: folder of the versions.
      rows: real rows, input name -> column, replayed through the session loader.
      items: the item's features, a row for each item of the catalogue.
      best: k, how many items are recommended; at most all, of any domain.
      version: default: one above the highest.

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
            # Each row's own item stands for its support.
            own = {support_name(name): inputs["item"][name][:, None] for name in item}
            given = cast({**users, **own, COUNT: np.ones(size)}, spec)
        spec = {**spec, ADAPT: tf.TensorSpec([None], tf.bool, ADAPT)}
        given = {**given, ADAPT: np.ones(size, bool)}
        functions["adapted_user"] = _vector(adapted)
        functions["adapted_recommend"] = _recommend(adapted, catalogue, model)
        for name in ("adapted_user", "adapted_recommend"):
            specs[name], inputs[name] = spec, given
    base = pathlib.Path(base_path)
    version = version or next_version(base)
    with publishing(base, version) as folder:
        fill(folder, base.name, model, functions, specs, inputs)
        worst = _replay(folder, functions, inputs)
    write_serving_files(base, any(f.is_list for f in model.schema.categorical))
    return base / str(version), worst


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
