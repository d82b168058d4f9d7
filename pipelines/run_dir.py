"""A model directory: what a training run leaves behind, and how to load it.

asked.json      the recipe as given
recipe.json     the recipe, schema completed from the training rows
data.json       the identities of the data sets that the run read
look.json       what their rows were
history.json    one entry for each epoch
checkpoints/    where a killed run goes on
weights/        the weights of the best epoch
serving.json    how a tower adapts in serving, where validation rows chose it
report.json, report.html, tensorboard/
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import tensorflow as tf
import tf_keras

from qianmo.export import paths, publishing
from qianmo.models import zoo
from qianmo.models.ranker import Ranker
from qianmo.pipelines.data.identity import Identity
from qianmo.pipelines.data.summaries import Summary
from qianmo.pipelines.recipe import Recipe

_T = TypeVar("_T")

RECIPE = "recipe.json"
FORMAT = 1  # of model directories; raised when older ones cannot be read any more
DATA = "data.json"
LOOK = "look.json"
WEIGHTS = "weights"
SERVING = "serving.json"


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all, and its folder where it is not there.

    Raises:
      ValueError: another process writes it.
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    publishing.write_text(path, text)


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
    """Reads a JSON file, or gives `default` where there is none.

    Raises:
      ValueError: the file is no JSON; it was cut or changed.
    """
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as JSON: {error}. It was cut or changed."
        ) from None


def _read_roles(path: pathlib.Path, read: Callable[[Any], _T]) -> dict[str, _T]:
    """Reads what a JSON file holds for each role in the recipe; none where there is no file.

    Raises:
      ValueError: it holds something else.
    """
    config = read_json(path, {})
    try:
        return {role: read(each) for role, each in config.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold what a run writes there: {error!r}. It was cut or changed."
        ) from None


def write_identities(model_dir: str | pathlib.Path, identities: Mapping[str, Identity]) -> None:
    """Writes down which data a run reads: role in the recipe -> identity."""
    config = {role: each.to_config() for role, each in identities.items()}
    write_json(pathlib.Path(model_dir) / DATA, config)


def read_identities(model_dir: str | pathlib.Path) -> dict[str, Identity]:
    """Reads which data a run read; none of a directory that another program wrote.

    Raises:
      ValueError: the file was cut or changed.
    """
    return _read_roles(pathlib.Path(model_dir) / DATA, Identity.from_config)


def build(recipe: Recipe) -> Ranker:
    """Builds the recipe's model with its first weights, which depend on the seed alone."""
    tf_keras.utils.set_random_seed(recipe.train.seed)
    tf_keras.mixed_precision.set_global_policy(recipe.train.dtype_policy)
    model = zoo.build(recipe.schema, recipe.model)
    model.build()
    return model


def write_recipe(model_dir: str | pathlib.Path, recipe: Recipe) -> None:
    """Writes a model directory's recipe."""
    write_json(pathlib.Path(model_dir) / RECIPE, {"format": FORMAT, **recipe.to_config()})


def read_recipe(model_dir: str | pathlib.Path) -> Recipe:
    """Reads a model directory's recipe.

    Raises:
      ValueError: there is none, it cannot be read, or TensorFlow cannot read from there.
    """
    paths.check_model_path(model_dir)
    path = pathlib.Path(model_dir) / RECIPE
    config = read_json(path, None)
    if config is None:
        raise ValueError(f"{model_dir} holds no {RECIPE}; train a model there first.")
    try:
        if (found := config.pop("format", FORMAT)) != FORMAT:
            raise ValueError(
                f"its format is {found!r}, and this version of the package reads {FORMAT}. Train "
                "anew, or use the version that wrote it."
            )
        config["data"].setdefault("catalogue", config["data"].pop("items", ""))  # its former name
        return Recipe.from_config(config)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from error


def write_looks(model_dir: str | pathlib.Path, looks: Mapping[str, Summary]) -> None:
    """Keeps what the rows of a run were, for comparison with later ones."""
    config = {role: each.to_config() for role, each in looks.items()}
    write_json(pathlib.Path(model_dir) / LOOK, config)


def read_looks(model_dir: str | pathlib.Path) -> dict[str, Summary]:
    """Reads what `write_looks` wrote: role in the recipe -> what the rows were.

    Raises:
      ValueError: the file was cut or changed.
    """
    return _read_roles(pathlib.Path(model_dir) / LOOK, Summary.from_config)


def fingerprint(model_dir: str | pathlib.Path) -> str:
    """Tells trained weights apart: `checkpoint_fingerprint` of those of the best epoch.

    Raises:
      ValueError: the run has not finished an epoch.
    """
    return checkpoint_fingerprint(_newest(model_dir))


def checkpoint_fingerprint(checkpoint: str) -> str:
    """The hash of the index of checksums in a checkpoint."""
    return hashlib.sha256(pathlib.Path(f"{checkpoint}.index").read_bytes()).hexdigest()


