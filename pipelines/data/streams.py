"""Rows that keep coming, such as from a folder that grows; `redis_stream` has the others.

Rows have an order that never changes, and `take` gives exactly as many as asked for. So the steps
made of them are the same ones however fast the rows come, and wherever a run was cut.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.files import contents, sha256
from qianmo.pipelines.data.readers import Block, DataError

Position = dict[str, Any]


class Stream(Protocol):
    """Rows in order.

    Attributes:
      name: what messages call it.
    """

    name: str

    @property
    def position(self) -> Position:
        """Where what was taken ends, as plain data; a stream opened with it goes on."""

    @property
    def place(self) -> str:
        """Where what was taken ends, for messages."""

    def take(self, count: int) -> Block | None:
        """The next rows, or None while there are not so many."""

    def behind(self) -> int | None:
        """About how many rows wait to be taken; None where that is not known."""

    def keep(self) -> None:
        """Says that `position` was written down, so that what was taken is not needed again."""


class Buffer:
    """Rows that were read and not yet taken, each with where it ends in the stream."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._ends: list[Any] = []

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, block: Block, ends: Sequence[Any]) -> None:
        """Adds rows."""
        self._blocks.append(block)
        self._ends.extend(ends)

    @property
    def first_end(self) -> Any:
        """Where the first row ends; None where there is none."""
        return self._ends[0] if self._ends else None

    def take(self, count: int) -> tuple[Block, Any]:
        """The first rows, and where the last of them ends."""
        parts: list[Block] = []
        left = count
        while left:
            block = self._blocks.pop(0)
            parts.append({name: values[:left] for name, values in block.items()})
            if readers.num_rows(block) > left:
                self._blocks.insert(0, {name: values[left:] for name, values in block.items()})
            left -= readers.num_rows(parts[-1])
        last = self._ends[count - 1]
        del self._ends[:count]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, last


def checked(name: str, position: Position | None, first: Position) -> Position:
    """The position to begin at: the one given, or the first.

    Raises:
      DataError: the one given is of another kind of stream.
    """
    if position and position.keys() != first.keys():
        raise DataError(f"{name}: the position to go on from is of another stream: {position}.")
    return position or first


