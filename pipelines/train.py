"""Trains a recipe.

    qianmo-train --config=configs/kuairand_dual_dnn.py --model_dir=runs/dual
    qianmo-train --config=recipe.py:variant --model_dir=runs/mine --config.train.epochs=1

Reads the recipe, and the rows that its `data` names. Writes the model directory: checkpoints, the
weights of the best epoch, recipe.json, report.json and report.html.

Killed at any moment and started again by the same command, it goes on from the last checkpoint
and ends with the weights that an uninterrupted run has.
"""

from __future__ import annotations

from absl import flags

from qianmo.pipelines import program, recipe_flag


def define_flags() -> None:
    """Defines this program's flags."""
    recipe_flag.define()
    flags.DEFINE_string(
        "model_dir", None, "Where the run lives; the same command continues it.", required=True
    )
    program.model_paths("model_dir")
    flags.DEFINE_bool(
        "dry_run",
        False,
        "Only print what the recipe's `migrate` takes from which model, and compare the scores.",
    )


def run(_: list[str]) -> None:
    """Trains what the flags name."""
    from qianmo.pipelines import run_dir
    from qianmo.pipelines.recipe import Recipe
    from qianmo.pipelines.training import migrate
    from qianmo.pipelines.training.preparing import completed
    from qianmo.pipelines.training.run import train

    values = flags.FLAGS
    recipe = Recipe.from_config(values.config.to_dict())
    if values.dry_run:
        recipe = completed(recipe)
        migrate.start(recipe, run_dir.build(recipe))
    else:
        train(recipe, values.model_dir)


def main() -> None:
    """Entry of `qianmo-train`."""
    program.start(
        define_flags, run, after_stop="the same command goes on from the last checkpoint."
    )


if __name__ == "__main__":
    main()
