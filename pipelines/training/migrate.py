"""Weights and tables that a model takes from trained ones before its first step.

The recipe's section `migrate` holds, under any name, a model to take from (`recipe.Migration`).
Places are attributes and list indices joined by slashes, as in a checkpoint. What a place holds in
the other model must all fit here, by name and shape; what is here alone starts as it would.

A table's rows are taken by raw value. The vocabulary counted for this model gets the other's values
too, and a value that the other does not know starts with the vector that the other gave to unknown
values: so both score a row alike before the first step, which `compare` checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tensorflow as tf
import tf_keras

from qianmo.export.saved_model import TOLERANCE
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.expert_mixture import ExpertMixture
from qianmo.layers.features import Categorical, Dense, Feature
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker, Weight
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.recipe import Migration, Recipe

ROWS = 1000  # compared


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one entry of `migrate` takes.

    Attributes:
      migration: the entry.
      name: its name in the recipe.
      model: the trained model.
      weights: (place here, weight here, place there, weight there).
      staying: places here, below those named, that the other model does not have.
      tables: table -> for each of its rows the other's row that starts it.
    """

    migration: Migration
    name: str
    model: Ranker
    weights: list[tuple[str, Weight, str, Weight]]
    staying: list[str]
    tables: dict[str, npt.NDArray[np.int64]]

    def lines(self) -> Iterator[str]:
        """What maps to what, as text."""
        yield f"migrate.{self.name}: from {self.migration.model_dir}"
        for here, slot, there, _ in self.weights:
            yield f"  {here} {list(slot.value.shape)} <- {there}"
        yield from (f"  {here} starts as it would" for here in self.staying)
        for table, rows in self.tables.items():
            known = int((rows[1:] > 0).sum())
            yield (
                f"  table {table}: {known:,} of {len(rows) - 1:,} values <- table {table}, "
                "the others and row 0 <- its row 0"
            )


def _weights(model: Ranker, place: str, where: str) -> dict[str, Weight]:
    """The weights at and below a place; counters of calls are none of them."""
    view = tf.train.TrackableView(model)
    found: Any = model
    for depth, part in enumerate(place.split("/")):
        if isinstance(found, DomainMLP) and part.isdigit():
            return {k: Weight(v, int(part)) for k, v in found.of_domain(int(part)).items()}
        children = view.children(found)
        if part not in children:
            at = "/".join(place.split("/")[:depth]) or "the model"
            raise ValueError(
                f"{where}: {at} holds no `{part}`; it holds {', '.join(sorted(children))}."
            )
        found = children[part]
    weights: dict[str, Weight] = {}
    seen = {id(found)}
    queue = [("", found)]
    while queue:
        path, one = queue.pop(0)
        if isinstance(one, tf.Variable):
            if one.dtype.is_floating:
                weights[path] = Weight(one)
            continue
        for name, child in view.children(one).items():
            if id(child) not in seen:
                seen.add(id(child))
                queue.append((_joined(path, name), child))
    return weights


def _joined(place: str, path: str) -> str:
    return "/".join(part for part in (place, path) if part)


def _rows(here: Categorical, there: Categorical, where: str) -> npt.NDArray[np.int64]:
    """For each row of a table, the other table's row of the same raw value, or 0."""
    for key in ("dtype", "hash_buckets"):
        if getattr(here, key) != getattr(there, key):
            raise ValueError(
                f"{where}: table `{here.table}` should have the other's `{key}`. "
                f"Received: {getattr(here, key)!r} and {getattr(there, key)!r}"
            )
    if here.hash_buckets:
        return np.arange(here.num_rows)

    def raw(table: Categorical) -> Any:
        return range(table.num_ids) if table.vocabulary is None else table.vocabulary

    place = {value: row for row, value in enumerate(raw(there), 1)}
    return np.array([0, *(place.get(value, 0) for value in raw(here))])


