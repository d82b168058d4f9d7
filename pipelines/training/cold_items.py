"""First vectors of new items, made of their other features."""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from qianmo.layers.schema import Schema
from qianmo.models.cold_items import ColdItems
from qianmo.pipelines.data import chunks, readers
from qianmo.pipelines.evaluation import retrieval


def learn(
    cold: ColdItems, path: str, *, epochs: int = 1, items: int = 64, seed: int = 1
) -> list[float]:
    """Trains the generator on rows of known items.

    Args:
      cold: the generator and its base.
      path: rows in any order; their times say which of an item's rows are first.
      epochs: passes over the rows.
      items: of a batch, each with up to 2 K consecutive rows.
      seed: of the order.

    Returns:
      The mean loss of each epoch.
    """
    item = cold.item
    schema = dataclasses.replace(cold.base.schema, task_id=item.name, task_dtype=item.dtype)
    reader = chunks.ChunkReader(schema, path, rows=2 * cold.rows, tasks=items)
    means = []
    for epoch in range(epochs):
        losses = []
        batches = reader.dataset(seed=seed, epoch=epoch)
        for features, targets in tqdm(batches, f"epoch {epoch + 1}", reader.num_batches()):
            losses.append(cold.step(features, targets))
        means.append(float(np.mean(losses)))
    return means


def fill(cold: ColdItems, items_path: str, train_path: str) -> int:
    """Writes first vectors of a catalogue's items that have no training row; returns how many."""
    schema = cold.base.schema
    alone = Schema(features=(cold.item,), labels=schema.labels)
    name = cold.item.name
    blocks = readers.blocks(alone, train_path, targets=False)
    seen = np.unique(np.concatenate([np.unique(block[name]) for block in blocks]))
    new = 0
    for block in readers.blocks(retrieval.item_schema(schema), items_path, targets=False):
        is_new = ~np.isin(block[name], seen)
        if is_new.any():
            cold.fill({k: tf.constant(column[is_new]) for k, column in block.items()})
            new += int(is_new.sum())
    return new
