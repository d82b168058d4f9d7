"""Metrics of towers adapted on their tasks' support rows, beside the plain ones.

    qianmo-adapt --model_dir=runs/meta --inner_steps=16 --min_support=3

Reads a model directory, the rows and their tasks' support rows. Prints tables, and writes the
metrics as JSON where asked.

What suits the rows of a later day is then given to `qianmo-export --form=adapted`, by the same two
flags.
"""

from __future__ import annotations

import pathlib

from absl import flags

from qianmo.export import publishing
from qianmo.pipelines import program


def define_serving_flags() -> None:
    """Defines the flags that say how a tower adapts in serving."""
    flags.DEFINE_integer(
        "inner_steps",
        None,
        "Steps by which a tower adapts. Default: those that training chose (serving.json), else "
        "the recipe's.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "min_support",
        None,
        "Labels of which a task has fewer support rows get the plain score. Default: what training "
        "chose, else the recipe's.",
        lower_bound=1,
    )


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("What it reads")
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string("data", None, "Rows to score. Default: the recipe's test rows.")
    flags.DEFINE_string(
        "support",
        None,
        "Support rows of their tasks, all older, those of a task in order of time. Default: the "
        "recipe's, of its test rows.",
    )
    program.model_paths("model_dir")
    program.heading("How towers adapt")
    define_serving_flags()
    program.heading("What it writes")
    flags.DEFINE_string("output", None, "Where to write the metrics as JSON.")


def run(_: list[str]) -> None:
    """Prints metrics by tasks' support rows and by how many are used; writes the JSON if asked."""
    values = flags.FLAGS
    if values.output:
        publishing.check_writable(values.output)
    from qianmo.models.two_tower import TwoTower
    from qianmo.pipelines import run_dir
    from qianmo.pipelines.evaluation import adapted
    from qianmo.pipelines.evaluation.measuring import check_data
    from qianmo.pipelines.evaluation.scores import table

    model, recipe = run_dir.load(values.model_dir)
    model = adapted.as_served(model, values.inner_steps, values.min_support)
    if model.meta is None or isinstance(model, TwoTower):
        raise ValueError(
            "This is for rankers trained with `meta`; qianmo-evaluate measures the others, "
            "adapted two-tower models too."
        )
    path = values.data or recipe.data.test
    support = values.support or ("" if values.data else recipe.data.test_support)
    if not path or not support:
        raise ValueError("The recipe names no test rows with support; give --data, --support.")
    if not values.data:
        support_role = () if values.support else ("test_support",)
        check_data(values.model_dir, recipe, "test", *support_role, flags="--data and --support")
    found = adapted.measure(model, path, support)
    if values.output:
        run_dir.write_json(pathlib.Path(values.output), found)
    print(table(found["test"]))
    for label in model.schema.labels:
        print(f"\n{label}\n{adapted.curve_table(found['curve'], label)}")
    least = adapted.least_support(found["curve"])
    if least is None:
        print("\nHere adapting loses on the plain score; serve that, or try fewer --inner_steps.")
    else:
        least = max(least, model.meta.min_support)  # below it nothing was adapted
        print(f"\nHere adapting loses nothing from {least} support rows on: --min_support={least}")


def main() -> None:
    """Entry of `qianmo-adapt`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
