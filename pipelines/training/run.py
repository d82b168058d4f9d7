"""A training run: from a recipe to weights and reports, resumable at any moment."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras
from tqdm import tqdm

from qianmo.export import paths
from qianmo.models import zoo
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import chunks, readers, statistics
from qianmo.pipelines.evaluation import adapted, report, retrieval
from qianmo.pipelines.evaluation.scores import measured, table
from qianmo.pipelines.recipe import Recipe, optimizer
from qianmo.pipelines.training import migrate, runtime

ASKED = "asked.json"  # the recipe as given, before anything was counted


class NotFiniteError(ArithmeticError):
    """The loss was NaN or infinite."""


class _Position(tf.Module):
    """Where a run stands: finished epochs, and batches done in the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.batch = tf.Variable(0, dtype=tf.int64, trainable=False)


class _Watch(tf_keras.callbacks.Callback):
    """Within an epoch: progress bar, checkpoints, and a halt when the loss is not finite."""

    def __init__(self, run: Run, first_batch: int, total: int) -> None:
        super().__init__()
        self.run = run
        self.first_batch = first_batch
        self.total = total
        self.steady: tuple[float, int] | None = None  # time and batch after the first call

    def on_train_begin(self, logs: Any = None) -> None:
        size = self.run.batch_rows
        self.bar = tqdm(
            desc=f"epoch {int(self.run.position.epoch) + 1}/{self.run.recipe.train.epochs}",
            total=self.total * size,
            initial=self.first_batch * size,
            unit=" samples",
            unit_scale=True,
            mininterval=0.5,
        )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        run = self.run
        done = self.first_batch + batch + 1
        bad = int(run.model.first_bad_step)
        if bad >= 0:
            run.stop_at(bad)
        self.bar.set_postfix_str(f"loss {(logs or {}).get('loss', float('nan')):.4f}")
        self.bar.update(done * run.batch_rows - self.bar.n)
        if self.steady is None:
            self.steady = (time.perf_counter(), done)
        every = run.recipe.train.checkpoint_every
        if done // every > int(run.position.batch) // every and done < self.total:
            run.position.batch.assign(done)
            run.checkpoints.save()

    def on_train_end(self, logs: Any = None) -> None:
        self.bar.close()

    def samples_per_second(self) -> float:
        """Throughput without the first call, which traces the graph."""
        if self.steady is None or self.steady[1] >= self.total:
            return float("nan")
        seconds = time.perf_counter() - self.steady[0]
        return (self.total - self.steady[1]) * self.run.batch_rows / seconds


def completed(recipe: Recipe) -> Recipe:
    """The recipe with what is counted: by the model it starts from, or the training rows."""
    schema, migrated = recipe.schema, recipe.migrate
    if recipe.train.start_from:
        start = run_dir.read_recipe(recipe.train.start_from).schema
        schema = statistics.inherit(schema, start)
        differs = [n for n, t in schema.tables.items() if start.tables.get(n) != t]
        if differs:
            raise ValueError(
                f"tables {differs} are not those of {recipe.train.start_from}: their weights "
                "would land on other rows. Declare the same features, or start afresh."
            )
    else:
        schema = statistics.without_empty_domains(schema, recipe.data.train)
    schema = migrate.with_moments(schema, migrated)
    counted = statistics.complete(schema, recipe.data.train)
    return dataclasses.replace(recipe, schema=migrate.with_values(schema, counted, migrated))


