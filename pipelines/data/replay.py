"""Rows that an export is replayed on, as columns by name."""

from __future__ import annotations

import numpy as np

from qianmo.export.adapted import without_nan
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers


def first_rows(schema: Schema, path: str, count: int) -> dict[str, np.ndarray]:
    """The first rows of a file, as the model's inputs."""
    with readers.own_errors():
        batch, _ = next(iter(readers.dataset(schema, path, batch_size=count)))
    return {name: column.numpy() for name, column in batch.items()}


def columns(schema: Schema, path: str, count: int | None = None) -> dict[str, np.ndarray]:
    """Rows of a file with the columns of task, time and labels, see `adapted.read_labels`."""
    blocks = []
    left = count
    for block in readers.blocks(schema, path):
        blocks.append({name: values[:left] for name, values in block.items()})
        if left is not None:
            left -= len(blocks[-1][schema.labels[0]])
            if left <= 0:
                break
    found = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
    return {**found, **without_nan(schema, found)}
