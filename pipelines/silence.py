"""Keeps the lines of TensorFlow and the libraries beneath it off the terminal."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib.abc
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_FATAL_ALONE = "3"
_environment: list[str | None] = []  # the log level before `silence`


def silence() -> None:
    """Hides what TensorFlow logs, below what is fatal, and Python's warnings.

    It must be called before TensorFlow is imported. Child processes inherit the log level; one that
    imports TensorFlow anew should call this too.
    """
    _environment[:] = [os.environ.get(_LOG_LEVEL)]
    os.environ[_LOG_LEVEL] = _FATAL_ALONE
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _QuietImport())


def lift() -> None:
    """Gives the environment back its log level, for a program that takes this one's place."""
    for level in _environment:
        os.environ.pop(_LOG_LEVEL)
        if level is not None:
            os.environ[_LOG_LEVEL] = level


class _QuietImport(importlib.abc.MetaPathFinder):
    """Imports TensorFlow with the standard error stream held back.

    While they are loaded, its libraries write lines that heed no log level.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = functools.partial(_held_back, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def _held_back(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    with _stderr_held_back():
        execute(module)


@contextlib.contextmanager
def _stderr_held_back() -> Iterator[None]:
    """Keeps what is written to file descriptor 2, and writes it after all if there is an error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    held = os.memfd_create("stderr")
    os.dup2(held, 2)
    faulthandler.enable(stderr)  # a crash still tells where it was
    failed = True
    try:
        yield
        failed = False
    except KeyboardInterrupt:
        failed = False
        raise
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        faulthandler.enable(2)
        if failed:
            os.lseek(held, 0, os.SEEK_SET)
            os.write(2, os.read(held, 1 << 20))
        os.close(stderr)
        os.close(held)
