"""How high a two-tower model ranks the items that came next, among all items.

A target is a row with a label above 0; other rows say what was shown and not wanted, and are
neither targets nor taken for items that a task has had. A target's item is ranked against every
item of the catalogue but those that its task is known to have had: in the training rows and, beside
the test rows, also in those of validation and support. One item is right, so the hit rate at k is
the recall at k too. Where items belong to domains, those of the row's own domain alone are ranked.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.layers import metrics
from qianmo.layers.inner_loop import Support
from qianmo.layers.schema import Schema
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines.data import readers
from qianmo.pipelines.evaluation.task_rows import TaskRows, support_rows
from qianmo.pipelines.recipe import Data

SIZES = (10, 50, 100)
_SCORES = 2**24  # of pairs that are held at a time: 64 MB


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """All items, by rising id.

    Attributes:
      ids: raw ids, [N].
      vectors: [N, D].
      domain: places of the items' domains, [N]; zeros where items belong to none.
    """

    ids: npt.NDArray[Any]
    vectors: npt.NDArray[np.float32]
    domain: npt.NDArray[np.int64]

    def places(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Where the items stand; -1 for those that are not in the catalogue."""
        found = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[found] == ids, found, -1)


def item_schema(schema: Schema) -> Schema:
    """What a row of the catalogue holds: the item's features."""
    features = tuple(f for f in schema.features if f.side == "item")
    is_domain = schema.domain in [f.name for f in features]
    return Schema(
        features=features, labels=schema.labels, domain=schema.domain if is_domain else ""
    )


def item_rows(model: TwoTower, path: str) -> dict[str, npt.NDArray[Any]]:
    """The columns of a catalogue's file, a row for each item, by rising id.

    Raises:
      readers.DataError: the rows do not fit, or an item stands there twice.
    """
    blocks = list(readers.blocks(item_schema(model.schema), path, targets=False))
    columns = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    ids = columns[model.item.name]
    order = np.argsort(ids, kind="stable")
    twice = ids[order][1:] == ids[order][:-1]
    if twice.any():
        raise readers.DataError(
            f"{path}, column `{model.item.name}`: item {ids[order][1:][twice][0]} stands there "
            "twice. Give one row for each."
        )
    return {name: column[order] for name, column in columns.items()}


def catalogue(model: TwoTower, path: str) -> Catalogue:
    """Reads the items of a file and makes their vectors."""
    columns = item_rows(model, path)
    features = {name: tf.constant(c) for name, c in columns.items()}
    vectors, _ = model.item_vectors(features)
    return Catalogue(columns[model.item.name], vectors.numpy(), _domain(model, features))


def _domain(model: TwoTower, features: Mapping[str, tf.Tensor]) -> npt.NDArray[np.int64]:
    """Places of the rows' domains, [B]; zeros, as for unknown ones, where items belong to none."""
    if model.items_have_domains:
        return np.asarray(model.encode.domain(features))
    return np.zeros(len(features[model.item.name]), np.int64)


