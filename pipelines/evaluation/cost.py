"""What a model costs: weights, table rows that a batch reads, bytes, steps, size of an export."""

from __future__ import annotations

import itertools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qianmo.layers.encode import owns
from qianmo.models.ranker import Ranker
from qianmo.pipelines.data import readers
from qianmo.pipelines.recipe import Recipe, optimizer

Features = Mapping[str, tf.Tensor]
Batch = tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]


def size_of(folder: pathlib.Path) -> int:
    """Bytes of a folder's files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def times(
    calls: Mapping[Any, Callable[[], Any]],
    repeats: int,
    *,
    span: float = 0.05,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, Any]:
    """Seconds of each call by a clock, one array a name.

    The calls take turns, for about `span` seconds each, so that a busy machine hits them alike.
    """
    counts = {}
    for name, call in calls.items():
        for _ in range(5):
            call()
        start = time.perf_counter()
        call()
        counts[name] = max(3, round(span / (time.perf_counter() - start)))
    found: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            for _ in range(counts[name]):
                start = clock()
                call()
                found[name].append(clock() - start)
    return {name: np.asarray(values) for name, values in found.items()}


def first_batches(recipe: Recipe, count: int) -> list[Batch]:
    """Batches of the recipe's training rows, whole ones if there are that many rows."""
    size, path = recipe.train.batch_size, recipe.data.train
    batches = readers.dataset(
        recipe.schema,
        path,
        batch_size=size,
        seed=recipe.train.seed,
        drop_remainder=readers.count_rows(recipe.schema, path) >= size,
    )
    with readers.own_errors():
        return list(batches.take(count))


class Training:
    """Training steps of a model on batches that are in memory, over and over.

    Args:
      model: takes the steps, and is another one after them.
      recipe: the model's, which names its optimisers.
      batches: such as `first_batches` gives.
    """

    def __init__(self, model: Ranker, recipe: Recipe, batches: Sequence[Batch]) -> None:
        train = recipe.train
        self.model = model
        self.recipe = recipe
        self.batches = batches
        model.compile(
            optimizer(train.optimizer, "train.optimizer"),
            optimizer(train.table_optimizer, "train.table_optimizer"),
            optimizer(train.meta_optimizer, "train.meta_optimizer"),
        )
        for used, variables in model.trained_by():
            used.build(variables)
        self._next = itertools.cycle(batches)
        self._step = tf.function(model.train_step, reduce_retracing=True)

    def step(self) -> Any:
        """One step on the next batch."""
        return self._step(next(self._next))

    def bytes_moved(self, keys: Mapping[str, float]) -> float:
        """Bytes of weights and their optimisers' moments that a step reads and writes.

        Args:
          keys: table -> its rows that the step's batch reads.
        """
        embed = self.model.embed
        tables = self.model.schema.tables
        touched = sum(n * (tables[name].dim + embed.linear_dim) for name, n in keys.items())
        total = 0.0
        for used, variables in self.model.trained_by():
            size = _numbers(variables)
            moments = _numbers([v for v in used.variables if v.shape.rank]) / size
            moved = touched if used is self.model.table_optimizer else size
            total += 2 * 4 * (1 + moments) * moved  # read and written, four bytes each
        return total


def _numbers(variables: Sequence[Any]) -> int:
    return sum(v.shape.num_elements() for v in variables)


def parameters(model: Ranker) -> dict[str, int]:
    """Trainable numbers in the tables, and beside them."""
    tables = _numbers(model.embed.trainable_variables)
    return {"tables": tables, "dense": _numbers(model.trainable_variables) - tables}


def keys(model: Ranker, features: Features) -> dict[str, int]:
    """Distinct rows of each table that a batch reads."""
    schema = model.schema
    encoded = model.encode({name: features[name] for name in schema.input_names})
    found: dict[str, set[int]] = {name: set() for name in schema.tables}
    for feature in schema.categorical:
        ids = encoded.ids[feature.name].numpy()
        is_read = np.ones(ids.shape, bool)
        if feature.is_list:
            is_read = np.arange(ids.shape[1]) < encoded.lengths[feature.name].numpy()[:, None]
        if feature.domains:
            is_read[~owns(schema, feature.domains, encoded.ids[schema.domain]).numpy()] = False
        found[feature.table].update(np.unique(ids[is_read]).tolist())
    return {name: len(rows) for name, rows in found.items()}


def mean_keys(model: Ranker, batches: Sequence[Features]) -> dict[str, float]:
    """`keys`, on average over batches, which may be empty."""
    total = dict.fromkeys(model.schema.tables, 0.0)
    for features in batches:
        for table, number in keys(model, features).items():
            total[table] += number / len(batches)
    return total
