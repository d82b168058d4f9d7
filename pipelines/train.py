"""Trains a recipe.

    python -m qianmo.pipelines.train --config=configs/<recipe>.py --model_dir=DIR

Killed at any moment and started again by the same command, it goes on from the last checkpoint
and ends with the weights that an uninterrupted run has.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string(
        "model_dir", None, "Where the run lives; the same command continues it.", required=True
    )
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Only print what the recipe's `migrate` takes from which model, and compare the scores.",
    )
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A recipe, such as those in configs/; after a colon its variant. Any key of it can be set: "
        "--config.train.epochs=1 --config.data.train=rows/",
    )
    flags.mark_flag_as_required("config")  # type: ignore[no-untyped-call]


def run(_: list[str]) -> None:
    """Trains what the flags name."""
    from qianmo.pipelines import run_dir
    from qianmo.pipelines.recipe import Recipe
    from qianmo.pipelines.training import migrate
    from qianmo.pipelines.training.preparing import completed
    from qianmo.pipelines.training.run import train
    from qianmo.pipelines.training.watch import NotFiniteError

    values = flags.FLAGS
    try:
        recipe = Recipe.from_config(values.config.to_dict())
        if values.dry_run:
            recipe = completed(recipe)
            migrate.start(recipe, run_dir.build(recipe))
        else:
            train(recipe, values.model_dir)
    except (ValueError, NotFiniteError) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Entry of `qianmo-train`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
