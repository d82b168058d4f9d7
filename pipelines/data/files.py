"""Paths to the data files that they name.

A path that exists is that file or folder, whatever characters it holds; another one is a glob. Of a
folder the files are read, and those of its partition folders (`dt=2024-05-01/scene=3/`), at any
depth. Names that begin with `.` or `_` are passed over, as are files of other formats.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Mapping

from qianmo.pipelines.data.errors import DataError

PathLike = str | os.PathLike[str]

EXTENSIONS = (".parquet", ".tfrecord", ".csv", ".csv.gz")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_PARTITION = re.compile("([^=]+)=(.*)", re.DOTALL)
# Folders of which not every file is a part: what tells them, and what to do.
_NOT_PLAIN = {
    "_delta_log": "is a Delta table, which lists its valid files in a log",
    ".hoodie": "is a Hudi table, which lists its valid files in a log",
    "_spark_metadata": "was written by a Spark stream, which lists its valid files in a log",
}
_UNFINISHED = "_temporary"  # of a job that is writing, or failed


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file of rows, and what the names of its folders say of each of them.

    Attributes:
      path: the file.
      partitions: column -> its value in all rows of the file, as text; None is a null.
    """

    path: pathlib.Path
    partitions: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path)


def files(path: PathLike) -> list[DataFile]:
    """The data files at `path`, by name.

    Raises:
      DataError: there is none, or it is not clear which rows they hold.
    """
    name = local(os.fspath(path))
    if not name:
        raise DataError("the path of the data is empty; give a file, a folder or a glob.")
    matches = [pathlib.Path(name)] if os.path.exists(name) else _matches(name)
    if not matches:
        hint = "There is no such file, folder or glob; check the path."
        raise DataError(f"{name}: no data. {hint}")
    found: set[pathlib.Path] = set()
    for match in matches:
        found.update(_of_folder(match) if match.is_dir() else [match])
    if not found:
        ends = ", ".join(EXTENSIONS)
        raise DataError(f"{name}: no data. The folder holds no file that ends in {ends}.")
    return _with_partitions(sorted(found))


def _matches(pattern: str) -> list[pathlib.Path]:
    """What a glob names, its first folders taken literally as far as they exist."""
    base, rest = pathlib.Path(), pathlib.Path(pattern)
    while rest.parts and (base / rest.parts[0]).exists():
        base, rest = base / rest.parts[0], pathlib.Path(*rest.parts[1:])
    names = glob.glob(str(rest), root_dir=base, recursive=True)
    found = [base / name for name in names]
    return [path for path in found if rest.name.startswith("_") or not path.name.startswith("_")]


def local(name: str) -> str:
    """The path of a file here, without the scheme file://.

    Raises:
      DataError: a scheme that names another place.
    """
    scheme = re.match("([A-Za-z][A-Za-z0-9+.-]*)://", name)
    if scheme is None:
        return name
    if scheme[1].lower() == "file":
        return urllib.parse.unquote(name[name.find("/", scheme.end()) :])
    raise DataError(
        f"{name}: files are read from this machine alone, by a plain path or file://. Received: "
        f"{scheme[1]}://. Copy the files here, or mount what holds them."
    )


def has_format(file: pathlib.Path) -> bool:
    """Whether a name is that of a file of rows; hidden ones and `_...` are not."""
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


def _of_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    if (folder / _UNFINISHED).exists():
        raise DataError(
            f"{folder}: it holds {_UNFINISHED}, so a job is writing it, or failed. Wait for its "
            "end, or name the files to read by a glob."
        )
    own, partitions = contents(folder)
    yield from own
    for partition in partitions:
        yield from _of_folder(partition)


def contents(folder: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """The files of rows in a folder, or its partition folders, by name.

    Raises:
      DataError: it holds both, or other folders of rows, or not all of its files are rows of it.
    """
    own, partitions, others = [], [], []
    with os.scandir(folder) as scanned:
        entries = sorted(scanned, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        if entry.name in _NOT_PLAIN:
            raise DataError(
                f"{folder}: {_NOT_PLAIN[entry.name]} (it holds {entry.name}). Write its present "
                "rows to a folder of their own, or name the files to read by a glob."
            )
        if entry.name.startswith((".", "_")):
            continue
        if not entry.is_dir():
            own += [path] if has_format(path) else []
        elif _PARTITION.fullmatch(entry.name):
            partitions.append(path)
        elif _holds_rows(path):
            others.append(path)
    if own and (partitions or others):
        raise DataError(
            f"{folder}: it should hold files or folders of rows. Received: both, such as "
            f"{own[0].name} and {(partitions + others)[0].name}. Move the one or the other, or "
            f"name what to read by a glob, such as {folder / '*'}{extension(own[0])}."
        )
    if others:
        raise DataError(
            f"{folder}: rows are in folders of it that are no partitions, such as "
            f"{others[0].name}. Name one, or several by a glob, such as {folder / '*'}."
        )
    return own, partitions


def _holds_rows(folder: pathlib.Path) -> bool:
    """Whether files of rows lie in a folder, at any depth."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "_"))]
    return any(map(has_format, entries)) or any(map(_holds_rows, filter(os.path.isdir, entries)))


def is_partition(folder: pathlib.Path) -> bool:
    """Whether a folder's name is a column's value in the rows below it."""
    return _PARTITION.fullmatch(folder.absolute().name) is not None


def _with_partitions(paths: list[pathlib.Path]) -> list[DataFile]:
    found = []
    for path in paths:
        extension(path)
        partitions: dict[str, str | None] = {}
        for folder in path.absolute().parents:
            pair = _PARTITION.fullmatch(folder.name)
            if pair is None:
                break
            if pair[1] in partitions:
                raise DataError(f"{path}: two of its folders name `{pair[1]}`. Rename one of them.")
            value = None if pair[2] == _NULL_PARTITION else urllib.parse.unquote(pair[2])
            partitions[pair[1]] = value
        found.append(DataFile(path, partitions))
        first = found[0]
        if partitions.keys() != first.partitions.keys():
            raise DataError(
                f"{path}: its folders name {_listed(partitions)}, and those of {first} "
                f"{_listed(first.partitions)}. Files that are read together should have the same "
                "partitions."
            )
    return found


def _listed(partitions: Mapping[str, str | None]) -> str:
    return ", ".join(f"`{name}`" for name in reversed([*partitions])) or "nothing"


def sha256(path: PathLike) -> str:
    """Hash of the files' bytes, one file after the other in the order of their names.

    Values that the folders' names give to rows are hashed before their file.
    """
    digest = hashlib.sha256()
    for file in files(path):
        if file.partitions:
            digest.update(repr(sorted(file.partitions.items())).encode())
        with file.path.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
    return digest.hexdigest()
