"""A model directory: what a training run leaves behind, and how to load it.

asked.json      the recipe as given
recipe.json     the recipe, schema completed from the training rows
history.json    one entry for each epoch
checkpoints/    where a killed run goes on
weights/        the weights of the best epoch
report.json, report.html, tensorboard/
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import shutil
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.export import paths
from qianmo.models import zoo
from qianmo.models.ranker import Ranker
from qianmo.pipelines.recipe import Recipe

RECIPE = "recipe.json"
WEIGHTS = "weights"


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a write that fails names none
        raise


def _finite(value: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """A value as JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(value))


def read_json(path: pathlib.Path, default: Any) -> Any:
    """Reads a JSON file, or gives `default` where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def build(recipe: Recipe) -> Ranker:
    """Builds the recipe's model with its first weights, which depend on the seed alone."""
    tf_keras.utils.set_random_seed(recipe.train.seed)
    tf_keras.mixed_precision.set_global_policy(recipe.train.dtype_policy)
    model = zoo.build(recipe.schema, recipe.model)
    model.build()
    return model


def read_recipe(model_dir: str | pathlib.Path) -> Recipe:
    """Reads a model directory's recipe.

    Raises:
      ValueError: there is none, or TensorFlow cannot read from there.
    """
    paths.check_model_path(model_dir)
    path = pathlib.Path(model_dir) / RECIPE
    if not path.exists():
        raise ValueError(f"{model_dir} holds no {RECIPE}; train a model there first.")
    return Recipe.from_config(json.loads(path.read_text(encoding="utf-8")))


def restore(model: Any, model_dir: str | pathlib.Path) -> Any:
    """Puts the best epoch's weights into a model; returns the load status.

    Raises:
      ValueError: the run has not finished an epoch.
    """
    found = tf.train.latest_checkpoint(str(pathlib.Path(model_dir) / WEIGHTS))
    if found is None:
        raise ValueError(f"{model_dir} holds no weights yet; let the training finish an epoch.")
    return tf.train.Checkpoint(model=model).restore(found)


def write(model_dir: str | pathlib.Path, model: Ranker, recipe: Recipe) -> None:
    """Writes a model that was not trained there, with its recipe, whole or not at all."""
    folder = pathlib.Path(model_dir)
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        weights = tf.train.Checkpoint(model=model)
        tf.train.CheckpointManager(weights, str(temporary / WEIGHTS), max_to_keep=1).save()
        write_json(temporary / RECIPE, recipe.to_config())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(model_dir: str | pathlib.Path) -> tuple[Ranker, Recipe]:
    """Loads a trained model."""
    recipe = read_recipe(model_dir)
    model = build(recipe)
    restore(model, model_dir).expect_partial().assert_existing_objects_matched()
    return model, recipe
