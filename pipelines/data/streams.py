"""Rows that keep coming: from a folder that grows, or from a Redis stream.

Rows have an order that never changes, and `take` gives exactly as many as asked for. So the steps
made of them are the same ones however fast the rows come, and wherever a run was cut.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.readers import Block, DataError

Position = dict[str, Any]

CONSUMER = "online"  # one trainer moves a student, so its group has one consumer
_ENTRIES_AT_ONCE = 1000
_SECONDS = 30  # for Redis to answer


class Stream(Protocol):
    """Rows in order.

    Attributes:
      name: what messages call it.
      position: where that which was taken ends, as plain data; a stream opened with it goes on.
    """

    name: str
    position: Position

    def take(self, count: int) -> Block | None:
        """The next rows, or None while there are not so many."""

    def behind(self) -> int | None:
        """About how many rows wait to be taken; None where that is not known."""

    def keep(self) -> None:
        """Says that `position` was written down, so that what was taken is not needed again."""


class _Buffer:
    """Rows that were read and not yet taken, each with its place."""

    def __init__(self) -> None:
        self._blocks: list[Block] = []
        self._places: list[Any] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, block: Block, places: Sequence[Any]) -> None:
        self._blocks.append(block)
        self._places.extend(places)

    def take(self, count: int) -> tuple[Block, Any]:
        """The first rows, and the place of the last of them."""
        parts: list[Block] = []
        left = count
        while left:
            block = self._blocks.pop(0)
            parts.append({name: values[:left] for name, values in block.items()})
            if readers.num_rows(block) > left:
                self._blocks.insert(0, {name: values[left:] for name, values in block.items()})
            left -= readers.num_rows(parts[-1])
        last = self._places[count - 1]
        del self._places[:count]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, last


def _checked(name: str, position: Position | None, first: Position) -> Position:
    """The position to begin at: the one given, or the first.

    Raises:
      DataError: the one given is of another kind of stream.
    """
    if position and position.keys() != first.keys():
        raise DataError(f"{name}: the position to go on from is of another stream: {position}.")
    return position or first


class FolderStream:
    """The files of a folder, in the order of their names; new ones are found as they appear.

    A file should appear whole, by a rename. One that cannot be read is an error that names it, and
    so is one whose name comes before that of a file that was begun: its rows would be lost. Files
    may be deleted once they were read.

    Args:
      schema: the columns.
      folder: hidden files in it, `_...` and other formats are passed over.
      position: of an earlier stream, to go on from.
      start_after: without a position, files up to this name are passed over.

    Raises:
      DataError: no such folder.
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
        self.position = _checked(self.name, position, {"file": start_after, "rows": 0})
        self._schema = schema
        self._folder = pathlib.Path(folder)
        if not self._folder.is_dir():
            raise DataError(f"{folder}: there should be a folder of rows, and there is none.")
        self._buffer = _Buffer()
        self._known: set[str] | None = None
        self._blocks: Iterator[Block] = iter(())
        self._file = str(self.position["file"])  # the one being read, or that was read last
        self._size = self._row = 0
        self._bytes_read = self._rows_read = 0  # of whole files
        if self.position["rows"] and (self._folder / self._file).exists():
            self._begin(self._file)

    def _begin(self, file: str) -> None:
        path = self._folder / file
        self._file, self._size, self._row = file, path.stat().st_size, 0
        try:
            self._blocks = readers.blocks(self._schema, path)
        except readers.NoRowsError:  # of a quiet minute
            self._blocks = iter(())

    def _unread(self) -> list[str]:
        """The files to come.

        Raises:
          DataError: one appeared too late.
        """
        found = {path.name for path in self._folder.iterdir() if readers.has_format(path)}
        known = found if self._known is None else self._known
        late = sorted(name for name in found - known if name < self._file)
        if late:
            raise DataError(
                f"{self._folder / late[0]}: it appeared when {self._file} had been begun, whose "
                "name comes after, so its rows would be lost. Give it a name that comes last."
            )
        self._known = found
        return sorted(name for name in found if name > self._file)

    def _next_block(self) -> Block | None:
        try:
            return next(self._blocks, None)
        except readers.NoRowsError:
            return None

    def _read(self) -> bool:
        """Reads on; tells whether there was anything to read."""
        block = self._next_block()
        if block is None:
            before = self.position["rows"] if self._file == self.position["file"] else 0
            if self._size and self._row < before:
                raise DataError(
                    f"{self._folder / self._file}: {before} rows of it were read before, and it "
                    f"has {self._row}. A file should stay as it appeared."
                )
            if self._row:
                self._bytes_read += self._size
                self._rows_read += self._row
            files = self._unread()
            if files:
                self._begin(files[0])
            return bool(files)
        first, self._row = self._row, self._row + readers.num_rows(block)
        # What an earlier run took of a file that it did not end.
        taken = self.position["rows"] if self._file == self.position["file"] else 0
        start = min(max(taken - first, 0), readers.num_rows(block))
        self._buffer.add(
            {name: values[start:] for name, values in block.items()},
            [(self._file, row + 1) for row in range(first + start, self._row)],
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
        block, (file, rows) = self._buffer.take(count)
        self.position = {"file": file, "rows": rows}
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


class RedisStream:
    """The entries of a Redis stream, read by a consumer group. An entry is a row, as in a CSV file.

    Each field is a column's value as text, the items of a list between vertical bars. Entries are
    acknowledged when the position behind them was written down, so one that a killed run had got
    and not written down is still pending, and is read again. Acknowledging deletes nothing.

    Args:
      schema: the columns.
      url: of the server, such as redis://127.0.0.1:6379/0.
      key: the stream's.
      group: the consumer group, made where it is not there.
      position: of an earlier stream, to go on from.
      start_after: without a position and a group, entries up to this id are passed over.

    Raises:
      DataError: no Redis there, or one that refuses.
    """

    def __init__(
        self,
        schema: Schema,
        url: str,
        key: str,
        group: str,
        position: Position | None = None,
        *,
        start_after: str = "",
    ) -> None:
        try:
            import redis
        except ImportError:
            raise DataError("A Redis stream needs redis-py: pip install 'qianmo[redis]'.") from None
        self.name = f"Redis stream `{key}`"
        self.position = _checked(self.name, position, {"id": start_after or "0-0"})
        self._lost = (redis.ConnectionError, redis.TimeoutError)
        self._refused = redis.ResponseError
        self._schema = schema
        self._key, self._group = key, group
        self._buffer = _Buffer()
        self._received: list[str] = []  # and not acknowledged, in their order
        self._last = str(self.position["id"])  # of those received
        self._again = True  # read first what was sent before and not acknowledged
        try:
            self._client: Any = redis.Redis.from_url(
                url, protocol=2, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS
            )
            self._join()
        except (redis.RedisError, ValueError) as error:
            raise DataError(f"{self.name}: {error}. Check the address, key and group.") from None

    def _join(self) -> None:
        """Makes the group, and takes over what was sent to it before."""
        try:
            self._client.xgroup_create(self._key, self._group, id=self._last, mkstream=True)
        except self._refused as error:
            if "BUSYGROUP" not in str(error):
                raise
        start = "-"
        while pending := self._client.xpending_range(
            self._key, self._group, min=start, max="+", count=_ENTRIES_AT_ONCE
        ):
            ids = [entry["message_id"].decode() for entry in pending]
            start = f"({ids[-1]}"
            # Of what the position covers, a kill cut off the acknowledgement alone.
            covered = [i for i in ids if _number(i) <= _number(self._last)]
            if covered:
                self._client.xack(self._key, self._group, *covered)
            if ids[len(covered) :]:
                self._client.xclaim(
                    self._key, self._group, CONSUMER, 0, ids[len(covered) :], justid=True
                )

    def _entries(self, count: int) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The next entries; none where there are none, or no connection."""
        try:
            while True:
                answer = self._client.xreadgroup(
                    self._group,
                    CONSUMER,
                    {self._key: self._last if self._again else ">"},
                    count=min(count, _ENTRIES_AT_ONCE),
                )
                found = answer[0][1] if answer else []
                if found or not self._again:
                    return found
                self._again = False
        except self._lost as error:
            # What was sent and did not arrive is pending, and is read again.
            self._again = True
            logging.warning("%s: %s; trying on.", self.name, error)
            return []
        except self._refused as error:
            raise DataError(
                f"{self.name}: {error}. If Redis lost its data, start again with the rows that "
                "were not yet read."
            ) from None

    def _read(self, count: int) -> bool:
        """Reads on; tells whether there was anything to read."""
        entries = self._entries(count)
        if not entries:
            return False
        self._received += [i.decode() for i, _ in entries]
        self._last = self._received[-1]
        there = [(i.decode(), fields) for i, fields in entries if fields]
        if len(there) < len(entries):
            logging.warning(
                "%s: %d entries were deleted before they were read.",
                self.name,
                len(entries) - len(there),
            )
        if there:
            ids = [i for i, _ in there]
            rows = [fields for _, fields in there]
            block = readers.text_block(self._schema, self.name, ids, rows)
            if self._schema.only_domains:
                own = readers.is_of(block[self._schema.domain], self._schema.only_domains)
                places = np.flatnonzero(own)
                block, ids = readers.taken(block, places), [ids[i] for i in places]
            self._buffer.add(block, ids)
        return True

    def take(self, count: int) -> Block | None:
        """The next rows, or None while there are not so many.

        Raises:
          DataError: an entry that does not fit the schema.
        """
        while len(self._buffer) < count:
            if not self._read(count - len(self._buffer)):
                return None
        block, last = self._buffer.take(count)
        self.position = {"id": last}
        return block

    def behind(self) -> int | None:
        """Rows that wait, as Redis counts them."""
        try:
            groups = self._client.xinfo_groups(self._key)
        except (*self._lost, self._refused):
            return None
        lag = next((g.get("lag") for g in groups if g["name"].decode() == self._group), None)
        return None if lag is None else lag + len(self._buffer)

    def keep(self) -> None:
        """Acknowledges the entries up to the position."""
        end = _number(self.position["id"])
        covered = [i for i in self._received if _number(i) <= end]
        try:
            for start in range(0, len(covered), _ENTRIES_AT_ONCE):
                part = covered[start : start + _ENTRIES_AT_ONCE]
                self._client.xack(self._key, self._group, *part)
        except self._lost as error:  # the next checkpoint acknowledges them
            logging.warning("%s: %s; trying on.", self.name, error)
            return
        del self._received[: len(covered)]


def _number(entry: str) -> tuple[int, int]:
    """An entry's id as numbers, which have its order."""
    time, _, place = entry.partition("-")
    return int(time), int(place or 0)
