"""Which data it was: the one notion of identity that runs, exports and reports keep and compare.

A data set is known by its files: name, size and SHA-256 of the bytes of each, and by how many rows
they hold. `sha256sum` verifies it. A thread hashes the files while the first pass decodes them, so
they come from the disk once; a hash of SHA instructions costs about 1 ms for 1.5 MB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import files, readers

_CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a data set.

    Attributes:
      name: its path within the data set's folder, partition folders above it included; of a single
        file its own name.
      bytes: its size.
      sha256: of its bytes.
    """

    name: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Identity:
    """A data set's identity; two are of the same data when `sha256` and `rows` are equal.

    Attributes:
      path: as it was given. Another path may hold the same data.
      files: by name.
      rows: how many the schema's reader gives.
    """

    path: str
    files: tuple[File, ...]
    rows: int

    @property
    def sha256(self) -> str:
        """The hash of the only file; of several, the hash of the lines that `sha256sum *` prints.

        For a folder of shards that is `cd rows && sha256sum *.parquet | sha256sum`. The names of
        partition folders, which are values of columns, are in these lines.
        """
        if len(self.files) == 1 and "/" not in self.files[0].name:
            return self.files[0].sha256
        lines = "".join(f"{file.sha256}  {file.name}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def is_same(self, other: Identity) -> bool:
        """Whether both are of the same data, wherever it lies."""
        return (self.sha256, self.rows) == (other.sha256, other.rows)

    def __str__(self) -> str:
        files = "" if len(self.files) == 1 else f"{len(self.files):,} files, "
        return f"{files}{self.rows:,} rows, sha256 {self.sha256[:12]}"

    def to_config(self) -> dict[str, Any]:
        """Plain data that `from_config` takes; the hash of the whole stands in it for readers."""
        return {"sha256": self.sha256, **dataclasses.asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Identity:
        """Reads what `to_config` made."""
        files = tuple(File(**file) for file in config["files"])
        return cls(config["path"], files, config["rows"])


def _name(path: str, file: pathlib.Path) -> str:
    """A file's path within its data set, from the partition folders on that name values of its."""
    top = pathlib.Path(path) if os.path.isdir(path) else file.parent
    top = top.absolute()
    while files.is_partition(top):
        top = top.parent
    return str(file.absolute().relative_to(top))


def _stamp(file: pathlib.Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


def _hashed(file: pathlib.Path, name: str) -> File:
    """Hashes a file.

    Raises:
      DataError: it changed meanwhile.
    """
    before = _stamp(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if _stamp(file) != before:
        raise readers.DataError(
            f"{file}: it changed while it was read. Write files elsewhere and rename them."
        )
    return File(name, before[0], digest)


class Taking:
    """The identity of a data set that is being read; made by `taking`.

    Args:
      schema: of the rows.
      path: a file, a folder or a glob, as for `readers.blocks`.
      targets: whether the rows have labels and the columns that describe them.
    """

    def __init__(self, schema: Schema, path: readers.PathLike, targets: bool = True) -> None:
        self._path = os.fspath(path)
        self._files = [file.path for file in files.files(path)]
        self._stamps = [_stamp(file) for file in self._files]
        self._rows = readers.count_rows(schema, path, targets=targets)
        names = [_name(self._path, file) for file in self._files]
        self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="identity")
        self._hashes = [
            self._pool.submit(_hashed, *pair) for pair in zip(self._files, names, strict=True)
        ]

    def result(self) -> Identity:
        """The identity, once all files are hashed.

        Raises:
          DataError: a file changed meanwhile.
        """
        return Identity(self._path, tuple(each.result() for each in self._hashes), self._rows)

    def check_unchanged(self) -> None:
        """Looks whether the files are still those that were hashed, by size and time of change.

        Raises:
          DataError: one is not.
        """
        for file, stamp in zip(self._files, self._stamps, strict=True):
            with contextlib.suppress(FileNotFoundError):
                if _stamp(file) == stamp:
                    continue
            raise readers.DataError(
                f"{file}: it was replaced or removed while it was in use. Let files stay as they "
                "are until the program has ended."
            )

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def taking(schema: Schema, path: readers.PathLike, *, targets: bool = True) -> Iterator[Taking]:
    """Hashes a data set in a thread while the block reads it; see `Taking`."""
    taken = Taking(schema, path, targets)
    try:
        yield taken
    finally:
        taken.close()


def of(schema: Schema, path: readers.PathLike, *, targets: bool = True) -> Identity:
    """The identity of a data set that nothing else reads just now; see `Taking`."""
    with taking(schema, path, targets=targets) as taken:
        return taken.result()


def differences(before: Mapping[str, Identity], now: Mapping[str, Identity]) -> list[str]:
    """A sentence for each data set that is not what it was when a run began.

    Args:
      before: role in the recipe -> identity.
      now: the same.
    """
    return [
        f"data.{role} ({found.path}) was {before[role]} when the run began, and is {found} now"
        for role, found in now.items()
        if role in before and not found.is_same(before[role])
    ]
