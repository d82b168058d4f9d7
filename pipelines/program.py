"""How every program of this package starts."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags, logging


def start(define_flags: Callable[[], object], run: Callable[[list[str]], None]) -> None:
    """Parses the flags and runs; `--help` shows the program's words and all of its flags.

    Both are those of the module that defines the flags, also where a console script is the main
    module. Flags are defined here and not at import, so that programs can be imported together.
    """
    sys.modules["__main__"].__doc__ = sys.modules[define_flags.__module__].__doc__
    before = set(flags.FLAGS)
    define_flags()
    for name in set(flags.FLAGS) - before:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])

    def quietly(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # TensorFlow tells of each file that it saves
        run(argv)

    app.run(quietly)
