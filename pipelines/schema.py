"""Proposes a recipe for a table: a schema with the reason for each of its lines.

    qianmo-schema --data=rows/ --output=my_recipe.py
    qianmo-schema --data=rows.csv --label=click,buy --task_id=user_id
    qianmo-train --config=my_recipe.py --model_dir=runs/mine

Reads a sample of the rows (Parquet, TFRecord or CSV; a file, a folder or a glob) and looks at
types, distinct values, nulls, ids, lists, times and what is named like a label. Columns that seem
to tell the label, to be known only after the row, or to differ in every row stay out, and a comment
says why. The recipe trains as it is; read its comments first, and change what only you can know.

Without --output it is printed.
"""

from __future__ import annotations

import pathlib

from absl import flags

from qianmo.export import publishing
from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("data", None, "The table: a file, a folder or a glob.", required=True)
    flags.DEFINE_list(
        "label",
        [],
        "Columns to predict. Default: one that is named like an outcome, such as click.",
    )
    flags.DEFINE_string(
        "task_id", "", "Column of the task. Default: one that is named like a user's id."
    )
    flags.DEFINE_string("timestamp", "", "Column of the time. Default: one that looks like a time.")
    flags.DEFINE_string("domain", "", "Column of the domain or scene, if there are several.")
    flags.DEFINE_string("output", "", "The file to write; it should not exist. Default: stdout.")
    flags.DEFINE_integer("rows", 500_000, "How many rows to look at.", lower_bound=1)


def run(_: list[str]) -> None:
    """Writes the proposal that the flags ask for."""
    values = flags.FLAGS
    output = pathlib.Path(values.output) if values.output else None
    if output is not None:
        publishing.check_writable(output)
        if output.exists():
            raise ValueError(f"{output} exists. Give another --output, or delete it.")
    from qianmo.pipelines.data import recipe_text, sample
    from qianmo.pipelines.data.propose import propose

    proposal = propose(
        sample.read(values.data, values.rows),
        labels=values.label,
        task_id=values.task_id,
        timestamp=values.timestamp,
        domain=values.domain,
    )
    text = recipe_text.text(proposal, values.data)
    if output is None:
        print(text, end="")
        return
    publishing.write_text(output, text)
    labels = ", ".join(line.name for line in proposal.labels)
    print(
        f"{output}: {len(proposal.features)} features for {labels}; "
        f"{len(proposal.left_out)} columns stay out, and its comments say why."
    )


def main() -> None:
    """Entry of `qianmo-schema`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
