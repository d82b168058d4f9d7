"""Metrics of a trained model on rows: per head, label, domain and group of users.

    qianmo-evaluate --model_dir=runs/dual --data=rows/test.parquet --output=metrics.json

Reads a model directory, and the rows. Prints a table, and writes the metrics as JSON where asked.
"""

from __future__ import annotations

import pathlib

from absl import flags

from qianmo.export import publishing
from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("What it reads")
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string(
        "data", None, "Rows to score: a file, folder or glob. Default: the recipe's test rows."
    )
    program.model_paths("model_dir")
    program.heading("What it writes")
    flags.DEFINE_string("output", None, "Where to write the metrics as JSON.")


def run(_: list[str]) -> None:
    """Prints the table, and writes the JSON where asked."""
    values = flags.FLAGS
    if values.output:
        publishing.check_writable(values.output)
    from qianmo.pipelines import run_dir
    from qianmo.pipelines.evaluation.measuring import evaluated

    found, text = evaluated(values.model_dir, values.data or "")
    if values.output:
        run_dir.write_json(pathlib.Path(values.output), found)
    print(text)


def main() -> None:
    """Entry of `qianmo-evaluate`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
