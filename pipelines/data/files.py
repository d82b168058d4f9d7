"""Paths to the data files that they name."""

from __future__ import annotations

import glob
import hashlib
import os
import pathlib

from qianmo.pipelines.data.errors import DataError

PathLike = str | os.PathLike[str]

EXTENSIONS = (".parquet", ".tfrecord", ".csv", ".csv.gz")


def files(path: PathLike) -> list[pathlib.Path]:
    """The data files at `path`, by name.

    Raises:
      DataError: there is none.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        found = [file for file in pathlib.Path(name).iterdir() if has_format(file)]
        hint = f"The folder holds no file that ends in {', '.join(EXTENSIONS)}."
    elif os.path.isfile(name):
        found = [pathlib.Path(name)]
        hint = ""
    else:
        found = [pathlib.Path(file) for file in glob.glob(name, recursive=True)]
        hint = "There is no such file, folder or glob; check the path."
    if not found:
        raise DataError(f"{name}: no data. {hint}")
    for file in found:
        extension(file)
    return sorted(found)


def has_format(file: pathlib.Path) -> bool:
    """Whether a file's name says that it holds rows; hidden ones and `_...` do not."""
    return file.name.endswith(EXTENSIONS) and not file.name.startswith((".", "_"))


def extension(file: pathlib.Path) -> str:
    """The end of a file's name that tells its format.

    Raises:
      DataError: it tells none.
    """
    for end in EXTENSIONS:
        if file.name.endswith(end):
            return end
    raise DataError(
        f"{file}: its name should end in one of {', '.join(EXTENSIONS)}, which tells the format. "
        "Rename or convert it."
    )


def sha256(path: PathLike) -> str:
    """Hash of the files' bytes, one file after the other in the order of their names."""
    digest = hashlib.sha256()
    for file in files(path):
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
