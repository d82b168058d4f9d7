"""Keeps a student up to date: steps on rows as they come, and a new graph every few minutes.

    python -m qianmo.pipelines.online --model_dir=DIR --model_base_path=served/ranker --folder=rows/

Starts from a trained dual DNN, and moves its student's MLP alone; teacher and tables stay as they
are. So what is published is a graph, which reads the embeddings that were published before it.
Killed at any moment and started again by the same command, it goes on from the last checkpoint
and takes the steps that it would have taken. SIGTERM ends it with a checkpoint and a last graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from absl import app, flags
from tqdm import tqdm

from qianmo.export import embedding_shards
from qianmo.export.saved_model import TOLERANCE, ExportError, Rows, export_in_graph
from qianmo.export.store import export_store
from qianmo.models.dual_dnn import DualDNN
from qianmo.pipelines import program, readers, run_dir, runtime
from qianmo.pipelines.evaluate import measure
from qianmo.pipelines.recipe import optimizer
from qianmo.pipelines.streams import FolderStream, Position, RedisStream, Stream
from qianmo.pipelines.train import NotFiniteError

_KEPT_ENTRIES = 1000  # of windows and versions, in the report
_REPLAYED_ROWS = 1000  # before a graph is published
_IDLE_SECONDS = 0.2  # between two looks at a stream that had no rows

OpenStream = Callable[[Position | None], Stream]
# Publishes the model, checked on rows; returns the version's folder and the largest difference.
Publish = Callable[[DualDNN, Rows], tuple[pathlib.Path, float]]


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
        config = {k: v for k, v in getattr(recipe.train, part).items() if k != "decay_steps"}
        made.append(optimizer(config, f"train.{part}"))
    model.compile(*made)
    # The state is kept by the variables' places among those that were trained.
    for used, variables in model.trained_by():
        used.build(variables)
    kept = {"optimizer": model.optimizer, "meta_optimizer": model.meta_optimizer}
    run_dir.restore(tf.train.Checkpoint(**kept), model_dir).expect_partial()
    own = recipe.train.optimizer["learning_rate"]
    model.optimizer.learning_rate = own if learning_rate is None else learning_rate
    model.freeze_teacher()
    model.kd_warmup_steps = 0
    model.embed.l2 = 0.0  # of vectors that do not move
    return model, int(model.optimizer.iterations)


def _fingerprint(model_dir: str | pathlib.Path) -> str:
    """Tells trained weights apart; the index holds a checksum of each tensor."""
    newest = tf.train.latest_checkpoint(str(pathlib.Path(model_dir) / run_dir.WEIGHTS))
    return hashlib.sha256(pathlib.Path(f"{newest}.index").read_bytes()).hexdigest()


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
            start=_fingerprint(model_dir),
            position=None,
            rows=0,
            published_rows=0,
            published=[],
            windows=[],
            totals={},
        )
        start = self.state.values["start"]
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
        if self.checkpoints.restore_or_initialize():
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
        return tf.sigmoid(tf.cast(logits, tf.float32))

    def _train(self, block: readers.Block) -> None:
        start = time.perf_counter()
        features, targets = readers.batch(self.model.schema, block)
        scores = self._step(features, targets).numpy()
        if int(self.model.first_bad_step) >= 0:
            raise NotFiniteError(
                f"The loss was not finite on the rows that end at {self.stream.position} of "
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
                found = measure(labels[:, k], scores[:, k], tasks if len(tasks) else None)
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
        folder, worst = self._publish(self.model, self._newest)
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

    def _is_due(self) -> bool:
        rows = self.rows - self.state.values["published_rows"]
        by_rows = 0 < self.pace.publish_rows <= rows
        minutes = (time.monotonic() - self._published_at) / 60
        return bool(rows and self._newest) and (by_rows or 0 < self.pace.publish_minutes <= minutes)

    def _report(self) -> None:
        """Writes `report.json`."""
        run_dir.write_json(
            self.dir / "report.json",
            {"stream": self.stream.name, "step": int(self.model.optimizer.iterations)}
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
            parts.append(f"{name}: log loss {window['log_loss']:.4f}, AUC {window['auc']:.4f}")
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
        if self.rows > self.state.values["published_rows"] and self._newest:
            self.publish()
        else:
            self.checkpoint()

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
    for name in ("log_loss", "auc"):
        if np.isfinite(found[name]):
            rows = total.get(f"{name}_rows", 0)
            mean = total.get(name, 0.0)
            total[f"{name}_rows"] = rows + found["rows"]
            total[name] = mean + (found[name] - mean) * found["rows"] / total[f"{name}_rows"]
    total["rows"] += found["rows"]


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process.

    Raises:
      ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process updates this student.") from None
        yield


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("model_dir", None, "Directory of a trained dual DNN.", required=True)
    flags.DEFINE_string(
        "model_base_path",
        None,
        "Where the graphs' versions go; its last part names the model.",
        required=True,
    )
    flags.DEFINE_string(
        "online_dir", None, "For checkpoints and report.json. Default: <model_dir>/online."
    )
    flags.DEFINE_string(
        "folder", None, "A folder to which files of rows are moved, read by rising names."
    )
    flags.DEFINE_string("redis", None, "Instead: a Redis server, such as redis://127.0.0.1:6379/0")
    flags.DEFINE_string("redis_stream", "rows", "Key of the stream there.")
    flags.DEFINE_string("redis_group", "qianmo", "Consumer group, made where it is not there.")
    flags.DEFINE_string(
        "start_after",
        "",
        "The first time: a file's name, or an entry's id. What comes up to it is passed over. "
        "Default: starts with the first.",
    )
    flags.DEFINE_bool(
        "stop_at_end", False, "End when the rows that are there do not make another step."
    )
    flags.DEFINE_enum(
        "form",
        "store",
        ["in_graph", "store"],
        "What is published. store: a graph that reads the embeddings published before, see "
        "--embedding_version. in_graph: the whole model, tables and all.",
    )
    flags.DEFINE_string(
        "embedding_store",
        None,
        "Form `store`: folder of the embedding versions. Default: <model_base_path>_embeddings.",
    )
    flags.DEFINE_integer(
        "embedding_version",
        None,
        "Form `store`: the version there that holds the model's embeddings. Default: the "
        "published one.",
        lower_bound=1,
    )
    flags.DEFINE_string(
        "embedding_redis",
        "",
        "Form `store`: URL of the Redis from which graphs read that version, as in `qianmo-export "
        "--redis`.",
    )
    flags.DEFINE_float(
        "tolerance",
        TOLERANCE,
        "Form `store`: how far scores may be from the Keras model's. Only dtypes other than "
        "float32 need more than the default.",
        lower_bound=0.0,
    )
    flags.DEFINE_integer(
        "batch_size", None, "Rows of a step. Default: the recipe's.", lower_bound=1
    )
    flags.DEFINE_float("learning_rate", None, "Default: the recipe's.", lower_bound=0.0)
    flags.DEFINE_integer(
        "checkpoint_rows", Pace.checkpoint_rows, "Rows between checkpoints.", lower_bound=1
    )
    flags.DEFINE_integer(
        "publish_rows", 0, "Rows between graphs; 0: the clock alone decides.", lower_bound=0
    )
    flags.DEFINE_float(
        "publish_minutes",
        Pace.publish_minutes,
        "Minutes between graphs; 0: the rows alone decide.",
        lower_bound=0.0,
    )


def _publisher(values: flags.FlagValues) -> Publish:
    """How graphs are published, by the flags.

    Raises:
      ValueError: no embeddings were published.
    """
    base = values.model_base_path
    if values.form == "in_graph":
        return lambda model, rows: export_in_graph(model, base, rows)
    store = values.embedding_store or f"{base.rstrip('/')}_embeddings"
    version = values.embedding_version or embedding_shards.published(store)
    if version is None:
        raise ValueError(
            f"{store}: no embeddings are published there. Export the model first: qianmo-export "
            f"--form=store --model_dir={values.model_dir} --model_base_path={base}"
        )
    embedding_shards.space(pathlib.Path(store) / str(version))  # it is there
    return lambda model, rows: export_store(
        model,
        base,
        rows,
        store=store,
        embedding_version=version,
        redis=values.embedding_redis,
        tolerance=values.tolerance,
    )


def run(_: list[str]) -> None:
    """Updates what the flags name."""
    values = flags.FLAGS
    if bool(values.folder) == bool(values.redis):
        raise app.UsageError("give either --folder or --redis.")
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(1))
    folder = pathlib.Path(values.online_dir or pathlib.Path(values.model_dir) / "online")
    try:
        recipe = run_dir.read_recipe(values.model_dir)
        pace = Pace(
            batch_size=values.batch_size or recipe.train.batch_size,
            checkpoint_rows=values.checkpoint_rows,
            publish_rows=values.publish_rows,
            publish_minutes=values.publish_minutes,
        )

        def open_stream(position: Position | None) -> Stream:
            after = values.start_after
            if values.folder:
                return FolderStream(recipe.schema, values.folder, position, start_after=after)
            key, group = values.redis_stream, values.redis_group
            return RedisStream(recipe.schema, values.redis, key, group, position, start_after=after)

        with _alone(folder):
            publish = _publisher(values)
            online = Online(
                values.model_dir, folder, open_stream, publish, pace, values.learning_rate
            )
            online.run(lambda: bool(stopped), stop_at_end=values.stop_at_end)
    except (ExportError, NotFiniteError, ValueError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Entry of `qianmo-online`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