class FolderStream:
    """The files of a folder, in the order of their names; new ones are found as they appear.

    A file should appear whole, by a rename, and stay as it is. Its name should sort after those of
    all files that were begun: the position holds the names that are there, so that a file which
    appears too late is refused, also when it appeared while the program was down. To read it
    nevertheless would make the order of rows depend on when files appear. Files may be deleted once
    all of their rows were taken.

    Args:
      schema: the columns.
      folder: hidden files in it, `_...` and other formats are passed over.
      position: of an earlier stream, to go on from.
      start_after: without a position, files up to this name are passed over.

    Raises:
      DataError: no such folder, or one of partition folders; a file that appeared too late, changed
        or vanished since the position was written down.
    """

    def __init__(
        self,
        schema: Schema,
        folder: str | pathlib.Path,
        position: Position | None = None,
        *,
        start_after: str = "",
    ) -> None:
        self.name = str(folder)
        first = {
            "file": start_after,  # the one of the row that was taken last
            "sha256": "",  # of its bytes
            "rows": 0,  # how many of its rows were taken
            "ended": True,  # whether that is known to be all
            "passed": [],  # the names up to it that are in the folder
            "start_after": start_after,
        }
        begin = checked(self.name, position, first)
        self._schema = schema
        self._folder = pathlib.Path(folder)
        if not self._folder.is_dir():
            raise DataError(f"{folder}: there should be a folder of rows, and there is none.")
        self._buffer = Buffer()
        self._blocks: Iterator[Block] = iter(())
        self._start_after: str = begin["start_after"]
        self._known: set[str] = set(begin["passed"])
        self._taken: tuple[str, str, int] = (begin["file"], begin["sha256"], begin["rows"])
        self._file: str = begin["file"]  # the one being read, or that was read last
        self._size = self._row = 0
        self._sha256 = ""
        self._skip = 0  # rows of it that an earlier run took
        self._at_end = True
        self._bytes_read = self._rows_read = 0  # of whole files
        self._unread()
        if not begin["ended"]:
            self._resume(begin)
        elif begin["rows"] and (path := self._folder / begin["file"]).exists():
            self._check_same(begin, sha256(path))

    @property
    def position(self) -> Position:
        """Where what was taken ends."""
        file, content, rows = self._taken
        waiting = self._buffer.first_end
        ended = waiting[0] != file if waiting else self._at_end or self._file != file
        return {
            "file": file,
            "sha256": content,
            "rows": rows,
            "ended": ended,
            "passed": sorted(name for name in self._known if name <= file),
            "start_after": self._start_after,
        }

    @property
    def place(self) -> str:
        """Where what was taken ends, for messages."""
        file, _, rows = self._taken
        return f"row {rows} of {file}"

    def _resume(self, begin: Position) -> None:
        """Goes on within a file.

        Raises:
          DataError: it is not there as it was.
        """
        path = self._folder / self._file
        if not path.exists():
            raise DataError(
                f"{path}: {begin['rows']} rows of it were taken, it may have held more, and it is "
                "gone. Put it back."
            )
        self._begin(self._file)
        self._skip = begin["rows"]
        self._check_same(begin, self._sha256)

    def _check_same(self, begin: Position, content: str) -> None:
        """Refuses another file under the name of that of the row that was taken last.

        Raises:
          DataError: its bytes differ.
        """
        if content != begin["sha256"]:
            raise DataError(
                f"{self._folder / begin['file']}: it holds other bytes than when {begin['rows']} "
                "of its rows were taken. A file should stay as it appeared: give new rows a name "
                "that comes last."
            )

    def _begin(self, file: str) -> None:
        path = self._folder / file
        self._file, self._size, self._row = file, path.stat().st_size, 0
        self._sha256 = sha256(path)
        self._skip, self._at_end = 0, False
        try:
            self._blocks = readers.blocks(self._schema, path)
        except readers.NoRowsError:  # of a quiet minute
            self._blocks = iter(())

    def _unread(self) -> list[str]:
        """The files to come.

        Raises:
          DataError: one appeared too late, or the folder is no folder of files.
        """
        try:
            own, partitions = contents(self._folder)
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be listed: {error}") from error
        if partitions:
            raise DataError(
                f"{self._folder}: files are followed in one folder. Received: partition folders, "
                f"such as {partitions[0].name}. Follow one of them, or move files as they come."
            )
        names = {path.name for path in own}
        late = sorted(name for name in names - self._known if self._start_after < name < self._file)
        if late:
            raise DataError(
                f"{self._folder / late[0]}: it appeared when {self._file} had been begun, whose "
                "name comes after, so its rows would be lost. Give it a name that comes last."
            )
        self._known = names
        return sorted(name for name in names if name > self._file)

    def _next_block(self) -> Block | None:
        try:
            return next(self._blocks, None)
        except readers.NoRowsError:
            return None

    def _read(self) -> bool:
        """Reads on; tells whether there was anything to read."""
        block = self._next_block()
        if block is None:
            if self._row and not self._at_end:
                self._bytes_read += self._size
                self._rows_read += self._row
            self._at_end = True
            to_come = self._unread()
            if to_come:
                self._begin(to_come[0])
            return bool(to_come)
        first, self._row = self._row, self._row + readers.num_rows(block)
        start = min(max(self._skip - first, 0), readers.num_rows(block))
        self._buffer.add(
            {name: values[start:] for name, values in block.items()},
            [(self._file, self._sha256, row + 1) for row in range(first + start, self._row)],
        )
        return True

    def take(self, count: int) -> Block | None:
        """The next rows, or None while there are not so many.

        Raises:
          DataError: a file that cannot be read, or appeared too late.
        """
        while len(self._buffer) < count:
            if not self._read():
                return None
        block, self._taken = self._buffer.take(count)
        return block

    def behind(self) -> int | None:
        """Rows that wait, by the bytes of their files and those of a row so far."""
        if not self._bytes_read:
            return None
        size = sum((self._folder / name).stat().st_size for name in self._unread())
        rows_a_byte = self._rows_read / self._bytes_read
        present = max(0, round(self._size * rows_a_byte) - self._row)
        return len(self._buffer) + present + round(size * rows_a_byte)

    def keep(self) -> None:
        """Nothing: files are not ours."""