class Run:
    """One training run in a model directory.

    Args:
      recipe: what to train; vocabularies are counted from its training rows where not given.
      model_dir: where everything goes. A run of the same recipe there is continued.

    Raises:
      ValueError: the directory holds a run of another recipe, or TensorFlow could not read it.
      OSError: the directory cannot be written to.
      readers.DataError: bad rows.
    """

    def __init__(self, recipe: Recipe, model_dir: str | pathlib.Path) -> None:
        runtime.settle()
        self.dir = pathlib.Path(model_dir)
        paths.check_model_path(self.dir)
        paths.check_folder(self.dir)
        train = recipe.train
        optimizers = (
            optimizer(train.optimizer, "train.optimizer"),
            optimizer(train.table_optimizer, "train.table_optimizer"),
            optimizer(train.meta_optimizer, "train.meta_optimizer"),
        )
        zoo.check(recipe.model)
        for path in (recipe.data.valid, recipe.data.test, recipe.data.test_support):
            if path:
                readers.count_rows(recipe.schema, path)
        if recipe.data.items:
            items = retrieval.item_schema(recipe.schema)
            readers.blocks(items, recipe.data.items, targets=False)  # which looks at the columns
        self.recipe = self._known(recipe) or completed(recipe)
        self.model: Ranker = run_dir.build(self.recipe)
        if train.start_from:
            # The layers alone: a checkpoint of the model would hand on its optimisers' state too.
            layers = {
                name: part
                for name, part in vars(self.model).items()
                if isinstance(part, tf_keras.layers.Layer)
            }
            status = run_dir.restore(tf.train.Checkpoint(**layers), train.start_from)
            status.assert_nontrivial_match().expect_partial()
        elif self.model.starts_trained:
            raise ValueError("`model.teacher_frozen` needs `train.start_from`, a trained teacher.")
        slowed = migrate.start(self.recipe, self.model)
        self.model.compile(*optimizers, slowed, steps_per_execution=train.steps_per_call)
        for used, variables in self.model.trained_by():
            used.build(variables)
        self.position = _Position()
        self.checkpoints = tf.train.CheckpointManager(
            tf.train.Checkpoint(
                model=self.model,
                optimizer=self.model.optimizer,
                table_optimizer=self.model.table_optimizer,
                meta_optimizer=self.model.meta_optimizer,
                position=self.position,
            ),
            str(self.dir / "checkpoints"),
            max_to_keep=2,
        )
        self.best = tf.train.CheckpointManager(
            tf.train.Checkpoint(model=self.model), str(self.dir / run_dir.WEIGHTS), max_to_keep=1
        )
        self.history: list[dict[str, Any]] = []
        if self.checkpoints.restore_or_initialize():
            self.history = run_dir.read_json(self.dir / "history.json", [])
            # An epoch may have been written down just before the kill, and its checkpoint not.
            self.history = self.history[: int(self.position.epoch)]
            epoch, batch = int(self.position.epoch), int(self.position.batch)
            print(f"Going on after {epoch} epochs and {batch} batches.")
        self.rows = readers.count_rows(self.recipe.schema, self.recipe.data.train)
        self.batch_rows: float = train.batch_size  # on average, where chunks differ
        self.batches = math.ceil(self.rows / train.batch_size)  # an epoch
        data = self.recipe.data
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
        if not (self.dir / run_dir.RECIPE).exists():  # all that can be refused has been looked at
            run_dir.write_json(self.dir / ASKED, recipe.to_config())
            run_dir.write_json(self.dir / run_dir.RECIPE, self.recipe.to_config())

    def _known(self, recipe: Recipe) -> Recipe | None:
        """The completed recipe of the run that the directory holds, if any."""
        if not (self.dir / run_dir.RECIPE).exists():
            return None
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
        return run_dir.read_recipe(self.dir)

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

    def stop_at(self, step: int) -> None:
        """Raises, with the columns of the batch of that step.

        Raises:
          NotFiniteError: always.
        """
        epoch, batch = divmod(step, self.batches)
        features, targets = next(iter(self._dataset(epoch, batch)))
        lines = []
        for name, column in {**features, **targets}.items():
            values = column.numpy()
            if values.dtype.kind in "OSU":
                lines.append(f"  {name}: {len(np.unique(values.astype(str)))} different strings")
            else:
                lines.append(
                    f"  {name}: min {values.min()}, max {values.max()}, "
                    f"not finite {int((~np.isfinite(values.astype(np.float64))).sum())}"
                )
        raise NotFiniteError(
            f"The loss was not finite at step {step} (epoch {epoch + 1}, batch {batch}). "
            "A lower learning rate is the usual remedy. "
            "The batch's columns:\n" + "\n".join(lines)
        )

    def _best(self) -> int:
        """Index of the epoch with the best monitored value; the newest where none has one."""
        values = [entry["monitor"] for entry in self.history]
        known = [i for i, value in enumerate(values) if value is not None]
        sign = -1 if self.recipe.train.monitor == "log_loss" else 1
        return max(known, key=lambda i: sign * values[i], default=len(values) - 1)

    def _epoch(self, epoch: int) -> None:
        train, data = self.recipe.train, self.recipe.data
        total = self.batches
        first = int(self.position.batch)
        watch = _Watch(self, first, total)
        start = time.perf_counter()
        fitted = self.model.fit(
            self._dataset(epoch, first),
            steps_per_epoch=total - first,
            verbose=0,
            callbacks=[watch],
        )
        entry: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": (epoch + 1) * total,
            "seconds": time.perf_counter() - start,
            "samples_per_second": watch.samples_per_second(),
            "train": {name: float(values[-1]) for name, values in fitted.history.items()},
            "monitor": None,
        }
        if data.valid:
            entry["valid"] = {
                head: {label: parts["all"] for label, parts in labels.items()}
                for head, labels in measured(self.model, data, data.valid).report.items()
            }
            found = entry["valid"][self.model.serving_head]
            mean = float(np.mean([m[train.monitor] for m in found.values()]))
            entry["monitor"] = mean if math.isfinite(mean) else None  # one class has no AUC
        self.history.append(entry)
        self._tensorboard(entry)
        if self._best() == len(self.history) - 1:
            self.best.save()
        run_dir.write_json(self.dir / "history.json", self.history)
        self.position.epoch.assign(epoch + 1)
        self.position.batch.assign(0)
        self.checkpoints.save()
        print(report.epoch_line(entry))

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
        with readers.own_errors():
            while not self._is_over():
                self._epoch(len(self.history))
        self.best.restore_or_initialize()
        data = self.recipe.data
        found: dict[str, Any] = {
            "recipe": run_dir.read_json(self.dir / ASKED, {}),
            "data_sha256": {
                name: readers.sha256(path)
                for name, path in (
                    ("train", data.train),
                    ("valid", data.valid),
                    ("test", data.test),
                    ("test_support", data.test_support),
                    ("items", data.items),
                )
                if path
            },
            "rows": {"train": self.rows},
            "history": self.history,
            "parameters": report.parameters(self.model),
            "latency_ms": report.latency(self.model),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        scored = None
        if data.test:
            found["rows"]["test"] = readers.count_rows(self.recipe.schema, data.test)
            found["test"], text, scored = measured(self.model, data, data.test, progress=True)
            print(text)
        if data.test_support and not data.items:
            found["adapted"] = adapted.measure(self.model, data.test, data.test_support)
            print(table(found["adapted"]["test"]))
        run_dir.write_json(self.dir / "report.json", found)
        report.write_html(self.dir / "report.html", found, scored)
        print(f"Report: {self.dir / 'report.html'}")
        return found


def train(recipe: Recipe, model_dir: str | pathlib.Path) -> dict[str, Any]:
    """Trains a recipe in a model directory; see `Run`."""
    return Run(recipe, model_dir).train()