def _newest(model_dir: str | pathlib.Path) -> str:
    found = tf.train.latest_checkpoint(str(pathlib.Path(model_dir) / WEIGHTS))
    if found is None:
        raise ValueError(f"{model_dir} holds no weights yet; let the training finish an epoch.")
    return found


def write(
    model_dir: str | pathlib.Path,
    model: Ranker,
    recipe: Recipe,
    like: str | pathlib.Path | None = None,
) -> None:
    """Writes a model that was not trained there, with its recipe, whole or not at all.

    Args:
      model_dir: to be made.
      model: what is written.
      recipe: builds it.
      like: the run that it was made of, whose data and way of serving are its own.
    """
    with publishing.writing_folder(pathlib.Path(model_dir)) as folder:
        weights = tf.train.Checkpoint(model=model)
        tf.train.CheckpointManager(weights, str(folder / WEIGHTS), max_to_keep=1).save()
        write_recipe(folder, recipe)
        for name in (DATA, LOOK, SERVING) if like else ():
            if (source := pathlib.Path(like or "", name)).exists():
                shutil.copyfile(source, folder / name)


def restore(model: Ranker, model_dir: str | pathlib.Path, checkpoint: str = "") -> None:
    """Puts a run's weights into the model of the same recipe: all of them, or none.

    Args:
      model: as `build` makes it of the run's recipe.
      model_dir: of the run.
      checkpoint: one of its checkpoints; the weights of the best epoch by default.

    Raises:
      ValueError: no weights yet, damaged ones, or those of another model.
    """
    path = checkpoint or _newest(model_dir)
    try:
        status = tf.train.Checkpoint(model=model).restore(path)
        status.assert_existing_objects_matched().expect_partial()
        names = [name.split("/") for name, _ in tf.train.list_variables(path)]
        held = {
            "/".join(parts).removesuffix(_VALUE)
            for parts in names
            if parts[0] == "model"
            and parts[1] not in _OF_TRAINING
            and ".OPTIMIZER_SLOT" not in parts
        }
    except (tf.errors.OpError, AssertionError, IndexError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path} cannot be read into the model of {model_dir}: {reason} It is damaged, or was "
            "written by a version of this package whose models were built otherwise: train anew."
        ) from error
    known = {f"model/{path}" for path in variables(model)}
    left = sorted(held - known)
    if left:
        raise ValueError(
            f"{path} holds {len(left)} weights that the model of {model_dir} lacks, such as "
            f"{left[0]}. It was written by a version of this package whose models were built "
            "otherwise: train anew."
        )


_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# Attributes of a compiled model that a checkpoint holds beside its parts.
_OF_TRAINING = {"optimizer", "table_optimizer", "meta_optimizer", "_means"}


def restore_optimizers(model_dir: str | pathlib.Path, **optimizers: Any) -> bool:
    """Puts the state that a run's optimisers had at its best epoch into others, built alike.

    Args:
      model_dir: of the run.
      **optimizers: as the attributes of the compiled model name them.

    Returns:
      Whether there was any; a model that was not trained there has none.

    Raises:
      ValueError: the state is that of other weights.
    """
    path = _newest(model_dir)
    names = {name.split("/")[1] for name, _ in tf.train.list_variables(path) if "/" in name}
    if not names & optimizers.keys():
        return False
    wrapped = tf.train.Checkpoint(model=tf.train.Checkpoint(**optimizers))
    try:
        wrapped.restore(path).assert_existing_objects_matched().expect_partial()
    except AssertionError as error:
        raise ValueError(
            f"{path}: the optimisers' state is not that of this model's weights: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return True


def variables(part: Any) -> dict[str, tf.Variable]:
    """The variables of a model or a part of one, by their attributes below it."""
    view = tf.train.TrackableView(part)
    result: dict[str, tf.Variable] = {}
    seen = {id(part)}
    queue = [("", part)]
    while queue:
        path, item = queue.pop(0)
        if isinstance(item, tf.Variable):
            result[path] = item
            continue
        for name, child in view.children(item).items():
            if id(child) not in seen:
                seen.add(id(child))
                queue.append((f"{path}/{name}" if path else name, child))
    return result


def load(model_dir: str | pathlib.Path) -> tuple[Ranker, Recipe]:
    """Loads a trained model.

    Raises:
      ValueError: no run, no weights yet, or damaged ones.
    """
    recipe = read_recipe(model_dir)
    model = build(recipe)
    restore(model, model_dir)
    chosen = read_json(pathlib.Path(model_dir) / SERVING, None)
    if model.meta is not None and chosen is not None:
        model.meta.serving_steps = chosen["inner_steps"]
        model.meta.min_support = chosen["min_support"]
    return model, recipe
