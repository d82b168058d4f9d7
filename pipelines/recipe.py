"""A recipe: what to train, on what, how. Plain data, checked before work starts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import tf_keras

from qianmo.layers.features import from_mapping
from qianmo.layers.rowwise_adagrad import RowwiseAdagrad
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.pipelines import plugins

# The defaults stand in configs/base.py, where flags can override them.
OPTIMIZERS = {
    "adam": tf_keras.optimizers.Adam,
    "sgd": tf_keras.optimizers.SGD,
    "adagrad": tf_keras.optimizers.Adagrad,
    "sparse_adam": SparseAdam,
    "rowwise_adagrad": RowwiseAdagrad,
}
MONITORS = ("auc", "gauc", "log_loss", "rmse", "mae", "ndcg_10")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where rows come from."""

    train: str
    valid: str
    test: str
    test_support: str
    valid_support: str = ""
    catalogue: str = ""
    shuffle_rows: int
    chunk_rows: int
    chunk_tasks: int
    chunks_beside: bool

    def __post_init__(self) -> None:
        if self.chunk_rows < 0:
            raise ValueError(f"`data.chunk_rows` should be >= 0. Received: {self.chunk_rows}")
        if self.chunk_tasks < 1:
            raise ValueError(f"`data.chunk_tasks` should be >= 1. Received: {self.chunk_tasks}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """How to train."""

    seed: int
    batch_size: int
    epochs: int
    optimizer: Mapping[str, Any]
    table_optimizer: Mapping[str, Any]
    meta_optimizer: Mapping[str, Any]
    monitor: str
    patience: int
    checkpoint_every: int
    steps_per_call: int
    dtype_policy: str
    start_from: str
    start_except: tuple[str, ...] = ()
    monitor_head: str = ""

    def __post_init__(self) -> None:
        for key in ("batch_size", "epochs", "patience", "checkpoint_every", "steps_per_call"):
            if getattr(self, key) < 1:
                raise ValueError(f"`train.{key}` should be >= 1. Received: {getattr(self, key)}")
        if self.monitor not in MONITORS:
            raise ValueError(
                f"`train.monitor` should be one of {MONITORS}. Received: {self.monitor!r}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Migration:
    """What a model takes from a trained one before its first step; see `migrate`.

    Attributes:
      model_dir: directory of the trained model.
      weights: place in this model -> place in that one, attributes and indices joined by slashes.
      tables: embedding tables to take; None for all that the other has.
      domain: id of the domain by whose rows the scores are compared; None for rows of all.
      learning_rate_factor: multiplies the learning rate of the weights taken, not of the tables: 0
        freezes them.
    """

    model_dir: str
    weights: Mapping[str, str]
    tables: tuple[str, ...] | None = None
    domain: int | None = None
    learning_rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("`migrate`: `weights` should map places. Received: none")
        if self.learning_rate_factor < 0:
            raise ValueError(
                "`migrate`: `learning_rate_factor` should be >= 0. "
                f"Received: {self.learning_rate_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe.

    Attributes:
      data, schema, model, train, migrate: its sections.
      plugins: modules that register models and layers; they are imported with the recipe.
    """

    data: Data
    schema: Schema
    model: Mapping[str, Any]
    train: Train
    migrate: Mapping[str, Migration] = dataclasses.field(default_factory=dict)
    plugins: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Recipe:
        """Checks a config, as made by a file in configs/ or read back from a model directory.

        Its plug-ins are imported.

        Raises:
          ValueError: an unknown or missing key, a wrong value, a plug-in that cannot be imported.
        """
        raw = from_mapping(_Sections, config, "config")
        plugins.load(raw.plugins)
        recipe = cls(
            data=from_mapping(Data, raw.data, "config.data"),
            schema=Schema.from_config(raw.schema),
            model=dict(raw.model),
            train=from_mapping(Train, raw.train, "config.train"),
            migrate={
                name: from_mapping(Migration, values, f"config.migrate.{name}")
                for name, values in raw.migrate.items()
            },
            plugins=raw.plugins,
        )
        if recipe.train.monitor == "gauc" and not recipe.schema.task_id:
            raise ValueError("`train.monitor` gauc needs `schema.task_id`, whose rows it groups.")
        if (recipe.train.monitor == "ndcg_10") != bool(recipe.data.catalogue):
            raise ValueError(
                "`train.monitor` should be ndcg_10 with `data.catalogue`, which a retrieval model "
                f"ranks, and only then. Received: {recipe.train.monitor!r}"
            )
        if recipe.data.catalogue and recipe.model.get("name") != "two_tower":
            raise ValueError("`data.catalogue` needs the model two_tower, which ranks items.")
        if recipe.data.catalogue and not recipe.schema.task_id:
            raise ValueError(
                "`data.catalogue` needs `schema.task_id`, whose known items are left out."
            )
        if recipe.model.get("name") == "two_tower" and recipe.train.dtype_policy != "float32":
            # The softmax's mask of accidental hits, of tensorflow-recommenders, knows no other.
            raise ValueError("The model two_tower needs `train.dtype_policy` float32.")
        for part in ("valid", "test"):
            if not getattr(recipe.data, f"{part}_support"):
                continue
            if not getattr(recipe.data, part):
                raise ValueError(
                    f"`data.{part}_support` needs `data.{part}`, whose tasks it supports."
                )
            if not recipe.model.get("meta"):
                raise ValueError(
                    f"`data.{part}_support` needs `model.meta`, which says how to adapt."
                )
        if recipe.data.catalogue and recipe.data.valid_support:
            raise ValueError(
                "`data.valid_support` is for rankers, whose steps and least support are chosen on "
                "it; a retrieval model adapts as it was trained. Leave it empty."
            )
        by_time = (recipe.model.get("meta") or {}).get("split", "time") == "time"
        roles = ("task_id", "timestamp") if by_time else ("task_id",)
        for role in roles if recipe.data.chunk_rows else ():
            if not getattr(recipe.schema, role):
                raise ValueError(f"`data.chunk_rows` needs `schema.{role}`, to cut chunks by.")
        if recipe.train.start_except and not recipe.train.start_from:
            raise ValueError("`train.start_except` needs `train.start_from`, a trained model.")
        return recipe

    def to_config(self) -> dict[str, Any]:
        """Plain data that `from_config` takes."""
        return {
            "data": dataclasses.asdict(self.data),
            "schema": self.schema.to_config(),
            "model": json.loads(json.dumps(dict(self.model))),
            "train": dataclasses.asdict(self.train),
            "migrate": {name: dataclasses.asdict(one) for name, one in self.migrate.items()},
            "plugins": list(self.plugins),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sections:
    data: Mapping[str, Any]
    schema: Mapping[str, Any]
    model: Mapping[str, Any]
    train: Mapping[str, Any]
    migrate: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plugins: tuple[str, ...] = ()


def optimizer(config: Mapping[str, Any], where: str, steps: int = 0) -> Any:
    """Builds an optimiser from `name` and its arguments.

    With `decay` its learning rate falls to 0 along a cosine, in that share of the run's steps:

        rate(t) = rate * (1 + cos(pi min(t / (decay * steps), 1))) / 2

    Args:
      config: the arguments.
      where: key of the recipe, for messages.
      steps: of the whole run; 0 builds an optimiser whose rate stays.

    Raises:
      ValueError: an unknown name or argument, or a value out of range.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    decay = arguments.pop("decay", 0.0)
    if "decay_steps" in arguments:
        raise ValueError(
            f"`{where}.decay_steps` is now `decay`, a share of the run's steps. "
            f"Received: {arguments['decay_steps']}"
        )
    if name not in OPTIMIZERS:
        raise ValueError(
            f"`{where}.name` should be one of {sorted(OPTIMIZERS)}. Received: {name!r}"
        )
    rate = arguments.get("learning_rate")
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"`{where}.learning_rate` should be > 0. Received: {rate!r}")
    if not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(
            f"`{where}.decay` should be a share of the run in [0, 1], 0 for a rate that stays. "
            f"Received: {decay!r}"
        )
    try:
        if decay and steps:
            falls = max(round(decay * steps), 1)
            arguments["learning_rate"] = tf_keras.optimizers.schedules.CosineDecay(rate, falls)
        return OPTIMIZERS[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{where}`: {error}") from error
