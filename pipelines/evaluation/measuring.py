"""What `qianmo-evaluate` does: rows are known, looked at, scored and compared with training's."""

from __future__ import annotations

import pathlib
from typing import Any

from qianmo.pipelines import run_dir
from qianmo.pipelines.data import identity, look, summaries
from qianmo.pipelines.evaluation.scores import measured


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
