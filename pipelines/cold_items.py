r"""Gives ids of new items first vectors, made of their other features, in a copy of a model.

    python -m qianmo.pipelines.cold_items --model_dir=DIR --item_id=movie_id \
        --items=runs/movielens_1m_new_items/items.parquet --output=DIR2

A generator learns on the model's training rows, as if their items were new (Meta-Embedding, see
`qianmo.models.cold_items`). Items of --items without a row among those are the new ones. The output
is a model directory, to be exported as any other; it appears when it is whole.
"""

from __future__ import annotations

import pathlib

from absl import flags

from qianmo.export import paths
from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("What it reads and writes")
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string("item_id", None, "The feature of the item's id.", required=True)
    flags.DEFINE_string("items", None, "Rows of item features, one an item.", required=True)
    flags.DEFINE_string("output", None, "Model directory to make.", required=True)
    program.model_paths("model_dir", "output")
    program.heading("How the generator learns")
    flags.DEFINE_integer("epochs", 1, "Passes over the training rows.", lower_bound=1)
    flags.DEFINE_integer("rows", 20, "K, rows of an item before and after the step.", lower_bound=1)
    flags.DEFINE_float("step_size", 0.1, "eta, of the step.", lower_bound=0.0)
    flags.DEFINE_float("scale", 0.2, "gamma, bound of the vectors.", lower_bound=0.0)


def run(_: list[str]) -> None:
    """Learns, fills, and writes the copy."""
    values = flags.FLAGS
    output = pathlib.Path(values.output)
    if output.exists():
        raise ValueError(f"{output} exists. Give another --output.")
    paths.check_folder(output)
    from qianmo.models.cold_items import ColdItems
    from qianmo.pipelines import run_dir
    from qianmo.pipelines.data import readers
    from qianmo.pipelines.training.cold_items import fill, learn

    model, recipe = run_dir.load(values.model_dir)
    cold = ColdItems(
        model,
        values.item_id,
        rows=values.rows,
        step_size=values.step_size,
        scale=values.scale,
        seed=recipe.train.seed,
    )
    with readers.own_errors():
        losses = learn(cold, recipe.data.train, epochs=values.epochs, seed=recipe.train.seed)
    new = fill(cold, values.items, recipe.data.train)
    run_dir.write(output, model, recipe, run_dir.read_identities(values.model_dir))
    print(f"{output}: first vectors of {new:,} new items; loss {losses[-1]:.4f}")


def main() -> None:
    """Runs the program."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
