"""Every model of the zoo, small, with rows of its schema: for the tests that go over the zoo."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo

Array = Any
SCENES = (7, 1, 4)
SCHEMA = Schema(
    features=(
        Categorical(name="tags", num_ids=5, dim=4, max_length=3, side="item"),
        Categorical(name="topic", num_ids=5, dim=4, domains=(1,)),
        Categorical(name="scene", vocabulary=SCENES, dim=4),
        Dense(name="price", mean=1.0, variance=4.0, domains=(4, 7)),
        Categorical(name="user", num_ids=6, dim=4, side="user"),
        Dense(name="age", mean=0.5, variance=0.25, side="user"),
    ),
    labels=("click", "like"),
    domain="scene",
    task_id="user",
)
SHARED = Schema(  # what all domains have, so that own experts are stacked
    features=(SCHEMA.features[0], SCHEMA.features[2], *SCHEMA.features[4:]),
    labels=("click", "like"),
    domain="scene",
)
SIDES = Schema(
    features=(
        Categorical(name="user", num_ids=6, dim=4, side="user"),
        Categorical(name="tags", num_ids=5, dim=4, max_length=3, side="item"),
        Dense(name="age", mean=0.5, variance=0.25, side="user"),
        Categorical(name="topic", num_ids=5, dim=4, side="item"),
    ),
    labels=("click",),
    task_id="user",
)
B = 12
INTERACTIONS: dict[str, Any] = {
    "fm": {},
    "bi_interaction": {},
    "fwfm": {"per_dim": True},
    "cin": {"units": (4, 3)},
    "cross": {"num_layers": 2},
}
MLPS: dict[str, Any] = {"units": (6, 5)}
EXPERT: dict[str, Any] = {"expert_units": (6, 5), "tower_units": (4,)}
LEVELS: dict[str, Any] = {"expert_units": ((6,), (5,)), "tower_units": (4,)}
TOWERS: dict[str, Any] = {**MLPS, "tower_units": (4,)}
GATES: dict[str, Any] = {**MLPS, "gate_units": 3}
# case -> the model's config
CONFIGS: dict[str, dict[str, Any]] = {
    "lr": {"name": "lr"},
    "mlp": {"name": "mlp", **MLPS},
    "wdl": {"name": "wdl", **MLPS},
    "deepfm": {"name": "deepfm", **MLPS},
    "dcn of rank None": {"name": "dcn", "num_cross_layers": 2, **MLPS},
    "dcn of rank 2": {"name": "dcn", "num_cross_layers": 2, "projection_dim": 2, **MLPS},
    "xdeepfm": {"name": "xdeepfm", "cin_units": (4, 3), **MLPS},
    "xdeepfm of relu": {
        "name": "xdeepfm",
        "cin_units": (4, 3),
        "cin_activation": "relu",
        **MLPS,
    },
    "teacher_alone": {
        "name": "teacher_alone",
        "interactions": INTERACTIONS,
        "teacher_units": (7, 5),
    },
    "dual_dnn": {
        "name": "dual_dnn",
        "interactions": INTERACTIONS,
        "teacher_units": (7, 5),
        "student_units": (4,),
        "kd_weight": 0.7,
        "distance": "soft_labels",
        "temperature": 2.0,
        "hint_weight": 0.3,
    },
    "distilled": {
        "name": "distilled",
        "teacher": {"name": "star", "units": (6,)},
        "student": {"name": "mlp", "units": (5,), "tower_units": (4,)},
    },
    "star": {"name": "star", **MLPS, "auxiliary_units": (3,)},
    "cross_domain": {"name": "cross_domain", **EXPERT, "interactions": {"fm": {}}},
    "cross_domain stacked": {"name": "cross_domain", **EXPERT},
    "shared_bottom": {"name": "shared_bottom", **TOWERS},
    "shared_bottom of domains": {"name": "shared_bottom", **TOWERS, "tasks": "domains"},
    "mmoe": {"name": "mmoe", **EXPERT, "num_experts": 3},
    "mmoe of domains": {"name": "mmoe", **EXPERT, "num_experts": 3, "tasks": "domains"},
    "ple": {"name": "ple", **LEVELS, "num_own": 2},
    "ple of domains": {"name": "ple", **LEVELS, "tasks": "domains"},
    "ppnet": {"name": "ppnet", **GATES},
    "pepnet": {"name": "ppnet", **GATES, "epnet": True},
    "poso": {"name": "poso", **GATES},
    "epnet": {"name": "epnet", **GATES},
    "two_tower": {
        "name": "two_tower",
        "item_id": "topic",
        "dim": 3,
        "units": (6,),
        "seam_dim": 5,
        "item_units": (6,),
        "temperature": 0.2,
        "queue_size": 4,
    },
}
SCHEMAS = {"two_tower": SIDES, "cross_domain stacked": SHARED}  # of the other cases SCHEMA
COUNTS = np.array([3, 1, 0, 2, 5, 1])  # pushes of each row of `topic` into a two-tower's queue


def schema_of(case: str) -> Schema:
    return SCHEMAS.get(case, SCHEMA)


def batch(schema: Schema) -> tuple[dict[str, Array], dict[str, Array]]:
    """Rows with unknown values, empty lists and labels that are absent."""
    rng = np.random.default_rng(7)
    columns = {
        "tags": rng.integers(0, 6, (B, 3)),
        "tags_length": rng.integers(0, 4, B),
        "topic": rng.integers(0, 6, B),
        "scene": np.array([7, 1, 4, 99, 7, 1, 4, 1, 7, 7, 1, 4]),
        "user": rng.integers(-1, 6, B),
        "price": rng.normal(size=B).astype(np.float32),
        "age": rng.normal(size=B).astype(np.float32),
    }
    labels = rng.integers(0, 2, (B, len(schema.labels))).astype(np.float32)
    if len(schema.labels) > 1:
        labels[::5, 1] = np.nan
    weight = rng.uniform(0.5, 2, B).astype(np.float32)
    targets = {"labels": labels, "weight": weight, "task_id": columns["user"]}
    return {n: columns[n] for n in schema.input_names}, targets


def tensors(columns: dict[str, Array]) -> dict[str, tf.Tensor]:
    return {name: tf.constant(column) for name, column in columns.items()}


def built(schema: Schema, config: dict[str, Any]) -> Any:
    """A model with weights away from zeros and ones."""
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(schema, {"embedding_stddev": 0.5, **config})
    model.build()
    random = np.random.default_rng(5)
    for weight in model.trainable_variables:
        weight.assign_add(0.3 * random.normal(size=weight.shape))
    if config["name"] == "two_tower":
        topics = np.repeat(np.arange(6), COUNTS)
        vectors = random.normal(size=(len(topics), config["dim"]))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        model.tower.queue.push(tf.constant(topics), tf.constant(vectors, tf.float32))
    return model
