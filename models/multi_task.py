"""Shared-bottom, MMoE and PLE, whose tasks are labels or domains.

With `tasks="labels"` every row is of all tasks and each label has a tower. With `tasks="domains"`
a row is of its own domain's task: that domain's gate and tower, which gives all labels. Towers of
domains share nothing, so in training a share of the rows, `hide_rate`, is read as of an unknown
domain: these teach the tower and the gate that serve unknown domains. The domain feature's own
`drop_rate`, if it has one, is that share instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import tf_keras

from qianmo.layers.bottom import Bottom
from qianmo.layers.domain_column import DomainColumn
from qianmo.layers.domain_towers import DomainTowers
from qianmo.layers.extended import Extended
from qianmo.layers.features import Categorical
from qianmo.layers.label_towers import LabelTowers
from qianmo.layers.mmoe import MMoE
from qianmo.layers.ple import PLE
from qianmo.layers.schema import Schema
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.tower import Tower
from qianmo.models.cross_domain import expert
from qianmo.models.road import Road

Tasks = Literal["labels", "domains"]
TOWERS, GATES, EXPERTS = range(3)  # paths of the parts' seeds


def _road(
    schema: Schema,
    bottom: tf_keras.layers.Layer,
    seed: int,
    *,
    by_domain: bool,
    split: bool,
    tower_units: Sequence[int],
    dropout: float,
    hide_rate: float,
    ranker: Mapping[str, Any],
) -> Road:
    num_labels = len(schema.labels)
    seed = derive_seed(seed, TOWERS)
    if not by_domain:
        towers = [
            Tower(1, tower_units, dropout, seed=derive_seed(seed, k), name=f"tower_{k}")
            for k in range(num_labels)
        ]
        return Road(schema, bottom, LabelTowers(towers, split, name="tower"), **ranker)
    features = [
        dataclasses.replace(f, drop_rate=f.drop_rate or hide_rate)
        if isinstance(f, Categorical) and f.name == schema.domain
        else f
        for f in schema.features
    ]
    schema = schema.with_features(features)
    whole = Extended(bottom, columns=[DomainColumn(name="domain")], name="bottom")
    tower = DomainTowers(
        num_labels, schema.num_domains, tower_units, dropout, seed=seed, name="tower"
    )
    return Road(schema, whole, tower, **ranker)


def _is_by_domain(tasks: Tasks) -> bool:
    if tasks not in get_args(Tasks):
        raise ValueError(f"`tasks` should be one of {get_args(Tasks)}. Received: {tasks!r}")
    return tasks == "domains"


def shared_bottom(
    schema: Schema,
    *,
    tasks: Tasks = "labels",
    units: Sequence[int] = (128, 64),
    interactions: Mapping[str, Mapping[str, Any]] | None = None,
    tower_units: Sequence[int] = (32,),
    dropout: float = 0.0,
    hide_rate: float = 0.05,
    **ranker: Any,
) -> Road:
    """One network for all tasks, and a tower for each.

    Args:
      schema: what a row holds.
      tasks: "labels" or "domains".
      units: widths of the shared network.
      interactions: name -> arguments of the interactions beside it.
      tower_units: widths of each tower.
      dropout: of both.
      hide_rate: by domain, share of the training rows that are read as of an unknown domain.
      **ranker: arguments of `Ranker`.
    """
    seed = pick_seed(None)
    bottom = expert(interactions or {}, units, dropout, derive_seed(seed, EXPERTS))
    return _road(
        schema,
        bottom,
        seed,
        by_domain=_is_by_domain(tasks),
        split=False,
        tower_units=tower_units,
        dropout=dropout,
        hide_rate=hide_rate,
        ranker=ranker,
    )


def mmoe(
    schema: Schema,
    *,
    tasks: Tasks = "labels",
    num_experts: int = 4,
    expert_units: Sequence[int] = (128, 64),
    interactions: Mapping[str, Mapping[str, Any]] | None = None,
    tower_units: Sequence[int] = (32,),
    dropout: float = 0.0,
    hide_rate: float = 0.05,
    **ranker: Any,
) -> Road:
    """Experts that all tasks share, and a gate and a tower for each task.

    Args:
      schema: what a row holds.
      tasks: "labels" or "domains".
      num_experts: experts.
      expert_units: widths of each expert.
      interactions: name -> arguments of the interactions in each expert beside its MLP.
      tower_units: widths of each tower.
      dropout: of experts and towers.
      hide_rate: by domain, share of the training rows that are read as of an unknown domain.
      **ranker: arguments of `Ranker`.
    """
    seed = pick_seed(None)
    by_domain = _is_by_domain(tasks)
    experts: list[Bottom] = [
        expert(interactions or {}, expert_units, dropout, derive_seed(seed, EXPERTS, i))
        for i in range(num_experts)
    ]
    num_tasks = schema.num_domains + 1 if by_domain else len(schema.labels)
    return _road(
        schema,
        MMoE(experts, num_tasks, by_domain, seed=derive_seed(seed, GATES), name="experts"),
        seed,
        by_domain=by_domain,
        split=True,
        tower_units=tower_units,
        dropout=dropout,
        hide_rate=hide_rate,
        ranker=ranker,
    )


def ple(
    schema: Schema,
    *,
    tasks: Tasks = "labels",
    num_own: int = 1,
    num_shared: int = 1,
    expert_units: Sequence[Sequence[int]] = ((128,), (64,)),
    tower_units: Sequence[int] = (32,),
    dropout: float = 0.0,
    hide_rate: float = 0.05,
    **ranker: Any,
) -> Road:
    """Levels of shared experts and experts of each task, and a tower for each task.

    Args:
      schema: what a row holds.
      tasks: "labels" or "domains".
      num_own: experts of each task and level.
      num_shared: shared experts of each level.
      expert_units: of each level, the widths of its experts' layers.
      tower_units: widths of each tower.
      dropout: of experts and towers.
      hide_rate: by domain, share of the training rows that are read as of an unknown domain.
      **ranker: arguments of `Ranker`.
    """
    seed = pick_seed(None)
    by_domain = _is_by_domain(tasks)
    return _road(
        schema,
        PLE(
            schema.num_domains if by_domain else len(schema.labels),
            expert_units,
            num_own,
            num_shared,
            by_domain,
            dropout,
            seed=derive_seed(seed, EXPERTS),
            name="experts",
        ),
        seed,
        by_domain=by_domain,
        split=True,
        tower_units=tower_units,
        dropout=dropout,
        hide_rate=hide_rate,
        ranker=ranker,
    )
