"""What a run sees within an epoch: progress, the loss curve, checkpoints, and a loss gone wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import tf_keras
from tqdm import tqdm

from qianmo.models.ranker import Ranker

POINTS = 300  # of the loss curve in a whole run
QUICK_SHARE = 0.05  # of the time of training that quick validation may take


class NotFiniteError(ArithmeticError):
    """The loss was NaN or infinite."""


class Curve:
    """Means of the loss and its terms over windows of steps, and quick validation between.

    Args:
      points: [step, name -> mean] of an earlier part of the run.
      total: steps of the whole run.
    """

    def __init__(self, points: list[list[Any]], total: int) -> None:
        self.points = points
        self.every = max(total // POINTS, 1)
        self._totals: dict[str, tuple[float, float]] = {}

    def cut(self, step: int) -> None:
        """Forgets what was seen after a step, from which a run goes on."""
        self.points = [point for point in self.points if point[0] <= step]

    def restart(self) -> None:
        """Begins an epoch, in which the running means start anew."""
        self._totals = {}

    def add(self, step: int, model: Ranker) -> None:
        """Notes the means since the last point, if it is time for one."""
        last = self.points[-1][0] if self.points else 0
        if step - last < self.every:
            return
        means = {}
        for name, metric in model.running_means.items():
            total, count = float(metric.total), float(metric.count)
            before, number = self._totals.get(name, (0.0, 0.0))
            if count > number:
                means[name] = (total - before) / (count - number)
            self._totals[name] = (total, count)
        self.points.append([step, means])


class Watch(tf_keras.callbacks.Callback):
    """Progress bar, curve, checkpoints, and a halt when the loss is not finite.

    Args:
      title: of the bar.
      steps: of an epoch.
      first: steps of this epoch that an earlier part of the run took.
      before: steps of earlier epochs.
      rows: of a step, on average.
      checkpoint_every: steps between checkpoints.
      save: writes a checkpoint after so many steps of the epoch.
      curve: of the run.
      quick: a validation metric on a few rows, by name; None where there are none.
    """

    def __init__(
        self,
        title: str,
        *,
        steps: int,
        first: int,
        before: int,
        rows: float,
        checkpoint_every: int,
        save: Callable[[int], None],
        curve: Curve,
        quick: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        super().__init__()
        self._title = title
        self._steps, self._first, self._before, self._rows = steps, first, before, rows
        self._every, self._save, self._curve, self._quick = checkpoint_every, save, curve, quick
        self._steady: tuple[float, int] | None = None  # time and step after the first call
        self._saved = first
        self._quick_seconds = 0.0
        self.seconds_per_sample = float("nan")

    def on_train_begin(self, logs: Any = None) -> None:
        self._start = time.perf_counter()
        self._curve.restart()
        self._bar = tqdm(
            desc=self._title,
            total=self._steps * self._rows,
            initial=self._first * self._rows,
            unit=" samples",
            unit_scale=True,
            mininterval=0.5,
        )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        done = self._first + batch + 1
        if int(self.model.first_bad_step) >= 0:
            self.model.stop_training = True
            return
        self._bar.set_postfix_str(f"loss {(logs or {}).get('loss', float('nan')):.4f}")
        self._bar.update(done * self._rows - self._bar.n)
        self._curve.add(self._before + done, self.model)
        self._validate(self._before + done)
        if self._steady is None:
            self._steady = (time.perf_counter(), done)
        if done // self._every > self._saved // self._every and done < self._steps:
            self._saved = done
            self._save(done)

    def _validate(self, step: int) -> None:
        """Measures the few rows at a point of the curve, while that takes little of the time."""
        if self._quick is None or not self._curve.points or self._curve.points[-1][0] != step:
            return
        spent = time.perf_counter() - self._start
        if self._quick_seconds > QUICK_SHARE * spent:
            return
        begin = time.perf_counter()
        self._curve.points[-1][1].update(self._quick())
        self._quick_seconds += time.perf_counter() - begin

    def on_train_end(self, logs: Any = None) -> None:
        self._bar.close()

    def samples_per_second(self) -> float:
        """Throughput without the first call, which traces the graph, and without validation."""
        if self._steady is None or self._steady[1] >= self._steps:
            return float("nan")
        seconds = time.perf_counter() - self._steady[0] - self._quick_seconds
        return (self._steps - self._steady[1]) * self._rows / seconds
