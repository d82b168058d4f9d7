"""Paths that are given to write to or to load from, looked at before any work is done.

TensorFlow reads a checkpoint's path, and a SavedModel's, as a pattern: a folder named `a[1]` could
be written, and never read again; of one named `a*`, old checkpoints of other folders would be
deleted.
"""

from __future__ import annotations

import errno
import os
import pathlib
import tempfile

PATTERN = "*?[\\"


def model_path_fault(path: str) -> str | None:
    """Why a model or its versions cannot be kept at a path; None if they can."""
    found = [character for character in PATTERN if character in path]
    if found:
        return (
            f"TensorFlow takes `{found[0]}` in a path for a pattern. Give another path, or one "
            "relative to the folder of that name."
        )
    if "://" in path:
        return "models are kept on local disks. Give a path there."
    if path.startswith("~"):
        return "the shell left `~` as it is. Write $HOME instead."
    return None


def check_model_path(path: str | os.PathLike[str]) -> None:
    """Looks whether a model or its versions can be kept at a path.

    Raises:
      ValueError: they cannot.
    """
    if fault := model_path_fault(os.fspath(path)):
        raise ValueError(f"{os.fspath(path)}: {fault}")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Looks whether a folder that is there, or is to be made, can be written to.

    Raises:
      OSError: it cannot; it has the number of what is wrong, and the path.
    """
    folder = pathlib.Path(path).absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def check_file(path: str | os.PathLike[str]) -> None:
    """Looks whether a file that is there, or is to be made, can be written.

    Raises:
      OSError: it cannot.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    try:
        check_folder(pathlib.Path(path).absolute().parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None
