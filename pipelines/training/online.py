"""Updates of one trained student by a stream of rows."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from qianmo.export.publishing import Origin
from qianmo.export.saved_model import Rows
from qianmo.layers.label_heads import predictions
from qianmo.models.dual_dnn import DualDNN
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.replay import first_rows
from qianmo.pipelines.data.streams import Position, Stream
from qianmo.pipelines.evaluation.scores import measure
from qianmo.pipelines.recipe import optimizer
from qianmo.pipelines.training import restore, runtime
from qianmo.pipelines.training.watch import NotFiniteError

_KEPT_ENTRIES = 1000  # of windows and versions, in the report


_REPLAYED_ROWS = 1000  # before a graph is published


_IDLE_SECONDS = 0.2  # between two looks at a stream that had no rows


OpenStream = Callable[[Position | None], Stream]


# Publishes the model, checked on rows, and tells what it comes from; returns the version's folder
# and the largest difference.
Publish = Callable[[DualDNN, Rows, Origin], tuple[pathlib.Path, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """When what happens.

    Attributes:
      batch_size: rows of a step.
      checkpoint_rows: rows between checkpoints.
      publish_rows: rows between graphs; 0 leaves it to the clock.
      publish_minutes: minutes between graphs; 0 leaves it to the rows.
    """

    batch_size: int
    checkpoint_rows: int = 2**16
    publish_rows: int = 0
    publish_minutes: float = 10.0


class _State(tf.train.experimental.PythonState):
    """What a checkpoint holds beside weights: plain data."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def serialize(self) -> str:
        return json.dumps(self.values)

    def deserialize(self, text: str | bytes) -> None:
        self.values = json.loads(text)


def hot_start(
    model_dir: str | pathlib.Path, learning_rate: float | None = None
) -> tuple[DualDNN, int]:
    """A trained dual DNN whose steps move its student alone.

    Args:
      model_dir: a directory of `qianmo.pipelines.train`.
      learning_rate: of the steps. Default: the recipe's, without its decay.

    Returns:
      The model, and the step that the optimiser's state is of; 0 where it is new.

    Raises:
      ValueError: no such model, or one without a student.
    """
    runtime.settle()
    model, recipe = run_dir.load(model_dir)
    if not isinstance(model, DualDNN):
        raise ValueError(
            f"{model_dir} should hold a `dual_dnn`, whose student moves. "
            f"Received: {recipe.model['name']!r}"
        )
    made = []
    for part in ("optimizer", "table_optimizer", "meta_optimizer"):
        config = {k: v for k, v in getattr(recipe.train, part).items() if k != "decay"}
        made.append(optimizer(config, f"train.{part}"))
    model.compile(*made)
    # The state is kept by the variables' places among those that were trained.
    for used, variables in model.trained_by():
        used.build(variables)
    kept = {"optimizer": model.optimizer, "meta_optimizer": model.meta_optimizer}
    run_dir.restore_optimizers(model_dir, **kept)
    own = recipe.train.optimizer["learning_rate"]
    model.optimizer.learning_rate = own if learning_rate is None else learning_rate
    model.freeze_teacher()
    model.kd_warmup_steps = 0
    model.embed.l2 = 0.0  # of vectors that do not move
    return model, int(model.optimizer.iterations)


