"""Support rows of tasks, run up to the tower seam."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from qianmo.layers.inner_loop import Support
from qianmo.models.ranker import Ranker
from qianmo.pipelines.data import readers


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """What crossed the tower seam for each task's support rows, the newest last.

    Attributes:
      task_id: [T], rising.
      h: [T, S, H]; a task with fewer rows has them at the end.
      labels: [T, S, K]; NaN where a row does not have that label, which is then no support for it.
      count: [T].
    """

    task_id: npt.NDArray[Any]
    h: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32]
    count: npt.NDArray[np.int64]

    def newest(self, rows: int) -> TaskRows:
        """The same with at most that many rows a task."""
        first = self.h.shape[1] - min(rows, self.h.shape[1])
        return TaskRows(
            self.task_id, self.h[:, first:], self.labels[:, first:], np.minimum(self.count, rows)
        )

    def of(self, task_id: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], Support]:
        """Each row's place among the distinct tasks, and the support of those."""
        asked, place = np.unique(task_id, return_inverse=True)
        at = np.minimum(np.searchsorted(self.task_id, asked), max(len(self.task_id) - 1, 0))
        known = self.task_id[at] == asked
        count = np.where(known, self.count[at], 0)
        width = self.h.shape[1]
        inside = np.arange(width) >= width - count[:, None]
        labels = self.labels[at]
        is_there = ~np.isnan(labels)
        weights = (inside[:, :, None] & is_there).astype("f4")
        return place, Support(self.h[at], np.where(is_there, labels, np.float32(0)), weights)


def support_rows(model: Ranker, path: str, most: int = 20) -> TaskRows:
    """Runs the rows of a file up to the tower seam.

    Args:
      model: its serving head's tower is the one to adapt.
      path: rows as the model reads them, those of a task in order of time.
      most: rows to keep of each task, the newest.
    """
    tower_input = tf.function(
        lambda features: model.tower_input(features, model.serving_head), reduce_retracing=True
    )
    parts: dict[str, list[Any]] = {"h": [], "labels": [], "task_id": []}
    with readers.own_errors():
        for features, targets in readers.dataset(model.schema, path, batch_size=8192):
            parts["h"].append(tower_input(features).numpy())
            for name in ("labels", "task_id"):
                parts[name].append(targets[name].numpy())
    h, labels, task_id = (np.concatenate(parts[name]) for name in ("h", "labels", "task_id"))
    order = np.argsort(task_id, kind="stable")
    tasks, starts, counts = np.unique(task_id[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts + counts, counts)  # -1 is the newest
    task = np.repeat(np.arange(len(tasks)), counts)
    kept = place >= -most
    found = TaskRows(
        tasks,
        np.zeros((len(tasks), most, h.shape[1]), np.float32),
        np.zeros((len(tasks), most, labels.shape[1]), np.float32),
        np.minimum(counts, most),
    )
    where = task[kept], most + place[kept]
    found.h[where] = h[order][kept]
    found.labels[where] = labels[order][kept]
    return found
