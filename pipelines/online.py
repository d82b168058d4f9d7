"""Keeps a student up to date: steps on rows as they come, and a new graph every few minutes.

    qianmo-online --model_dir=runs/dual --model_base_path=served/ranker --folder=rows/

Reads a model directory, and rows from a folder or a Redis stream. Writes checkpoints and
report.json into --online_dir, and versions below --model_base_path.

Starts from a trained dual DNN, and moves its student's MLP alone; teacher and tables stay as they
are. So what is published is a graph, which reads the embeddings that were published before it.
Killed at any moment and started again by the same command, it goes on from the last checkpoint
and takes the steps that it would have taken. Ctrl-C and SIGTERM end it with a checkpoint and a
last graph.
"""

from __future__ import annotations

import pathlib
import signal
from typing import TYPE_CHECKING, Any

from absl import app, flags

from qianmo.export import paths
from qianmo.pipelines import program

if TYPE_CHECKING:
    from qianmo.pipelines.training.online import Publish


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("What it reads and writes")
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
    program.model_paths("model_dir", "model_base_path", "online_dir")
    program.heading("The stream of rows")
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
        "allow_gaps",
        False,
        "Go on when entries of --redis were removed before they were read, and count them in "
        "report.json. Default: end with an error.",
    )
    flags.DEFINE_bool(
        "stop_at_end", False, "End when the rows that are there do not make another step."
    )
    program.heading("What is published")
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
        1e-6,
        "Form `store`: how far scores may be from the Keras model's. Only dtypes other than "
        "float32 need more than the default.",
        lower_bound=0.0,
    )
    program.heading("Steps and pace")
    flags.DEFINE_integer(
        "batch_size", None, "Rows of a step. Default: the recipe's.", lower_bound=1
    )
    flags.DEFINE_float("learning_rate", None, "Default: the recipe's.", lower_bound=0.0)
    flags.DEFINE_integer("checkpoint_rows", 2**16, "Rows between checkpoints.", lower_bound=1)
    flags.DEFINE_integer(
        "publish_rows", 0, "Rows between graphs; 0: the clock alone decides.", lower_bound=0
    )
    flags.DEFINE_float(
        "publish_minutes",
        10.0,
        "Minutes between graphs; 0: the rows alone decide.",
        lower_bound=0.0,
    )


def _publisher(values: Any) -> Publish:
    """How graphs are published, by the flags.

    Raises:
      ValueError: no embeddings were published.
    """
    from qianmo.export import embedding_shards
    from qianmo.export.saved_model import export_in_graph
    from qianmo.export.store import export_store

    base = values.model_base_path
    if values.form == "in_graph":
        return lambda model, rows, origin: export_in_graph(model, base, rows, origin=origin)
    store = values.embedding_store or f"{base.rstrip('/')}_embeddings"
    version = values.embedding_version or embedding_shards.published(store)
    if version is None:
        raise ValueError(
            f"{store}: no embeddings are published there. Export the model first: qianmo-export "
            f"--form=store --model_dir={values.model_dir} --model_base_path={base}"
        )
    embedding_shards.space(pathlib.Path(store) / str(version))  # it is there
    return lambda model, rows, origin: export_store(
        model,
        base,
        rows,
        origin=origin,
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
    if values.allow_gaps and not values.redis:
        raise app.UsageError("--allow_gaps is for --redis; no file of a --folder is passed over.")
    folder = pathlib.Path(values.online_dir or pathlib.Path(values.model_dir) / "online")
    for output in (folder, values.model_base_path):
        paths.check_folder(output)
    from qianmo.pipelines import locks, run_dir
    from qianmo.pipelines.data.redis_stream import RedisStream
    from qianmo.pipelines.data.streams import FolderStream, Position, Stream
    from qianmo.pipelines.training.online import Online, Pace

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(1))
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
        return RedisStream(
            recipe.schema,
            values.redis,
            key,
            group,
            position,
            start_after=after,
            allow_gaps=values.allow_gaps,
        )

    with locks.alone(folder, "updates its student"):
        publish = _publisher(values)
        online = Online(values.model_dir, folder, open_stream, publish, pace, values.learning_rate)
        online.run(lambda: bool(stopped), stop_at_end=values.stop_at_end)


def main() -> None:
    """Entry of `qianmo-online`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
