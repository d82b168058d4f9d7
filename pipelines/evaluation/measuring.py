"""What `qianmo-evaluate` does: rows are known, looked at, scored and compared with training's."""

from __future__ import annotations

import pathlib
from typing import Any

from qianmo.pipelines import run_dir
from qianmo.pipelines.data import identity, look, summaries
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.evaluation.scores import measured
from qianmo.pipelines.recipe import Recipe


def evaluated(model_dir: str | pathlib.Path, path: str = "") -> tuple[dict[str, Any], str]:
    """Measures a trained model on rows.

    Args:
      model_dir: of a training run.
      path: rows to score. Default: the recipe's test rows, if they are still those of the run.

    Returns:
      What a JSON file holds: `metrics`, head -> label -> metrics; `data`, the rows' identity, and
      `trained_on`, that of the training rows; `look` and `drift`, what the rows are and how they
      differ from the training rows; `weights`, the fingerprint of the model's. And all as text.

    Raises:
      ValueError: no rows, or the recipe's test rows are not those that the run was to measure.
    """
    model, recipe = run_dir.load(model_dir)
    rows = path or recipe.data.test
    if not rows:
        raise ValueError("The recipe names no test rows; give --data.")
    known = run_dir.read_identities(model_dir)
    watched = look.Look(model.schema)
    with identity.taking(model.schema, rows) as taken:
        found = measured(model, recipe.data, rows, progress=True, watched=watched)
        own = taken.result()
        taken.check_unchanged()
    differs = [] if path else identity.differences(known, {"test": own})
    if differs:
        raise ValueError(
            f"{differs[0]}. Give --data={rows} to measure the rows that are there now."
        )
    told = {
        "metrics": found.report,
        "data": own.to_config(),
        "trained_on": known["train"].to_config() if "train" in known else None,
        "weights": run_dir.fingerprint(model_dir),
    }
    text = [f"{rows}: {own}"]
    before = run_dir.read_looks(model_dir).get("train")
    if watched.rows:
        summary = watched.summary(model.schema, before)
        drifts = summaries.drift(before, summary) if before else {}
        told |= {"look": summary.to_config(), "drift": drifts}
        text.append(summaries.table(summary, drifts))
    return told, "\n".join([*text, found.text])


def changed_data(model_dir: str | pathlib.Path, recipe: Recipe, *roles: str) -> list[str]:
    """A sentence for each data set that is not what it was when the run began.

    Args:
      model_dir: of the run.
      recipe: its recipe.
      *roles: of the data sets to look at, as the recipe's `data` names them.
    """
    known = run_dir.read_identities(model_dir)
    now = {}
    for role in known.keys() & roles:
        of_items = role == "catalogue"
        schema = retrieval.item_schema(recipe.schema) if of_items else recipe.schema
        now[role] = identity.of(schema, getattr(recipe.data, role), targets=not of_items)
    return identity.differences(known, dict(sorted(now.items())))


def check_data(model_dir: str | pathlib.Path, recipe: Recipe, *roles: str, flags: str) -> None:
    """Looks whether data sets of a run are still those that it read; see `changed_data`.

    Args:
      model_dir: of the run.
      recipe: its recipe.
      *roles: of the data sets.
      flags: by which the rows that are there now can be given.

    Raises:
      ValueError: one is another.
    """
    if differs := changed_data(model_dir, recipe, *roles):
        raise ValueError(f"{'; '.join(differs)}. Give {flags} to measure what is there now.")
