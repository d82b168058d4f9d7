"""Exports a trained model for TensorFlow Serving.

    python -m qianmo.pipelines.export --model_dir=DIR --model_base_path=served/ranker

The new version is written under a temporary name, replayed on real rows by the session loader,
compared with the Keras model, and only then published by a rename.
"""

from __future__ import annotations

import pathlib
import sys

import numpy as np
from absl import flags

from qianmo.export.saved_model import ExportError, export_fed, export_in_graph
from qianmo.layers.features import Schema
from qianmo.pipelines import program, readers, run_dir

FORMS = {"in_graph": export_in_graph, "fed": export_fed}


def first_rows(schema: Schema, path: str, count: int) -> dict[str, np.ndarray]:
    """The first rows of a file, as the model's inputs."""
    with readers.own_errors():
        batch, _ = next(iter(readers.dataset(schema, path, batch_size=count)))
    return {name: column.numpy() for name, column in batch.items()}


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string(
        "model_base_path",
        None,
        "Where the versions go; its last part names the model.",
        required=True,
    )
    flags.DEFINE_enum(
        "form",
        "in_graph",
        sorted(FORMS),
        "in_graph: everything in one SavedModel. fed: the graph takes vectors as inputs, and a "
        "second SavedModel, <model_base_path>_lookup, makes them. Stock ops in both.",
    )
    flags.DEFINE_list(
        "heads", [], "Heads to ship, the default one first. Default: the model's serving head."
    )
    flags.DEFINE_integer("version", None, "Default: one above the highest there.", lower_bound=1)
    flags.DEFINE_string("data", None, "Rows to replay. Default: the recipe's test or valid rows.")
    flags.DEFINE_integer("rows", 1000, "How many rows to replay.", lower_bound=1)


def run(_: list[str]) -> None:
    """Exports, and says where the version lies and how near the scores are."""
    values = flags.FLAGS
    try:
        model, recipe = run_dir.load(values.model_dir)
        data = recipe.data
        path = values.data or data.test or data.valid or data.train
        folder, worst = FORMS[values.form](
            model,
            values.model_base_path,
            first_rows(model.schema, path, values.rows),
            heads=values.heads,
            version=values.version,
        )
    except (ExportError, ValueError) as error:
        sys.exit(f"error: {error}")
    size = sum(p.stat().st_size for p in pathlib.Path(folder).rglob("*") if p.is_file())
    print(f"{folder}: {size:,} bytes; largest difference to the Keras model {worst:.1e}")


def main() -> None:
    """Entry of `qianmo-export`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
