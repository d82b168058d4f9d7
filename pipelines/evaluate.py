"""Metrics of a trained model on rows: per head, label, domain and group of users.

python -m qianmo.pipelines.evaluate --model_dir=DIR [--data=rows.parquet] [--output=metrics.json]
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string(
        "data", None, "Rows to score: a file, folder or glob. Default: the recipe's test rows."
    )
    flags.DEFINE_string("output", None, "Where to write the metrics as JSON.")


def run(_: list[str]) -> None:
    """Prints the table, and writes the JSON where asked."""
    from qianmo.pipelines import run_dir
    from qianmo.pipelines.evaluation.measuring import evaluated

    values = flags.FLAGS
    try:
        found, text = evaluated(values.model_dir, values.data or "")
    except ValueError as error:
        sys.exit(f"error: {error}")
    if values.output:
        run_dir.write_json(pathlib.Path(values.output), found)
    print(text)


def main() -> None:
    """Entry of `qianmo-evaluate`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
