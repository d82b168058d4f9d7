"""What benchmarks of several domains share: training to the best pass, AUCs, their errors."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

from qianmo.layers import metrics
from qianmo.layers.partitioned_norm import PartitionedNorm
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.evaluation import cost
from qianmo.pipelines.evaluation.paired import RESAMPLES
from qianmo.pipelines.recipe import Recipe, optimizer

Floats = Any


class Rows(NamedTuple):
    """A split in memory: the schema with its vocabularies, and each part's (features, targets)."""

    schema: Schema
    train: tuple[Any, Any]
    valid: tuple[Any, Any]
    test: tuple[Any, Any]


@functools.lru_cache(maxsize=2)
def read(folder: pathlib.Path, described: str) -> Rows:
    """Reads a split's folder as a schema, given as JSON, describes it."""
    schema = Schema.from_config(json.loads(described))
    schema = statistics.complete(schema, folder / "train.parquet")
    parts = []
    for name in ("train", "valid", "test"):
        blocks = [*readers.blocks(schema, folder / f"{name}.parquet")]
        block = {column: np.concatenate([b[column] for b in blocks]) for column in blocks[0]}
        parts.append(tf.nest.map_structure(tf.constant, readers.batch(schema, block)))
    return Rows(schema, *parts)


def scores(model: Ranker, features: Mapping[str, tf.Tensor]) -> Floats:
    """Probabilities, [N, K]."""
    count = len(next(iter(features.values())))
    parts = []
    for start in range(0, count, 8192):
        chosen = tf.range(start, start + 8192) % count  # one shape, so that it is traced once
        batch = {name: tf.gather(x, chosen) for name, x in features.items()}
        parts.append(model.probabilities(batch)[model.serving_head].numpy())
    return np.concatenate(parts)[:count]


def mean_auc(targets: Mapping[str, tf.Tensor], found: Floats) -> float:
    """Mean of the AUCs of every domain and label that it has."""
    labels, domain = targets["labels"].numpy(), targets["domain"].numpy()
    return float(
        np.mean(
            [
                metrics.auc(labels[domain == one, k], found[domain == one, k])
                for one in np.unique(domain)
                for k in range(labels.shape[1])
                if not np.isnan(labels[domain == one, k]).any()
            ]
        )
    )


class Trainer:
    """A recipe on a split's folder, traced once and trained from any seed's first weights."""

    def __init__(self, config: ConfigDict, folder: pathlib.Path, most_passes: int) -> None:
        tf_keras.backend.clear_session()
        self.recipe = Recipe.from_config(config.to_dict())
        described = json.dumps(self.recipe.schema.to_config(), sort_keys=True)
        self.rows = read(folder, described)
        self.most_passes = most_passes
        self.model = self._built(self.recipe.train.seed)
        train = self.recipe.train
        self.optimizers = (
            optimizer(train.optimizer, "train.optimizer"),
            optimizer(train.table_optimizer, "train.table_optimizer"),
        )
        self.model.compile(*self.optimizers)

    def _built(self, seed: int) -> Ranker:
        train = dataclasses.replace(self.recipe.train, seed=seed)
        return run_dir.build(dataclasses.replace(self.recipe, schema=self.rows.schema, train=train))

    def parameters(self) -> int:
        """Number of weights that are no embeddings."""
        return cost.parameters(self.model)["dense"]

    def __call__(self, seed: int) -> tuple[Floats, int, float]:
        """Test scores after the pass that is best on validation rows, its number, seconds each."""
        model = self.model
        # Dropout goes on counting, so that its masks are new ones, too.
        fresh = self._built(seed).trainable_variables
        for variable, first in zip(model.trainable_variables, fresh, strict=True):
            variable.assign(first)
        for norm in (layer for layer in model.submodules if isinstance(layer, PartitionedNorm)):
            norm.rows.assign(tf.zeros_like(norm.rows))
        for each in self.optimizers:
            for variable in each.variables:
                if "learning_rate" not in variable.name:
                    variable.assign(tf.zeros_like(variable))
        count = len(self.rows.train[1]["labels"])
        size = min(self.recipe.train.batch_size, count)
        best, found, passes, seconds = -np.inf, np.zeros(0), 0, []
        for number in range(self.most_passes):
            order = np.random.default_rng([seed, number]).permutation(count)
            order = order[: count // size * size]
            batches = tf.nest.map_structure(
                lambda x, order=order: tf.reshape(tf.gather(x, order), [-1, size, *x.shape[1:]]),
                self.rows.train,
            )
            start = time.perf_counter()
            model.fit(tf.data.Dataset.from_tensor_slices(batches), verbose=0)
            seconds.append(time.perf_counter() - start)
            value = mean_auc(self.rows.valid[1], scores(model, self.rows.valid[0]))
            if value <= best:
                break
            best, found, passes = value, scores(model, self.rows.test[0]), number + 1
        return found, passes, float(np.min(seconds))


def draws(users: Floats) -> Floats:
    """How often each user counts, [1 + resample, U]: once, and then as drawn with replacement."""
    shares = np.full(len(users), 1 / len(users))
    drawn = np.random.default_rng(1).multinomial(len(users), shares, RESAMPLES)
    return np.concatenate([np.ones((1, len(users))), drawn]).astype(np.float32)


def difference(one: Floats, other: Floats) -> tuple[float, float]:
    """A difference, and its standard error over the resamples."""
    gain = one - other
    return float(gain[0]), float(np.nanstd(gain[1:], ddof=1))


def thousandths(one: Floats, other: Floats) -> str:
    """A difference in thousandths as text, with its standard error."""
    value, error = difference(one, other)
    return f"{1000 * value:+.1f} ({1000 * error:.1f})"
