"""Modules outside of this package that register models and layers, as a recipe names them."""

from __future__ import annotations

import importlib
import traceback
import types
from collections.abc import Sequence

_loaded: set[str] = set()


def load(modules: Sequence[str]) -> None:
    """Imports a recipe's plug-ins.

    Raises:
      ValueError: one cannot be imported.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"`plugins`: {name} cannot be imported: {_fault(error)}") from error
        _loaded.add(name.partition(".")[0])


def _fault(error: Exception) -> str:
    """What an import raised, where, and the remedy."""
    what = f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"
    if isinstance(error, ModuleNotFoundError):
        return f"{what}. Install it, or put its folder on PYTHONPATH."
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}."
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno}: {what}."


def has_frame(frame: types.FrameType) -> bool:
    """Whether a frame is of a plug-in's package."""
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _loaded
