"""What happens before a model is built: the schema is completed, and the rows are looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from qianmo.layers import metrics
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import keys, look, readers, statistics, summaries
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import migrate

Looks = Mapping[str, summaries.Summary]


def in_order_of(schema: Schema, start: Schema) -> Schema:
    """The schema with features and labels in another's order, so that weights keep their meaning.

    What the other does not have comes last.
    """

    def order(name: str, names: list[str]) -> int:
        return names.index(name) if name in names else len(names)

    features = [f.name for f in start.features]
    labels = list(start.labels)
    return dataclasses.replace(
        schema,
        features=tuple(sorted(schema.features, key=lambda f: order(f.name, features))),
        labels=tuple(sorted(schema.labels, key=lambda label: order(label, labels))),
    )


def completed(recipe: Recipe, watched: look.Look | None = None) -> Recipe:
    """The recipe with what is counted: by the model it starts from, or the training rows.

    Args:
      recipe: as it was given.
      watched: sees the training rows on the way.
    """
    schema, migrated = recipe.schema, recipe.migrate
    if recipe.train.start_from:
        start = run_dir.read_recipe(recipe.train.start_from).schema
        schema = in_order_of(statistics.inherit(schema, start), start)
    else:
        schema = statistics.without_empty_domains(schema, recipe.data.train)
    schema = migrate.with_moments(schema, migrated)
    if watched is None:
        counted = statistics.complete(schema, recipe.data.train)
    else:
        found = statistics.count(schema, recipe.data.train, watched.observe)
        counted, watched.tally = found.schema, found.tally
    return dataclasses.replace(recipe, schema=migrate.with_values(schema, counted, migrated))


def looked(recipe: Recipe) -> tuple[Recipe, dict[str, summaries.Summary]]:
    """The completed recipe, and what its training and validation rows are; prints both.

    The training rows are read once.
    """
    watched = look.Look(recipe.schema)
    done = completed(recipe, watched)
    found = {"train": watched.summary(done.schema)}
    if recipe.data.valid:
        watched = look.Look(done.schema)
        rows = readers.blocks(done.schema, recipe.data.valid, gauc=True, tally=watched.tally)
        for block in rows:
            watched.observe(block)
        found["valid"] = watched.summary(done.schema, found["train"])
        _check_monitor(done, found["valid"], watched.sample())
    for role, summary in found.items():
        drifts = summaries.drift(found["train"], summary) if role != "train" else None
        print(f"data.{role}: {getattr(recipe.data, role)}: {summaries.table(summary, drifts)}")
    return done, found


def check_learnable(recipe: Recipe, model: Ranker, found: Looks) -> None:
    """Refuses training rows of which the model can learn nothing.

    Raises:
      DataError: see `summaries.check_learnable`.
    """
    path, alone = recipe.data.train, model.learns_from_positives
    summaries.check_learnable(recipe.schema, found["train"], path, positives_alone=alone)


def _check_monitor(recipe: Recipe, found: summaries.Summary, sample: readers.Block) -> None:
    """Refuses a metric to stop by that is defined for no label of the validation rows.

    Args:
      recipe: names the metric.
      found: what the validation rows are.
      sample: some of them, or all. By some alone, no group is called one of a single class.

    Raises:
      DataError: there is none.
    """
    monitor, schema = recipe.train.monitor, recipe.schema
    groups = None
    if monitor == "gauc" and found.sampled == found.rows:
        groups = keys.groups(schema, sample) if schema.gauc_by else keys.task_ids(schema, sample)
    for label, seen in found.labels.items():
        if not _is_defined(monitor, schema.kind(label), seen):
            continue
        is_there = ~np.isnan(sample[label])
        labels = sample[label][is_there]
        if groups is None or np.isfinite(metrics.gauc(labels, labels, groups[is_there])):
            return
    raise readers.DataError(
        f"{recipe.data.valid}: `train.monitor` {monitor} is defined for no label of these rows, so "
        "no epoch could be told from another. Give rows with both classes, or another metric: "
        "--config.train.monitor=log_loss, or rmse for ratings."
    )


def _is_defined(monitor: str, kind: str, seen: Mapping[str, float]) -> bool:
    """Whether a metric is defined on the rows that have a label."""
    if kind == "rating" or monitor in ("rmse", "mae"):
        return kind == "rating" and monitor in ("rmse", "mae") and seen["rows"] > 0
    if monitor == "log_loss":
        return seen["rows"] > 0
    if monitor == "ndcg_10":
        return seen["sum"] > 0
    return seen["classes"] == 1 and 0 < seen["sum"] < seen["rows"]
