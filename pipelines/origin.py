"""What an export comes from, as `export.publishing.write_origin` writes it beside the graph.

weights       the fingerprint of the run's weights, as qianmo-evaluate writes it too
data          role in the recipe -> identity of the data set that the run read
support, catalogue, calibration
              identity of the rows exported with; of the last also `scalings`
online        what moved a student since: stream, position, rows, fingerprint of the checkpoint
"""

from __future__ import annotations

import pathlib
from typing import Any

from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.recipe import Recipe


def of_run(model_dir: str | pathlib.Path) -> dict[str, Any]:
    """Weights and data of a model directory; no data where another program wrote it."""
    known = run_dir.read_identities(model_dir)
    return {
        "weights": run_dir.fingerprint(model_dir),
        "data": {role: each.to_config() for role, each in known.items()},
    }


def load(model_dir: str | pathlib.Path) -> tuple[Ranker, Recipe, dict[str, Any]]:
    """Loads a trained model with what it comes from.

    Raises:
      ValueError: no run, no weights yet, or damaged ones; a run that wrote others meanwhile.
    """
    run_dir.read_recipe(model_dir)  # that there is no run is said before that it has no weights
    origin = of_run(model_dir)
    model, recipe = run_dir.load(model_dir)
    if of_run(model_dir) != origin:
        raise ValueError(
            f"{model_dir}: its training wrote other weights while they were read. Export again, or "
            "once it has ended."
        )
    return model, recipe, origin
