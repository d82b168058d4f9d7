"""Loads embedding versions from their files into a Redis, from which the op reads them as well.

ops/cc/redis_source.h describes the keys, and redis_client.h the URL.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pathlib
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from qianmo.export import embedding_shards as shards
from qianmo.export.embedding_changes import Stored, contents
from qianmo.export.embedding_shards import StoreError
from qianmo.export.redis_keys import Redis

BLOCK_ROWS = 1 << 14
_DELETED_KEYS = 5000


class _Block(NamedTuple):
    """Rows that are written at once: those from `first` on of a shard; shard -1: new ids."""

    table: str
    shard: int
    first: int
    rows: int

    @property
    def mark(self) -> str:
        return f"{self.table}/{self.shard}/{self.first}"


def versions(redis: Redis) -> dict[int, int]:
    """The versions that are whole, each with its space."""
    lines = (line.split() for line in redis.text("VERSIONS").splitlines())
    return {int(version): int(space) for version, space in lines}


@contextlib.contextmanager
def _told(redis: Redis) -> Iterator[None]:
    """Says what Redis refused."""
    try:
        yield
    except redis.errors as error:
        what = str(error).rstrip(".")
        raise StoreError(f"{redis.name}: {what}. What is loaded stays; load again.") from error


def delete(url: str, version: int) -> int:
    """Deletes a version; returns how many keys it had. No graph may read it any more.

    Raises:
      StoreError: it is the one that is published, or Redis refuses.
    """
    redis = Redis(url)
    with _told(redis):
        if redis.text("CURRENT") == str(version):
            raise StoreError(
                f"{redis.name}: version {version} is published; publish another one first."
            )
        return _delete(redis, version)


def _delete(redis: Redis, version: int) -> int:
    left = "".join(f"{v} {space}\n" for v, space in versions(redis).items() if v != version)
    redis.client.set(redis.key("VERSIONS"), left)
    deleted = 0
    for node in redis.nodes:
        keys = node.scan_iter(match=redis.key(version, "*"), count=_DELETED_KEYS)
        while part := list(itertools.islice(keys, _DELETED_KEYS)):
            pipeline = node.pipeline(transaction=False)
            for key in part:
                pipeline.unlink(key)
            deleted += sum(pipeline.execute())
    return deleted


def _blocks(stored: Stored) -> Iterator[_Block]:
    name = stored.table.name
    for k, shard in enumerate(stored.shards):
        for first in range(0, len(shard.rows), BLOCK_ROWS):
            yield _Block(name, k, first, min(BLOCK_ROWS, len(shard.rows) - first))
    if stored.changed is not None:
        added = int((~stored.base_rows(stored.changed.ids())[1]).sum())
        if added:
            yield _Block(name, -1, 0, added)


class _Source:
    """A version's files."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.tables = contents(folder)
        self.blocks = [block for stored in self.tables.values() for block in _blocks(stored)]
        self._ids = functools.lru_cache(maxsize=8)(
            lambda table, shard: self.tables[table].shards[shard].ids()
        )

    def rows(self, block: _Block) -> tuple[np.ndarray, np.ndarray]:
        """Ids and encoded rows of a block, changes in place."""
        stored = self.tables[block.table]
        changed = stored.changed
        if block.shard < 0:
            assert changed is not None
            ids = changed.ids()
            new = ~stored.base_rows(ids)[1]
            return ids[new], np.array(changed.rows[new])
        span = slice(block.first, block.first + block.rows)
        rows = np.array(stored.shards[block.shard].rows[span])
        if stored.table.hashed:
            ids = self._ids(block.table, block.shard)[span]
        else:
            ids = np.arange(span.start, span.stop) + block.shard * stored.shard_rows
        if changed is not None:
            place = changed.find(ids)
            rows[place >= 0] = changed.rows[place[place >= 0]]
        return ids, rows

    def manifest(self, version: int, space: int) -> str:
        """What the op reads: the manifest without the files, which it needs not know."""
        lines = ["qianmo embeddings 1", f"version {version} space {space}"]
        for stored in self.tables.values():
            words = shards.table_line(stored.table, 0).split(" ")
            words[7] = str(sum(b.rows for b in self.blocks if b.table == stored.table.name))
            lines.append(" ".join(words))
        text = "\n".join(lines) + "\n"
        return f"{text}crc {zlib.crc32(text.encode()):08x}\n"


