"""What all tests share."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import signal
import sys

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
ROOT = pathlib.Path(__file__).resolve().parents[1]
# A job in the background of a shell ignores Ctrl-C; the programs that tests stop by it should not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Without an install, `qianmo` is this checkout, whatever the name of its folder.
if importlib.util.find_spec("qianmo") is None:
    spec = importlib.util.spec_from_file_location(
        "qianmo", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["qianmo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["qianmo"])


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Seeds Python, NumPy and TensorFlow; a test that needs no TensorFlow does not load it."""
    if "tf_keras" in sys.modules:
        sys.modules["tf_keras"].utils.set_random_seed(1)