class Online:
    """Updates of one trained student by one stream.

    Args:
      model_dir: what it starts from.
      folder: where checkpoints and the report go; the same one continues.
      open_stream: opens the stream, at a position or at its beginning.
      publish: publishes the model.
      pace: when what happens.
      learning_rate: of the steps; see `hot_start`.

    Raises:
      ValueError: the folder holds updates of other weights; see also `hot_start`.
      readers.DataError: the stream cannot be opened.
    """

    def __init__(
        self,
        model_dir: str | pathlib.Path,
        folder: str | pathlib.Path,
        open_stream: OpenStream,
        publish: Publish,
        pace: Pace,
        learning_rate: float | None = None,
    ) -> None:
        self.dir = pathlib.Path(folder)
        self.pace = pace
        self.model, step = hot_start(model_dir, learning_rate)
        model = self.model
        parts = [part for part in (model.bottom, model.tower) if part is not None]
        stays = [*model.embed.tables.values(), *(v for part in parts for v in part.variables)]
        stay = {id(variable) for variable in stays}
        self.state = _State(
            start=run_dir.fingerprint(model_dir),
            position=None,
            rows=0,
            published_rows=0,
            published=[],
            windows=[],
            totals={},
        )
        start = self.state.values["start"]
        known = run_dir.read_identities(model_dir)
        self._trained_on = {role: each.to_config() for role, each in known.items()}
        self.checkpoints = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                variables=[v for v in model.variables if id(v) not in stay],
                optimizer=model.optimizer,
                meta_optimizer=model.meta_optimizer,
                state=self.state,
            ),
            str(self.dir / "checkpoints"),
            max_to_keep=2,
        )
        rate = float(model.optimizer.learning_rate)
        if restore.newest(self.checkpoints):
            if self.state.values["start"] != start:
                raise ValueError(
                    f"{self.dir} holds updates of other weights than those of {model_dir}. Give "
                    "another --online_dir to start from these."
                )
            model.optimizer.learning_rate = rate
            print(f"Going on after {self.rows:,} rows.")
        elif step:
            print(f"Starting from {model_dir}, with the optimiser's state of step {step:,}.")
        self.stream = open_stream(self.state.values["position"])
        self._publish = publish
        self._window: list[tuple[np.ndarray, ...]] = []  # labels, probabilities, tasks
        self._busy = 0.0  # seconds, since the last checkpoint
        self._published_at = time.monotonic()
        self._newest: Rows = {}
        data = run_dir.read_recipe(model_dir).data
        self._replayed = data.test or data.valid or data.train
        self._step = tf.function(
            self._scored_step, input_signature=[*readers.signature(model.schema)]
        )

    @property
    def rows(self) -> int:
        """Rows that the student was updated on."""
        return int(self.state.values["rows"])

    def _scored_step(self, features: Any, targets: Any) -> tf.Tensor:
        """The student's probabilities before a step on the same rows, [B, K]."""
        model = self.model
        logits = model.one_head(features, model.serving_head)[0].logits
        model.train_step((features, targets))
        return predictions(model.schema, tf.cast(logits, tf.float32))

    def _train(self, block: readers.Block) -> None:
        start = time.perf_counter()
        features, targets = readers.batch(self.model.schema, block)
        scores = self._step(features, targets).numpy()
        if int(self.model.first_bad_step) >= 0:
            raise NotFiniteError(
                f"The loss was not finite on the rows that end at {self.stream.place} of "
                f"{self.stream.name}. The checkpoint before them stays. A lower --learning_rate "
                "is the usual remedy."
            )
        tasks = targets.get("task_id", np.zeros(0, np.int64))
        self._window.append((targets["labels"], scores, tasks))
        self._newest = {name: values[:_REPLAYED_ROWS] for name, values in features.items()}
        self.state.values["rows"] += readers.num_rows(block)
        self._busy += time.perf_counter() - start

    def checkpoint(self) -> None:
        """Writes down weights, optimiser, position and metrics as one."""
        values = self.state.values
        if self._window:
            labels, scores, tasks = map(np.concatenate, zip(*self._window, strict=True))
            window: dict[str, Any] = {
                "to_row": self.rows,
                "rows_per_second": len(labels) / self._busy,
            }
            for k, name in enumerate(self.model.schema.labels):
                groups, kind = tasks if len(tasks) else None, self.model.schema.kind(name)
                found = measure(labels[:, k], scores[:, k], groups, kind)
                window[name] = found
                _add(values["totals"].setdefault(name, {"rows": 0}), found)
            values["windows"] = [*values["windows"], window][-_KEPT_ENTRIES:]
            self._window, self._busy = [], 0.0
        values["position"] = self.stream.position
        self.checkpoints.save()
        self.stream.keep()
        self._report()

    def publish(self) -> None:
        """Checkpoints, and publishes a graph of the same weights."""
        self.checkpoint()
        start = time.perf_counter()
        if not self._newest:  # killed before the graph of these rows was published
            self._newest = first_rows(self.model.schema, self._replayed, _REPLAYED_ROWS)
        folder, worst = self._publish(self.model, self._newest, self.origin())
        gc.collect()  # an export's graphs refer to themselves, and would pile up
        seconds = time.perf_counter() - start
        entry = {"version": int(folder.name), "rows": self.rows, "seconds": seconds}
        values = self.state.values
        values["published"] = [*values["published"], entry][-_KEPT_ENTRIES:]
        values["published_rows"] = self.rows
        self._published_at = time.monotonic()
        self._report()
        tqdm.write(
            f"{folder}: {self.rows:,} rows; largest difference to the Keras model {worst:.1e}; "
            f"{seconds:.1f} s"
        )

    def origin(self) -> Origin:
        """What the weights of the last checkpoint come from; see `pipelines.origin`."""
        return {
            "weights": self.state.values["start"],
            "data": self._trained_on,
            "online": {
                "stream": self.stream.name,
                "position": self.state.values["position"],
                "rows": self.rows,
                "checkpoint": run_dir.checkpoint_fingerprint(self.checkpoints.latest_checkpoint),
            },
        }

    def _is_due(self) -> bool:
        rows = self.rows - self.state.values["published_rows"]
        by_rows = 0 < self.pace.publish_rows <= rows
        minutes = (time.monotonic() - self._published_at) / 60
        return bool(rows) and (by_rows or 0 < self.pace.publish_minutes <= minutes)

    def _report(self) -> None:
        """Writes `report.json`."""
        run_dir.write_json(
            self.dir / "report.json",
            {
                "stream": self.stream.name,
                "trained_on": self._trained_on,
                "step": int(self.model.optimizer.iterations),
            }
            | {k: v for k, v in self.state.values.items() if k != "published_rows"},
        )

    def _line(self) -> str:
        """What the progress bar says beside rows and rows/s."""
        values = self.state.values
        behind = self.stream.behind()
        parts = ["" if behind is None else f"{behind:,} behind"]
        if values["published"]:
            parts.append(f"version {values['published'][-1]['version']}")
        for name in self.model.schema.labels if values["windows"] else ():
            window = values["windows"][-1][name]
            shown = [(key, window[key]) for key in ("log_loss", "auc", "mae") if key in window]
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4f}" for key, value in shown)
            parts.append(f"{name}: {numbers}")
        return "; ".join(part for part in parts if part)

    def run(self, is_stopped: Callable[[], bool], *, stop_at_end: bool = False) -> None:
        """Steps until told to stop, or until the stream has no more rows for a step.

        Raises:
          readers.DataError: rows that cannot be read. What was learned before is kept.
          NotFiniteError: a loss that is not finite.
          ExportError, embedding_shards.StoreError: a graph that cannot be published.
        """
        bar = tqdm(initial=self.rows, unit=" rows", unit_scale=True, mininterval=0.5)
        try:
            with bar:
                self._follow(bar, is_stopped, stop_at_end)
        except readers.DataError:
            self.checkpoint()
            raise
        if self.rows > self.state.values["published_rows"]:
            self.publish()
        else:
            self.checkpoint()
        if not self.rows:
            print(f"{self.stream.name}: no rows for a step came, so nothing was published.")

    def _follow(self, bar: tqdm, is_stopped: Callable[[], bool], stop_at_end: bool) -> None:
        shown = 0.0
        while not is_stopped():
            checked = self.rows // self.pace.checkpoint_rows
            block = self.stream.take(self.pace.batch_size)
            if block is not None:
                self._train(block)
                bar.update(readers.num_rows(block))
            elif stop_at_end:
                return
            else:
                time.sleep(_IDLE_SECONDS)
            if self._is_due():
                self.publish()
            elif self.rows // self.pace.checkpoint_rows > checked:
                self.checkpoint()
            if time.monotonic() - shown > 1:
                bar.set_postfix_str(self._line())
                shown = time.monotonic()


def _add(total: dict[str, Any], found: dict[str, float]) -> None:
    """Adds a window to means over rows; the AUC is a mean of windows, each by its own scores."""
    for name in ("log_loss", "auc", "mae"):
        if np.isfinite(found.get(name, np.nan)):
            rows = total.get(f"{name}_rows", 0)
            mean = total.get(name, 0.0)
            total[f"{name}_rows"] = rows + found["rows"]
            total[name] = mean + (found[name] - mean) * found["rows"] / total[f"{name}_rows"]
    total["rows"] += found["rows"]
