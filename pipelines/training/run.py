"""A training run: from a recipe to weights and reports, resumable at any moment."""

from __future__ import annotations

import math
import pathlib
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import tensorflow as tf
import tf_keras

from qianmo.export import paths
from qianmo.models import zoo
from qianmo.models.ranker import Ranker, Weight
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines import locks, run_dir
from qianmo.pipelines.data import catalogue, chunks, identity, look, readers, summaries
from qianmo.pipelines.evaluation import adapted, report
from qianmo.pipelines.evaluation.scores import LOWER_IS_BETTER, mean_loss, measured, table
from qianmo.pipelines.recipe import Recipe, optimizer
from qianmo.pipelines.training import inputs, migrate, restore, runtime
from qianmo.pipelines.training.preparing import check_learnable, looked
from qianmo.pipelines.training.watch import Curve, NotFiniteError, Watch

ASKED = "asked.json"  # the recipe as given, before anything was counted
CHECKPOINTS = "checkpoints"
HISTORY = "history.json"
CURVE = "curve.json"
REPORT = "report.json"
MAX_STILL = 0.1  # share of a run whose learning rate may be 0 without a word
_QUICK_ROWS = 4096  # of the validation rows, measured within an epoch


class Position(tf.Module):
    """Where a run stands: finished epochs, and batches done in the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.batch = tf.Variable(0, dtype=tf.int64, trainable=False)


class Run:
    """One training run in a model directory.

    Args:
      recipe: what to train; vocabularies are counted from its training rows where not given.
      model_dir: where everything goes. A run of the same recipe on the same data is continued.

    Raises:
      ValueError: the directory holds a run of another recipe, or on other data, or TensorFlow could
        not read it.
      OSError: the directory cannot be written to.
      readers.DataError: bad rows, or rows of which nothing can be learned.
    """

    def __init__(self, recipe: Recipe, model_dir: str | pathlib.Path) -> None:
        runtime.settle()
        self.dir = pathlib.Path(model_dir)
        paths.check_model_path(self.dir)
        paths.check_folder(self.dir)
        train = recipe.train
        for key in ("optimizer", "table_optimizer", "meta_optimizer"):
            config = getattr(train, key)
            optimizer(config, f"train.{key}")  # refused before any work
            if 0 < config.get("decay", 0) < 1 - MAX_STILL:
                print(
                    f"note: train.{key}.decay = {config['decay']}: the rate is 0 in the last "
                    f"{1 - config['decay']:.0%} of the run, which then learns nothing."
                )
        zoo.check(recipe.model)
        known = self._known(recipe)
        with inputs.opened(recipe) as self.inputs:  # whose files are hashed while rows are read
            if known is None:
                self.recipe, self.looks = looked(recipe)
            else:
                self.recipe, self.looks = known, run_dir.read_looks(self.dir)
            self.identities = self.inputs.identities()
        if known is not None:
            self._check_same_data()
        self.model: Ranker = run_dir.build(self.recipe)
        if known is None:
            check_learnable(self.recipe, self.model, self.looks)
        if recipe.data.catalogue:
            item = cast(TwoTower, self.model).item
            rows = [path for path in (recipe.data.valid, recipe.data.test) if path]
            catalogue.check(self.recipe.schema, item, recipe.data.catalogue, rows)
        self.monitor_head = train.monitor_head or self.model.serving_head
        if self.monitor_head not in self.model.head_names:
            raise ValueError(
                f"`train.monitor_head` should be one of {self.model.head_names}. "
                f"Received: {train.monitor_head!r}"
            )
        self._read_batches()
        begun = tf.train.get_checkpoint_state(str(self.dir / CHECKPOINTS)) is not None
        slowed = self._start(fresh=not begun)
        steps = self.batches * train.epochs
        warmup = getattr(self.model, "kd_warmup_steps", 0)
        if warmup > steps:
            print(
                f"note: model.kd_warmup_steps = {warmup:,}, and the run has {steps:,} steps: "
                "distillation never reaches its weight."
            )
        self.model.compile(
            optimizer(train.optimizer, "train.optimizer", steps),
            optimizer(train.table_optimizer, "train.table_optimizer", steps),
            optimizer(train.meta_optimizer, "train.meta_optimizer", steps),
            slowed,
            steps_per_execution=train.steps_per_call,
        )
        for used, variables in self.model.trained_by():
            used.build(variables)
        self.position = Position()
        self.checkpoints = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=self.model,
                optimizer=self.model.optimizer,
                table_optimizer=self.model.table_optimizer,
                meta_optimizer=self.model.meta_optimizer,
                position=self.position,
            ),
            str(self.dir / CHECKPOINTS),
            max_to_keep=2,
        )
        self.best = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=self.model), str(self.dir / run_dir.WEIGHTS), max_to_keep=1
        )
        self.history: list[dict[str, Any]] = []
        self.curve = Curve(run_dir.read_json(self.dir / CURVE, []), steps)
        if restore.newest(self.checkpoints):
            self.history = run_dir.read_json(self.dir / HISTORY, [])
            # An epoch may have been written down just before the kill, and its checkpoint not.
            self.history = self.history[: int(self.position.epoch)]
            epoch, batch = int(self.position.epoch), int(self.position.batch)
            print(f"Going on after {epoch} epochs and {batch} batches.")
        self.curve.cut(int(self.position.epoch) * self.batches + int(self.position.batch))
        if known is None:  # all that can be refused has been looked at
            run_dir.write_json(self.dir / ASKED, recipe.to_config())
            run_dir.write_looks(self.dir, self.looks)
            run_dir.write_identities(self.dir, self.identities)
            run_dir.write_recipe(self.dir, self.recipe)

    def _known(self, recipe: Recipe) -> Recipe | None:
        """The completed recipe of the run that the directory holds, if any."""
        if not (self.dir / run_dir.RECIPE).exists():
            return None
        known = run_dir.read_recipe(self.dir)
        before = run_dir.read_json(self.dir / ASKED, {})
        now = run_dir.plain(recipe.to_config())
        differs = sorted(
            f"{section}.{key}"
            for section in now.keys() - {"plugins"}
            for key in now[section].keys() | before.get(section, {}).keys()
            if now[section].get(key) != before.get(section, {}).get(key)
        )
        if now["plugins"] != before.get("plugins", []):
            differs.append("plugins")
        if differs:
            raise ValueError(
                f"{self.dir} holds a run of another recipe; they differ in {', '.join(differs)}. "
                "Give another --model_dir, or the same recipe."
            )
        return known

    def _check_same_data(self) -> None:
        """Refuses to go on with other data than the run began with.

        Raises:
          ValueError: a data set is another one.
        """
        differs = identity.differences(run_dir.read_identities(self.dir), self.identities)
        if not differs:
            return
        is_over = (self.dir / REPORT).exists()
        raise ValueError(
            f"{self.dir} {'is finished; the data changed since' if is_over else 'saw other data'}: "
            + "; ".join(differs)
            + ". Nothing was trained. To learn the new rows from these weights, give another "
            f"--model_dir and --config.train.start_from={self.dir}; to train afresh, another "
            "--model_dir alone."
        )

    def _start(self, *, fresh: bool) -> list[tuple[Weight, float]]:
        """Takes weights from trained models as the recipe says; returns those that are slowed."""
        train = self.recipe.train
        if train.start_from:
            if fresh:
                other, _ = run_dir.load(train.start_from)
                tf_keras.mixed_precision.set_global_policy(train.dtype_policy)
                found = restore.match(self.model, other, train.start_from, train.start_except)
                restore.take(found)
                print("\n".join(found.lines()))
        elif self.model.starts_trained:
            raise ValueError("`model.teacher_frozen` needs `train.start_from`, a trained teacher.")
        return migrate.start(self.recipe, self.model)

    def _read_batches(self) -> None:
        """Finds how many batches an epoch has, and reads the rows of chunks."""
        train, data = self.recipe.train, self.recipe.data
        self.rows = self.identities["train"].rows
        self.batch_rows: float = train.batch_size  # on average, where chunks differ
        self.batches = math.ceil(self.rows / train.batch_size)  # an epoch
        self.chunks: chunks.ChunkReader | None = None
        if data.chunk_rows:
            self.chunks = chunks.ChunkReader(
                self.recipe.schema, data.train, rows=data.chunk_rows, tasks=data.chunk_tasks
            )
            chunked_rows = self.rows / self.chunks.num_batches()
            if data.chunks_beside:
                self.batch_rows += chunked_rows
            else:
                self.batch_rows, self.batches = chunked_rows, self.chunks.num_batches()

    def _dataset(self, epoch: int, skip: int) -> tf.data.Dataset:
        data, train = self.recipe.data, self.recipe.train
        if self.chunks is not None:
            return self.chunks.dataset(
                seed=train.seed,
                epoch=epoch,
                skip_batches=skip,
                shuffled_rows=train.batch_size if data.chunks_beside else 0,
            )
        return readers.dataset(
            self.recipe.schema,
            data.train,
            batch_size=train.batch_size,
            seed=train.seed,
            epoch=epoch,
            shuffle_rows=data.shuffle_rows,
            skip_batches=skip,
        )

    def _stop_at(self, step: int) -> None:
        """Raises, after a print of the columns of that step's batch.

        Raises:
          NotFiniteError: always.
        """
        epoch, batch = divmod(step, self.batches)
        features, targets = next(iter(self._dataset(epoch, batch)))
        print(f"The batch of step {step}:")
        for name, column in {**features, **targets}.items():
            values = column.numpy()
            if values.dtype.kind in "OSU":
                print(f"  {name}: {len(np.unique(values.astype(str)))} different strings")
            else:
                bad = int((~np.isfinite(values.astype(np.float64))).sum())
                print(f"  {name}: min {values.min()}, max {values.max()}, not finite {bad}")
        raise NotFiniteError(
            f"the loss was not finite at step {step} (epoch {epoch + 1}, batch {batch}), whose "
            "batch is shown above. A lower learning rate is the usual remedy."
        )

    def _best(self) -> int:
        """Index of the epoch with the best monitored value; the newest where none has one."""
        values = [entry["monitor"] for entry in self.history]
        known = [i for i, value in enumerate(values) if value is not None]
        sign = -1 if self.recipe.train.monitor in LOWER_IS_BETTER else 1
        return max(known, key=lambda i: sign * values[i], default=len(values) - 1)

    def _save(self, batch: int) -> None:
        """Writes a checkpoint after a batch of the epoch."""
        self.position.batch.assign(batch)
        self.checkpoints.save()
        run_dir.write_json(self.dir / CURVE, self.curve.points)

    def _epoch(self, epoch: int) -> None:
        train, data = self.recipe.train, self.recipe.data
        self.inputs.check_unchanged()
        first = int(self.position.batch)
        watch = Watch(
            f"epoch {epoch + 1}/{train.epochs}",
            steps=self.batches,
            first=first,
            before=epoch * self.batches,
            rows=self.batch_rows,
            checkpoint_every=train.checkpoint_every,
            save=self._save,
            curve=self.curve,
            quick=self._quick(),
        )
        start = time.perf_counter()
        fitted = self.model.fit(
            self._dataset(epoch, first),
            steps_per_epoch=self.batches - first,
            verbose=0,
            callbacks=[watch],
        )
        if int(self.model.first_bad_step) >= 0:
            self._stop_at(int(self.model.first_bad_step))
        entry: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * self.batches,
            "seconds": time.perf_counter() - start,
            "samples_per_second": watch.samples_per_second(),
            "train": {name: float(values[-1]) for name, values in fitted.history.items()},
            "monitor": None,
        }
        if data.valid:
            entry |= self._validated()
        self.history.append(entry)
        self._tensorboard(entry)
        if self._best() == len(self.history) - 1:
            self.best.save()
        run_dir.write_json(self.dir / HISTORY, self.history)
        self.position.epoch.assign(epoch + 1)
        self._save(0)
        print(report.epoch_line(entry))

    def _quick(self) -> Callable[[], Mapping[str, float]] | None:
        """Log loss of some validation rows, for the curve; None where there are no such rows."""
        data, schema = self.recipe.data, self.recipe.schema
        if not data.valid or data.catalogue:
            return None
        features, targets = next(iter(readers.dataset(schema, data.valid, batch_size=_QUICK_ROWS)))
        predict = self.model.probabilities.get_concrete_function(readers.signature(schema)[0])

        def measure() -> dict[str, float]:
            found = predict(features)[self.model.serving_head]
            return {"valid": mean_loss(schema, targets["labels"].numpy(), found.numpy())}

        return measure

    def _validated(self) -> dict[str, Any]:
        """Metrics of the validation rows, and the monitored one: the mean over labels with one."""
        train, data = self.recipe.train, self.recipe.data
        found = measured(self.model, data, data.valid).report
        if data.valid_support and not data.catalogue:
            own = adapted.with_all_support(self.model, data.valid, data.valid_support)
            found = {**found, "adapted": own}
        valid = {
            head: {label: parts["all"] for label, parts in labels.items()}
            for head, labels in found.items()
        }
        head = self.monitor_head
        if "adapted" in valid and head == self.model.serving_head:
            head = "adapted"  # what is served
        values = {label: m.get(train.monitor, math.nan) for label, m in valid[head].items()}
        defined = [value for value in values.values() if math.isfinite(value)]
        undefined = [label for label, value in values.items() if not math.isfinite(value)]
        if undefined and not self.history:
            print(
                f"note: {train.monitor} of {undefined} is not defined on the validation rows; the "
                "others decide."
            )
        return {"valid": valid, "monitor": float(np.mean(defined)) if defined else None}

    def _choose_serving(self) -> None:
        """Chooses how the tower adapts in serving, where the recipe leaves it to the rows."""
        data, meta = self.recipe.data, self.model.meta
        if meta is None or not data.valid_support or data.catalogue:
            return
        if self.recipe.model["meta"].keys() & {"serving_steps", "min_support"}:
            return  # the recipe says how
        monitor = self.recipe.train.monitor
        chosen = adapted.choose(self.model, data.valid, data.valid_support, monitor)
        run_dir.write_json(self.dir / run_dir.SERVING, chosen._asdict())
        tried = ", ".join(f"{steps}: {value:.4f}" for steps, value in chosen.tried.items())
        print(
            f"In serving {chosen.inner_steps} steps, from {chosen.min_support} support rows on "
            f"({monitor} on data.valid by steps: {tried})."
        )

    def _tensorboard(self, entry: Mapping[str, Any]) -> None:
        writer = tf.summary.create_file_writer(str(self.dir / "tensorboard"))
        with writer.as_default(step=entry["step"]):
            for name, value in entry["train"].items():
                tf.summary.scalar(f"train/{name}", value)
            for head, labels in entry.get("valid", {}).items():
                for label, found in labels.items():
                    for name, value in found.items():
                        tf.summary.scalar(f"valid/{label}/{head}/{name}", value)
        writer.close()

    def _is_over(self) -> bool:
        done = len(self.history)
        patient = done - 1 - self._best() < self.recipe.train.patience if done else True
        return done >= self.recipe.train.epochs or not patient

    def train(self) -> dict[str, Any]:
        """Trains to the end, evaluates, writes the reports; returns what report.json holds."""
        if self._is_over() and (self.dir / REPORT).exists():
            print(f"Finished before. Report: {self.dir / 'report.html'}")
            return dict(run_dir.read_json(self.dir / REPORT, {}))
        with readers.own_errors():
            while not self._is_over():
                self._epoch(len(self.history))
        self.inputs.check_unchanged()
        run_dir.restore(self.model, self.dir)
        data = self.recipe.data
        self._choose_serving()
        found: dict[str, Any] = {
            "recipe": run_dir.read_json(self.dir / ASKED, {}),
            "data": {role: each.to_config() for role, each in self.identities.items()},
            "look": {role: each.to_config() for role, each in self.looks.items()},
            "rows": {role: each.rows for role, each in self.identities.items()},
            "test_labels": list(self.recipe.schema.labels),
            "history": self.history,
            "curve": self.curve.points,
            "parameters": report.parameters(self.model),
            "latency_ms": report.latency(self.model),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        scored = None
        if data.test:
            watched = look.Look(self.recipe.schema)
            found["test"], text, scored = measured(
                self.model, data, data.test, progress=True, watched=watched
            )
            if watched.rows:
                summary = watched.summary(self.recipe.schema, self.looks["train"])
                found["look"]["test"] = summary.to_config()
                found["drift"] = summaries.drift(self.looks["train"], summary)
                print(f"data.test: {data.test}: {summaries.table(summary, found['drift'])}")
            print(text)
        if data.test_support and not data.catalogue:
            found["adapted"] = adapted.measure(self.model, data.test, data.test_support)
            print(table(found["adapted"]["test"]))
        self.inputs.check_unchanged()
        report.write_html(self.dir / "report.html", found, scored)
        run_dir.write_json(self.dir / REPORT, found)  # last: it says that the run is over
        print(f"Report: {self.dir / 'report.html'}")
        return found


def train(recipe: Recipe, model_dir: str | pathlib.Path) -> dict[str, Any]:
    """Trains a recipe in a model directory; see `Run`.

    Raises:
      ValueError: another process trains there; see also `Run`.
    """
    with locks.alone(model_dir, "trains"):
        return Run(recipe, model_dir).train()