def load(
    store: str | os.PathLike[str],
    version: int,
    url: str,
    *,
    threads: int = 4,
    publish: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> int:
    """Loads one version and, once all of its rows are there, makes it the one that is read.

    What was written is marked in Redis, so that a load that was killed goes on where it stopped. A
    version that is there already is counted, and written again only if rows are missing.

    Args:
      store: folder of the versions.
      version: the one to load.
      url: of the Redis, as `EmbeddingStore` takes it.
      threads: that write side by side.
      publish: whether it becomes the one that is read. The first one does in any case.
      progress: called with the rows that are there and those that there should be.

    Returns:
      The number of rows that were written.

    Raises:
      StoreError: the version is not there or damaged, or another one of this number is in Redis;
        Redis refuses, or does not keep rows. What was read stays.
    """
    folder = pathlib.Path(store) / str(version)
    shards.verify(folder)
    redis = Redis(url)
    with _told(redis):
        return _load(redis, folder, version, threads, publish, progress)


def holds(url: str, store: str | os.PathLike[str], version: int) -> bool:
    """Whether Redis was loaded with this very version; its rows are not counted."""
    redis = Redis(url)
    with _told(redis):
        content = _checksum(pathlib.Path(store) / str(version))
        return version in versions(redis) and redis.text(version, "CONTENT") == content


def _checksum(folder: pathlib.Path) -> str:
    """The manifest's, which is one of all rows."""
    return (folder / shards.MANIFEST).read_text()[-9:-1]


def _check_policy(redis: Redis) -> None:
    for node in redis.nodes:
        memory = node.info("memory")
        policy = memory.get("maxmemory_policy", "noeviction")
        if memory.get("maxmemory") and policy != "noeviction":
            raise StoreError(
                f"{redis.name}: `maxmemory-policy` should be noeviction, or it deletes rows when "
                f"memory is short. Received: {policy}"
            )


def _load(
    redis: Redis,
    folder: pathlib.Path,
    version: int,
    threads: int,
    publish: bool,
    progress: Callable[[int, int], object],
) -> int:
    _check_policy(redis)
    source, space = _Source(folder), shards.space(folder)
    content = _checksum(folder)
    total = sum(block.rows for block in source.blocks)
    loaded = redis.key(version, "LOADED")
    blocks = source.blocks

    def pairs(block: _Block) -> tuple[list[bytes], list[bytes]]:
        ids, rows = source.rows(block)
        start = redis.key(version, block.table, "").encode()
        data, size = rows.tobytes(), rows.shape[1]
        values = [data[i : i + size] for i in range(0, len(data), size)]
        return [b"%b%d" % (start, i) for i in ids.tolist()], values

    def write(block: _Block) -> int:
        keys, values = pairs(block)
        redis.write(keys, values)
        redis.client.sadd(loaded, block.mark)
        return len(keys)

    def count(block: _Block) -> int:
        return redis.count(pairs(block)[0])

    def all_there() -> bool:
        return sum(pool.map(count, source.blocks)) == total

    with ThreadPoolExecutor(threads) as pool:
        there = redis.text(version, "CONTENT")
        if there != content:
            if version in versions(redis):
                # Its checksum may be lost, as by eviction; its rows tell what it is.
                if there or not all(pool.map(lambda block: redis.hold(*pairs(block)), blocks)):
                    raise StoreError(
                        f"{redis.name} holds another version {version}, whose "
                        f"{'checksum' if there else 'rows'} differ from those of {folder}. Give "
                        "the new one another number; or load and publish another one, and delete "
                        f"that one by --delete={version}."
                    )
            elif there:  # a load that was given up
                _delete(redis, version)
            redis.client.set(redis.key(version, "CONTENT"), content)
        written = 0
        if version not in versions(redis) or not all_there():
            marks = {mark.decode() for mark in redis.client.smembers(loaded)}
            blocks = [block for block in source.blocks if block.mark not in marks]
            done = total - sum(block.rows for block in blocks)
            progress(done, total)
            for rows in _each(pool, write, blocks):
                written += rows
                progress(done + written, total)
            redis.client.delete(loaded)
            missing = {
                name: sum(b.rows for b in own) - sum(pool.map(count, own))
                for name in source.tables
                if (own := [b for b in source.blocks if b.table == name])
            }
            if any(missing.values()):
                raise StoreError(
                    f"{redis.name}: Redis has lost rows of version {version} while it was loaded: "
                    f"{missing}. Load it again."
                )
        redis.client.set(redis.key(version, "MANIFEST"), source.manifest(version, space))
        if version not in versions(redis):
            redis.client.append(redis.key("VERSIONS"), f"{version} {space}\n")
    if publish or not redis.text("CURRENT"):
        redis.client.set(redis.key("CURRENT"), version)
    return written


def _each(
    pool: ThreadPoolExecutor, write: Callable[[_Block], int], blocks: Sequence[_Block]
) -> Iterator[int]:
    """Writes the blocks; after a failure those that wait are not begun."""
    stop = threading.Event()

    def unless_stopped(block: _Block) -> int:
        return 0 if stop.is_set() else write(block)

    try:
        yield from pool.map(unless_stopped, blocks)
    finally:
        stop.set()