def _plan(recipe: Recipe, model: Ranker, name: str) -> Plan:
    migration = recipe.migrate[name]
    where = f"`migrate.{name}`"
    other, trained = run_dir.load(migration.model_dir)
    tf_keras.mixed_precision.set_global_policy(recipe.train.dtype_policy)  # `load` set the other's
    weights: list[tuple[str, Weight, str, Weight]] = []
    staying: list[str] = []
    for here, there in migration.weights.items():
        ours, theirs = _weights(model, here, where), _weights(other, there, where)
        for path, source in theirs.items():
            names = _joined(here, path), _joined(there, path)
            if path not in ours:
                raise ValueError(
                    f"{where}: {names[1]} of {migration.model_dir} has no place here: "
                    f"{names[0]} is missing."
                )
            shapes = ours[path].value.shape, source.value.shape
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{where}: {names[0]} is {list(shapes[0])}, and {names[1]} of "
                    f"{migration.model_dir} {list(shapes[1])}."
                )
            weights.append((names[0], ours[path], names[1], source))
        staying += [_joined(here, path) for path in ours if path not in theirs]
    tables = {}
    known = trained.schema.tables
    for table in known if migration.tables is None else migration.tables:
        if table not in known or table not in recipe.schema.tables:
            raise ValueError(
                f"{where}: table `{table}` should be in both models. Received: here "
                f"{sorted(recipe.schema.tables)}, in {migration.model_dir} {sorted(known)}"
            )
        widths = [part.embed.rows(table)[0].shape[1] for part in (model, other)]
        if widths[0] != widths[1]:
            raise ValueError(
                f"{where}: table `{table}` has rows of {widths[0]} numbers here, and of "
                f"{widths[1]} in {migration.model_dir}."
            )
        tables[table] = _rows(recipe.schema.tables[table], known[table], where)
    return Plan(migration, name, other, weights, staying, tables)


def plans(recipe: Recipe, model: Ranker) -> list[Plan]:
    """What the recipe's entries take.

    Raises:
      ValueError: a place that is not there, a weight that has no place or another shape, a table
        that does not fit, a weight or table that two entries take.
    """
    found = [_plan(recipe, model, name) for name in recipe.migrate]
    taken: dict[Any, str] = {}
    for plan in found:
        keys: list[tuple[str, Any]] = [
            (here, (weight.variable.ref(), weight.place)) for here, weight, _, _ in plan.weights
        ]
        keys += [(f"table {table}", table) for table in plan.tables]
        for what, key in keys:
            if key in taken:
                raise ValueError(
                    f"`migrate.{taken[key]}` and `migrate.{plan.name}` both start {what}."
                )
            taken[key] = plan.name
    return found


def take(model: Ranker, plan: Plan) -> None:
    """Puts the weights and rows into their places."""
    for _, slot, _, source in plan.weights:
        slot.assign(source.value)
    values: dict[Any, npt.NDArray[Any]] = {}
    for table, rows in plan.tables.items():
        variable, first, end = model.embed.rows(table)
        source, start, _ = plan.model.embed.rows(table)
        value = values.setdefault(variable.ref(), variable.numpy())
        value[first:end] = source.numpy()[start + rows]
    for reference, value in values.items():
        reference.deref().assign(value)


@contextlib.contextmanager
def _gate_on(model: Ranker, plan: Plan) -> Iterator[None]:
    """Puts all weight of the gate on the expert that took weights, for the time being."""
    taken = {weight.variable.ref() for _, weight, _, _ in plan.weights}
    gates = []
    for layer in model.submodules:
        if isinstance(layer, ExpertMixture):
            experts = [*layer.shared, layer.own]
            at = [i for i, e in enumerate(experts) if any(v.ref() in taken for v in e.variables)]
            if len(at) == 1:
                layer.gate.only = at[0]
                gates.append(layer.gate)
    try:
        yield
    finally:
        for gate in gates:
            gate.only = None


def compare(recipe: Recipe, model: Ranker, plan: Plan) -> tuple[str, float] | None:
    """Largest difference between both models, with the gate on the expert that took weights.

    Rows are the first training rows of the entry's domain. What is compared are the logits of
    labels that both models have, or, where the other's tower was not taken, what crosses the tower
    seam. None where neither need agree, as not all of the other's tables or bottom were taken.

    Returns:
      What was compared, and the difference.

    Raises:
      ValueError: they differ, or the other model reads what this one does not.
    """
    other = plan.model
    tower: Any = other.tower_of(other.serving_head)
    taken = {source.variable.ref() for _, _, _, source in plan.weights}
    of_tower = {v.ref() for v in tower.trainable_variables}
    of_tables = {v.ref() for v in other.embed.trainable_variables}
    below = {v.ref() for v in other.trainable_variables} - of_tower - of_tables
    if not below <= taken or set(plan.tables) < set(other.schema.tables):
        return None
    where = f"`migrate.{plan.name}`"
    missing = sorted(set(other.schema.input_names) - set(recipe.schema.input_names))
    if missing:
        raise ValueError(f"{where}: its model reads `{missing[0]}`, which this schema lacks.")
    schema = recipe.schema
    if plan.migration.domain is not None:
        schema = dataclasses.replace(schema, only_domains=(plan.migration.domain,))
    features, _ = next(iter(readers.dataset(schema, recipe.data.train, batch_size=ROWS)))
    shared = [label for label in schema.labels if label in other.schema.labels]
    with _gate_on(model, plan):
        if of_tower <= taken and shared:
            what = "logits"
            here = model(features)[model.serving_head]
            there = other(features)[other.serving_head]
            pairs = [
                (here[:, schema.labels.index(label)], there[:, other.schema.labels.index(label)])
                for label in shared
            ]
        else:
            what = "tower inputs"
            h = model.tower_input(features, model.serving_head)
            h_there = other.tower_input(features, other.serving_head)
            if h.shape[1] < h_there.shape[1]:
                return None
            pairs = [(h[:, : h_there.shape[1]], h_there)]
    difference = max(float(tf.reduce_max(tf.abs(a - b))) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{where}: before the first step {what} differ by {difference:.1e} from those of "
            f"{plan.migration.model_dir}. Its features should be those of the expert, in the same "
            "order, with the same settings, means and variances; the weights named should be all "
            "that its score comes from."
        )
    return what, difference