@dataclasses.dataclass(frozen=True)
class Known:
    """The items that tasks have had: pairs, sorted by task."""

    task_id: npt.NDArray[Any]
    place: npt.NDArray[np.int64]

    def pairs(self, task_id: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Row numbers of the tasks asked for, and the places of what each has had."""
        first = np.searchsorted(self.task_id, task_id, "left")
        count = np.searchsorted(self.task_id, task_id, "right") - first
        rows = np.repeat(np.arange(len(task_id)), count)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return rows, self.place[np.repeat(first, count) + within]


def known(model: TwoTower, items: Catalogue, paths: Sequence[str]) -> Known:
    """Reads which items the tasks have had in some files: those of rows with a label above 0."""
    schema = model.schema
    if not schema.task_id:
        raise ValueError("Retrieval needs `schema.task_id`, whose known items are left out.")
    label, item = schema.labels[0], model.item
    alone = dataclasses.replace(
        schema.narrowed(item.name),
        only_domains=(),
        task_id=schema.task_id,
        task_dtype=schema.task_dtype,
    )

    def is_had(block: readers.Block) -> Any:
        own = readers.is_of(block[schema.domain], item.domains) if item.domains else True
        return own & (block[label] > 0)

    blocks = [
        readers.taken(block, np.flatnonzero(is_had(block)))
        for path in paths
        for block in readers.blocks(alone, path)
    ]
    task = np.concatenate([readers.task_ids(schema, b) for b in blocks])
    place = items.places(np.concatenate([b[model.item.name] for b in blocks]))
    order = np.argsort(task, kind="stable")
    order = order[place[order] >= 0]
    return Known(task[order], place[order])


# Traced once for a model, and not again at each epoch.
@tf.function(reduce_retracing=True)
def _plain(model: TwoTower, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {"model": model.user_vectors(features)[0]}


@tf.function(reduce_retracing=True)
def _listed(model: TwoTower, features: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    every = tf.fill(tf.shape(features[next(iter(features))])[:1], True)
    found = model.adapted_user_vectors(features, every)[0]
    return {"model": model.user_vectors(features)[0], "adapted": found}


@tf.function(reduce_retracing=True)
def _of_rows(
    model: TwoTower, features: Mapping[str, tf.Tensor], task: tf.Tensor, rows: Support
) -> dict[str, tf.Tensor]:
    found = model.adapted_state(model.user_state(features), task, rows)[0]
    return {"model": model.user_vectors(features)[0], "adapted": found}


def _vectors(
    model: TwoTower,
    features: Mapping[str, tf.Tensor],
    task_id: npt.NDArray[Any],
    support: TaskRows | None,
) -> Mapping[str, tf.Tensor]:
    """Users' vectors: head -> [B, D]."""
    if support is not None:
        place, rows = support.of(task_id)
        return _of_rows(model, features, tf.constant(place), Support(*map(tf.constant, rows)))
    return (_listed if model.support_feature else _plain)(model, features)


def ranks(
    model: TwoTower,
    path: str,
    items: Catalogue,
    had: Known,
    support: TaskRows | None = None,
    batch_size: int = 1024,
) -> dict[str, npt.NDArray[np.int64]]:
    """The rank of each target's item, from 1 on: head "model", and "adapted" with support.

    Raises:
      readers.DataError: no row is a target, or an item is not in the catalogue, or stands there in
        another domain.

    Cost: scores of `_SCORES` pairs at a time, however many items there are.
    """
    label = model.schema.labels[0]
    found: dict[str, list[npt.NDArray[np.int64]]] = {}
    with readers.own_errors():
        for features, targets in readers.dataset(model.schema, path, batch_size=batch_size):
            is_target = targets["labels"][:, 0] > 0
            features = {k: tf.boolean_mask(v, is_target) for k, v in features.items()}
            task_id = targets["task_id"].numpy()[is_target.numpy()]
            if not len(task_id):
                continue
            ids = features[model.item.name].numpy()
            right, domain = items.places(ids), _domain(model, features)
            if (right < 0).any():
                raise readers.DataError(
                    f"{path}, column `{model.item.name}`: item {ids[right < 0][0]} is not in "
                    "`data.catalogue`. Add its row there."
                )
            wrong = items.domain[right] != domain
            if wrong.any():
                raise readers.DataError(
                    f"{path}, column `{model.item.name}`: item {ids[wrong][0]} is of another "
                    "domain in `data.catalogue`. Give items of different domains different ids."
                )
            for head, u in _vectors(model, features, task_id, support).items():
                step = max(1, _SCORES // len(items.ids))
                for first in range(0, len(task_id), step):
                    own = slice(first, first + step)
                    rows, places = had.pairs(task_id[own])
                    is_other = places != right[own][rows]
                    scores = u.numpy()[own] @ items.vectors.T
                    scores[rows[is_other], places[is_other]] = -np.inf
                    for each in np.unique(domain[own][domain[own] > 0]):
                        scores[np.ix_(domain[own] == each, items.domain != each)] = -np.inf
                    found.setdefault(head, []).append(metrics.ranks(scores, right[own]))
    if not found:
        raise readers.DataError(
            f"{path}, column `{label}`: no row has a label above 0, so there is nothing to find."
        )
    return {head: np.concatenate(parts) for head, parts in found.items()}


def measure(
    model: TwoTower, path: str, items_path: str, known_paths: Sequence[str], support_path: str = ""
) -> dict[str, Any]:
    """Hit rates and NDCG of a file's rows, in the form of `evaluate`.

    Args:
      model: the model. With `meta`, the adapted vectors are measured too, if there is support.
      path: rows whose items are to be found.
      items_path: the catalogue.
      known_paths: rows whose items are left out for their tasks.
      support_path: rows to adapt on, those of a task in order of time.

    Returns:
      head -> label -> {"all": metrics}.
    """
    items = catalogue(model, items_path)
    support = None
    if support_path and not model.support_feature:
        assert model.meta is not None
        support = support_rows(model, support_path, model.meta.inner.max_support)
    had = known(model, items, known_paths)
    label = model.schema.labels[0]
    return {
        head: {label: {"all": metrics.retrieval(found, SIZES)}}
        for head, found in ranks(model, path, items, had, support).items()
    }


def of_recipe(model: TwoTower, data: Data, path: str) -> dict[str, Any]:
    """Measures a file's rows as a recipe says; what the test rows' tasks had since is known."""
    others, support = [data.train], ""
    if os.path.realpath(path) == os.path.realpath(data.test):
        support = data.test_support
        others += [other for other in (data.valid, support) if other]
    return measure(model, path, data.catalogue, others, support)


def table(report: Mapping[str, Any]) -> str:
    """The metrics as text, a line for each head."""
    names = [f"hr_{k}" for k in SIZES] + ["ndcg_10", "mrr"]
    lines = [f"{'head':<10}{'rows':>9}" + "".join(f"{name:>9}" for name in names)]
    for head, labels in report.items():
        for found in labels.values():
            m = found["all"]
            numbers = "".join(f"{m[name]:>9.4f}" for name in names)
            lines.append(f"{head:<10}{m['rows']:>9,}{numbers}")
    return "\n".join(lines)
