"""Blocks as what a model takes: features and targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import keys
from qianmo.pipelines.data.columns import Block, Column, of_schema
from qianmo.pipelines.data.convert import is_of


def batch(schema: Schema, block: Block, gauc: bool = False) -> tuple[Block, Block]:
    """The features and targets of a block, as `dataset` gives them."""
    labels, label_weights = labels_and_weights(schema, block)
    targets = {role: block[name] for role, name in _roles(schema).items()}
    if schema.task_id:
        targets["task_id"] = keys.task_ids(schema, block)
    if schema.label_weights:
        targets["label_weights"] = label_weights
    if gauc and schema.gauc_by:
        targets["gauc"] = keys.groups(schema, block)
    features = {name: block[name] for name in schema.input_names}
    return features, {"labels": labels, "weight": row_weights(schema, block), **targets}


def row_weights(schema: Schema, block: Block) -> Any:
    """What a block's rows weigh in the loss, float32 [n]: their own weight times their domain's."""
    size = len(block[schema.labels[0]])
    weight = block[schema.weight] if schema.weight else np.ones(size, np.float32)
    for domain, factor in schema.domain_weights:
        own = is_of(block[schema.domain], (domain,))
        weight = np.where(own, np.float32(factor) * weight, weight)
    return weight


def labels_and_weights(schema: Schema, block: Block) -> tuple[Any, Any]:
    """A block's labels, float32 [n, K], and what their losses are multiplied by, [n, K].

    A label is NaN where the row does not have it, or a column of its weights holds 0.
    """
    labels, weights = [], []
    for name in schema.labels:
        weight = schema.label_weights.get(name, 1.0)
        label = block[name]
        if isinstance(weight, str):
            factor = block[weight]
            label = np.where(factor == 0, np.float32(np.nan), label)
        else:
            factor = np.full(len(label), weight, np.float32)
        labels.append(label)
        weights.append(np.where(np.isnan(label), np.float32(0), factor))
    return np.stack(labels, axis=1), np.stack(weights, axis=1)


def signature(
    schema: Schema, gauc: bool = False
) -> tuple[dict[str, tf.TensorSpec], dict[str, tf.TensorSpec]]:
    """The types and shapes of `batch`, with any number of rows."""
    columns = of_schema(schema)

    def spec(column: Column) -> tf.TensorSpec:
        shape = [None, column.max_length] if column.max_length else [None]
        return tf.TensorSpec(shape, tf.as_dtype(column.dtype))

    lengths = [f.length_name for f in schema.categorical if f.is_list]
    num_labels = len(schema.labels)
    targets = {
        "labels": tf.TensorSpec([None, num_labels], tf.float32),
        "weight": tf.TensorSpec([None], tf.float32),
        **{role: spec(columns[name]) for role, name in _roles(schema).items()},
    }
    if schema.task_id:
        targets["task_id"] = tf.TensorSpec([None], tf.int64)
    if schema.label_weights:
        targets["label_weights"] = tf.TensorSpec([None, num_labels], tf.float32)
    if gauc and schema.gauc_by:
        targets["gauc"] = tf.TensorSpec([None], tf.int64)
    features = {feature.name: spec(columns[feature.name]) for feature in schema.features}
    return features | {name: tf.TensorSpec([None], tf.int64) for name in lengths}, targets


def _roles(schema: Schema) -> dict[str, str]:
    """The columns that become targets as they are, where declared."""
    roles = ("domain", "timestamp", "event_id", "group")
    return {role: getattr(schema, role) for role in roles if getattr(schema, role)}
