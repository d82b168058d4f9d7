"""Rows that keep coming as the entries of a Redis stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.readers import Block, DataError
from qianmo.pipelines.data.streams import Buffer, Position, checked

CONSUMER = "online"  # one trainer moves a student, so its group has one consumer
_ENTRIES_AT_ONCE = 1000
_SECONDS = 30  # for Redis to answer


class RedisStream:
    """The entries of a Redis stream, read by a consumer group. An entry is a row, as in a CSV file.

    Each field is a column's value as text, the items of a list between vertical bars. The position
    tells where reading goes on, whatever the group was sent since: entries after it are read
    again. Those up to it are acknowledged when it was written down, which deletes nothing.

    Redis counts all entries that were ever added, and the position those of them that were read or
    are known to be gone. So entries that were trimmed before they were read are noticed.

    Args:
      schema: the columns.
      url: of the server, such as redis://127.0.0.1:6379/0.
      key: the stream's.
      group: the consumer group, made where it is not there.
      position: of an earlier stream, to go on from. Without one, reading goes on where the group
        stands.
      start_after: without a position and a group, entries up to this id are passed over.
      allow_gaps: whether to go on when entries are gone that were not read; the position's "lost"
        counts them.

    Raises:
      DataError: no Redis of version 7 there, or one that refuses; entries that are gone.
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
        allow_gaps: bool = False,
    ) -> None:
        try:
            import redis
        except ImportError:
            raise DataError("A Redis stream needs redis-py: pip install 'qianmo[redis]'.") from None
        self.name = f"Redis stream `{key}`"
        begin = checked(self.name, position, {"id": start_after or "0-0", "entries": 0, "lost": 0})
        self._lost = (redis.ConnectionError, redis.TimeoutError)
        self._refused = redis.ResponseError
        self._schema = schema
        self._key, self._group = key, group
        self._allow_gaps = allow_gaps
        self._buffer = Buffer()
        self._received: list[str] = []  # and not acknowledged, in their order
        self._again = False  # read first what was sent and did not arrive
        # Of the entry that was received last: its id, how many were read or gone up to it, and how
        # many of those were gone.
        self._last: str = begin["id"]
        self._count: int = begin["entries"]
        self._gone: int = begin["lost"]
        try:
            self._client: Any = redis.Redis.from_url(
                url, protocol=2, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS
            )
            self._join(goes_on=position is not None)
        except (redis.RedisError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.name}: {error}. Check the address, key and group.") from None

    @property
    def position(self) -> Position:
        """The entry of the row that was taken last, and how many there were up to it."""
        return dict(zip(("id", "entries", "lost"), self._taken, strict=True))

    @property
    def place(self) -> str:
        """Where what was taken ends, for messages."""
        return f"entry {self._taken[0]}"

    def _join(self, goes_on: bool) -> None:
        """Makes the group, or puts it where reading goes on.

        Raises:
          DataError: an older Redis, or another stream than that of the position.
        """
        try:
            self._client.xgroup_create(self._key, self._group, id=self._last, mkstream=True)
        except self._refused as error:
            if "BUSYGROUP" not in str(error):
                raise
            if not goes_on:
                self._last = self._groups_end()
        info = self._client.xinfo_stream(self._key)
        if "entries-added" not in info:
            version = self._client.info("server")["redis_version"]
            raise DataError(
                f"{self.name}: Redis should be of version 7.0 or newer, which counts a stream's "
                f"entries. Received: {version}"
            )
        if not goes_on:
            self._count = self._entries_up_to(self._last, info)
        elif info["entries-added"] < self._count:
            raise DataError(
                f"{self.name}: {self._count:,} entries of it were read, and it has had "
                f"{info['entries-added']:,}. Redis lost its data, or another stream has its key: "
                "start again with what was not read."
            )
        self._taken = self._last, self._count, self._gone
        self._client.xgroup_setid(self._key, self._group, self._last)
        self._acknowledge([entry["message_id"].decode() for entry in self._pending()])

    def _groups_end(self) -> str:
        """The last entry that the group was sent, or the one before the first not acknowledged."""
        if pending := self._pending(1):
            time, place = _number(pending[0]["message_id"].decode())
            return f"{time}-{place - 1}" if place else f"{time - 1}-{2**64 - 1}"
        groups = self._client.xinfo_groups(self._key)
        return next(
            str(group["last-delivered-id"].decode())
            for group in groups
            if group["name"].decode() == self._group
        )

    def _pending(self, most: int = 2**62) -> list[dict[str, Any]]:
        """Entries that were sent and not acknowledged."""
        found: list[dict[str, Any]] = []
        start = "-"
        while len(found) < most and (
            page := self._client.xpending_range(
                self._key, self._group, min=start, max="+", count=min(most, _ENTRIES_AT_ONCE)
            )
        ):
            found += page
            start = f"({found[-1]['message_id'].decode()}"
        return found

    def _acknowledge(self, entries: Sequence[str]) -> None:
        for start in range(0, len(entries), _ENTRIES_AT_ONCE):
            part = entries[start : start + _ENTRIES_AT_ONCE]
            self._client.xack(self._key, self._group, *part)

    def _entries_up_to(self, entry: str, info: Any) -> int:
        """How many entries were ever added up to this one."""
        count = _removed(info)
        if not _starts_after(info, entry):
            start = "-"
            while page := self._client.xrange(self._key, start, entry, _ENTRIES_AT_ONCE):
                count += len(page)
                start = f"({page[-1][0].decode()}"
        return count

    def _entries(self, count: int) -> tuple[list[Any], Any]:
        """The next entries, and what Redis says of the stream at that moment.

        No entries where there are none, or no connection.

        Raises:
          DataError: Redis refuses.
        """
        try:
            while True:
                with self._client.pipeline(transaction=True) as both:
                    begin = {self._key: self._last if self._again else ">"}
                    both.xreadgroup(self._group, CONSUMER, begin, count=count)
                    both.xinfo_stream(self._key)
                    answer, info = both.execute()
                entries = answer[0][1] if answer else []
                if entries or not self._again:
                    return entries, info
                self._again = False
        except self._lost as error:
            # What was sent and did not arrive is pending, and is read again.
            self._again = True
            logging.warning("%s: %s; trying on.", self.name, error)
            return [], None
        except self._refused as error:
            raise DataError(
                f"{self.name}: {error}. If Redis lost its data, start again with the rows that "
                "were not yet read."
            ) from None

    def _account(self, entries: Sequence[Any], info: Any, at_end: bool) -> list[int]:
        """How many entries were read or are gone, up to each of those just received.

        Raises:
          DataError: entries are gone, and may not be.
        """
        is_there = np.array([bool(fields) for _, fields in entries], np.int64)
        gone, counted = 0, np.ones_like(is_there)
        if _starts_after(info, self._last):
            # Nothing that was read is in the stream, so what else was removed was not read.
            gone, counted = max(0, _removed(info) - self._count), is_there
        if gone:
            self._miss(gone, info)
        counts = [self._count + gone + int(count) for count in np.cumsum(counted)]
        deleted = int((counted - is_there).sum())
        self._count = counts[-1] if counts else self._count + gone
        if at_end:  # all that were ever added are accounted for
            deleted += info["entries-added"] - self._count
            self._count = info["entries-added"]
            counts[-1:] = [self._count] * bool(counts)
        if deleted:
            logging.warning(
                "%s: %d entries were deleted before they were read.", self.name, deleted
            )
        return counts

    def _miss(self, gone: int, info: Any) -> None:
        first = _first(info)
        before = f" and before {first}" if first else ""
        what = f"{gone:,} entries after {self._last}{before} were removed before they were read"
        if not self._allow_gaps:
            raise DataError(
                f"{self.name}: {what}. Let the stream keep more (XTRIM, MAXLEN), or go on without "
                "them by --allow_gaps, which counts them."
            )
        logging.warning("%s: %s.", self.name, what)
        self._gone += gone

    def _read(self, count: int) -> bool:
        """Reads on; tells whether there was anything to read.

        Raises:
          DataError: an entry that does not fit the schema, or entries that are gone.
        """
        asked = min(count, _ENTRIES_AT_ONCE)
        entries, info = self._entries(asked)
        if info is None:
            return False
        at_end = not self._again and len(entries) < asked
        counts = self._account(entries, info, at_end)
        if not entries:
            return False
        ids = [entry.decode() for entry, _ in entries]
        self._received += ids
        self._last = ids[-1]
        ends = [(i, n, self._gone) for i, n in zip(ids, counts, strict=True)]
        there = [row for row, (_, fields) in enumerate(entries) if fields]
        if there:
            ids, ends = [ids[row] for row in there], [ends[row] for row in there]
            rows = [entries[row][1] for row in there]
            block = readers.text_block(self._schema, self.name, ids, rows)
            if self._schema.only_domains:
                own = readers.is_of(block[self._schema.domain], self._schema.only_domains)
                block = readers.taken(block, np.flatnonzero(own))
                ends = [end for end, is_own in zip(ends, own, strict=True) if is_own]
            self._buffer.add(block, ends)
        return True

    def take(self, count: int) -> Block | None:
        """The next rows, or None while there are not so many.

        Raises:
          DataError: an entry that does not fit the schema, or entries that are gone.
        """
        while len(self._buffer) < count:
            if not self._read(count - len(self._buffer)):
                return None
        block, self._taken = self._buffer.take(count)
        return block

    def behind(self) -> int | None:
        """Rows that wait, as Redis counts them."""
        try:
            info = self._client.xinfo_stream(self._key)
        except (*self._lost, self._refused):
            return None
        return int(info["entries-added"]) - self._count + len(self._buffer)

    def keep(self) -> None:
        """Acknowledges the entries up to the position."""
        end = _number(self._taken[0])
        covered = [i for i in self._received if _number(i) <= end]
        try:
            self._acknowledge(covered)
        except self._lost as error:  # the next checkpoint acknowledges them
            logging.warning("%s: %s; trying on.", self.name, error)
            return
        del self._received[: len(covered)]


def _first(info: Any) -> str:
    """The first entry that is in a stream; empty where there is none."""
    entry = info["first-entry"]
    return entry[0].decode() if entry else ""


def _removed(info: Any) -> int:
    """How many of the entries that were ever added are no longer in a stream."""
    return int(info["entries-added"]) - int(info["length"])


def _starts_after(info: Any, entry: str) -> bool:
    """Whether a stream holds no entry up to this one."""
    first = _first(info)
    return not first or _number(first) > _number(entry)


def _number(entry: str) -> tuple[int, int]:
    """An entry's id as numbers, which have its order."""
    time, _, place = entry.partition("-")
    return int(time), int(place or 0)