def check_meaning(model: Ranker, plan: Plan) -> None:
    """Looks whether weights that no scores could check mean the same in both models.

    Raises:
      ValueError: a tower that writes other labels, or in another order; a bottom that reads other
        features, or in another order.
    """
    other, where = plan.model, f"`migrate.{plan.name}`"
    taken = {source.variable.ref() for _, _, _, source in plan.weights}
    tower = {v.ref() for v in cast(Any, other.tower_of(other.serving_head)).variables}
    if taken & tower and model.schema.labels != other.schema.labels:
        raise ValueError(
            f"{where}: the tower of {plan.migration.model_dir} writes "
            f"{list(other.schema.labels)}, and this schema has {list(model.schema.labels)}. Give "
            "the labels in that order, or leave the tower out of `weights`."
        )
    tables = {v.ref() for v in other.embed.variables}
    if taken - tower - tables:
        ours, theirs = (
            [(f.name, f.dim if isinstance(f, Categorical) else f.indicator) for f in s.features]
            for s in (model.schema, other.schema)
        )
        known = {name for name, _ in theirs}
        if [read for read in ours if read[0] in known] != theirs:
            raise ValueError(
                f"{where}: {plan.migration.model_dir} reads {[name for name, _ in theirs]}, and "
                f"this schema {[name for name, _ in ours]}. Give the other's features first, in "
                "its order and with its sizes."
            )


def start(recipe: Recipe, model: Ranker) -> list[tuple[Weight, float]]:
    """Takes what the recipe's `migrate` says; prints and checks it.

    Returns:
      Weights that should move by a factor of what the others do.
    """
    found = plans(recipe, model)
    for plan in found:
        take(model, plan)
    for plan in found:
        print("\n".join(plan.lines()))
        compared = compare(recipe, model, plan)
        if compared is None:
            check_meaning(model, plan)
            print("  no scores to compare, as not all that a score comes from was taken")
        else:
            what, difference = compared
            print(f"  largest difference of {what} before the first step: {difference:.1e}")
    return [
        (slot, plan.migration.learning_rate_factor)
        for plan in found
        if plan.migration.learning_rate_factor != 1
        for _, slot, _, _ in plan.weights
        if slot.variable.trainable
    ]


def with_moments(schema: Schema, migrate: Mapping[str, Migration]) -> Schema:
    """Takes the means and variances that the schema does not give from the trained models."""
    for migration in migrate.values():
        known = {f.name: f for f in run_dir.read_recipe(migration.model_dir).schema.dense}
        features: list[Feature] = []
        for feature in schema.features:
            other = known.get(feature.name)
            if isinstance(feature, Dense) and feature.mean is None and other is not None:
                feature = dataclasses.replace(feature, mean=other.mean, variance=other.variance)
            features.append(feature)
        schema = schema.with_features(features)
    return schema


def with_values(schema: Schema, counted: Schema, migrate: Mapping[str, Migration]) -> Schema:
    """Adds the trained models' values to the vocabularies that were counted, but no domains.

    Args:
      schema: the schema as the recipe gives it.
      counted: the same, with vocabularies.
      migrate: the models.
    """
    given = {n for n, t in schema.tables.items() if t.vocabulary is not None}
    given |= {schema.domain_feature.table} if schema.domain_feature else set()
    for migration in migrate.values():
        known = run_dir.read_recipe(migration.model_dir).schema.tables
        features: list[Feature] = []
        for feature in counted.features:
            if (
                isinstance(feature, Categorical)
                and feature.vocabulary is not None
                and feature.table not in given
                and (other := known.get(feature.table)) is not None
            ):
                more = dict.fromkeys([*feature.vocabulary, *(other.vocabulary or ())])
                feature = dataclasses.replace(feature, vocabulary=tuple(more))
            features.append(feature)
        counted = counted.with_features(features)
    return counted
