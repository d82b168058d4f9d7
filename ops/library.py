"""The shared library that holds the custom ops."""

from __future__ import annotations

import functools
import pathlib
import types

import tensorflow as tf

_FILE = pathlib.Path(__file__).with_name("_qianmo_ops.so")


@functools.cache
def library() -> types.ModuleType:
    """Loads the custom ops on first use, and returns the module of their raw wrappers.

    The op `Qianmo>SparseAdam` is its function `qianmo_sparse_adam`. A graph that holds the ops can
    be run by any process that has called this.

    Raises:
      RuntimeError: the ops were not compiled.
    """
    if not _FILE.is_file():
        raise RuntimeError(
            f"The custom ops should be compiled as `{_FILE}`, and there is no such file. "
            "Compile them: in a checkout with `make native`, elsewhere by installing qianmo again."
        )
    return tf.load_op_library(str(_FILE))
