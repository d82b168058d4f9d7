r"""Compares a model of several domains with the models of one domain that it replaces.

    qianmo-compare --model_dir=runs/fused --single=runs/single_1,runs/single_0 \
        --output=runs/fused/comparison.html

Every single model scores the test rows of its own domain, and the fused model scores all: AUC and
GAUC by domain and label, and the differences with their standard errors, by a bootstrap over users
(`schema.task_id`; over rows where there is none). A metric of fewer than 30 users is left out: of
those with a positive and with a negative row, for GAUC with both.

Then what they cost, the sum of the single models beside the fused one: weights, distinct table rows
that a batch reads, bytes that a step on it moves, times of a step and of a pass over the training
rows, in turns and with the recipes' batch sizes, and the size of an export.

A domain that is worse off by more than two standard errors is named as the seesaw: it pays for the
others. One of forty that are as well off as before is named so by chance. The standard errors are
those of the test users; another seed moves both models too.

Reads the model directories, and the rows to score. Writes an HTML page with a picture of the
differences, and a .json file beside it.
"""

from __future__ import annotations

import pathlib

from absl import app, flags

from qianmo.export import publishing
from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("What it reads")
    flags.DEFINE_string("model_dir", None, "Directory of the fused model.", required=True)
    flags.DEFINE_list(
        "single",
        None,
        "Directories of the single models, with commas between them. The domain of each is the one "
        "that its recipe's `schema.only_domains` names.",
        required=True,
    )
    flags.DEFINE_string(
        "test", "", "Rows to score: a file, folder or glob. Default: the recipes' test rows."
    )
    program.model_paths("model_dir", "single")
    program.heading("What it writes")
    flags.DEFINE_string(
        "output", None, "The HTML file. Default: comparison.html in the fused model's directory."
    )


def run(_: list[str]) -> None:
    """Prints the tables, and writes the page and the JSON."""
    values = flags.FLAGS
    output = pathlib.Path(values.output or pathlib.Path(values.model_dir) / "comparison.html")
    if output.suffix != ".html":
        raise app.UsageError(f"--output should end in .html. Received: {output}")
    publishing.check_writable(output)
    from qianmo.pipelines.evaluation.compare import compare, table, write

    found = compare(values.model_dir, values.single, values.test)
    write(output, found)
    print(table(found))
    print(f"Report: {output}")


def main() -> None:
    """Entry of `qianmo-compare`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
