"""The main job end to end on real data.

    python -m qianmo.pipelines.demo

prepare -> train a dual DNN on KuaiRand clicks, and its student alone -> evaluate -> export ->
serve -> score real rows by gRPC and by REST -> compare with the Keras scores -> a table. Then a
tower that adapts to each user, trained, exported and served the same way; and one model of five
tabs, compared with five models of one tab.
"""

from __future__ import annotations

import pathlib

from absl import flags

from qianmo.pipelines import program


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("output", "runs/demo", "Folder for everything; emptied first.")
    flags.DEFINE_integer("epochs", 3, "Passes over the training rows.", lower_bound=1)


def run(_: list[str]) -> None:
    """Runs the steps."""
    from qianmo.pipelines import demo_steps

    demo_steps.run(pathlib.Path(flags.FLAGS.output), flags.FLAGS.epochs)


def main() -> None:
    """Entry of `make demo`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
