"""Loads embedding versions from their files into a Redis, from which the op reads them as well.

ops/cc/redis_source.h describes the keys, and redis_client.h the URL.
"""

from __future__ import annotations

import binascii
import functools
import itertools
import os
import pathlib
import re
import threading
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from qianmo.export import embedding_shards as shards
from qianmo.export.embedding_changes import Stored, contents
from qianmo.export.embedding_shards import StoreError

BLOCK_ROWS = 1 << 14
_SLOTS = 16384
_KEYS = 512  # of a command
_DELETED_KEYS = 5000
_TIMEOUT_SECONDS = 30.0
PASSWORD = "QIANMO_REDIS_PASSWORD"


class _Block(NamedTuple):
    """Rows that are written at once: those from `first` on of a shard; shard -1: new ids."""

    table: str
    shard: int
    first: int
    rows: int

    @property
    def mark(self) -> str:
        return f"{self.table}/{self.shard}/{self.first}"


def _pack(*words: bytes) -> bytes:
    """A command as it goes over the wire."""
    each = b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])
    return b"*%d\r\n%b" % (len(words), each)


class Redis:
    """The keys of one prefix in a Redis or a Redis Cluster.

    Args:
      url: as `EmbeddingStore` takes it. The password is in the environment.

    Raises:
      StoreError: the package redis is missing, it is no such URL, or nobody answers.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ModuleNotFoundError:
            raise StoreError(
                "Loading embeddings into Redis needs the package redis. "
                "Install it: pip install 'qianmo[redis]'"
            ) from None
        self.errors: tuple[type[Exception], ...] = (redis.RedisError, OSError)
        parts = urllib.parse.urlsplit(url)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        addresses = [host.rpartition(":")[::2] for host in hosts]
        self.prefix = parts.path[1:]
        schemes = ("redis", "rediss", "redis+cluster", "rediss+cluster")
        if parts.scheme not in schemes or not all(p.isdigit() for _, p in addresses):
            raise StoreError(
                f"A Redis URL should be SCHEME://HOST:PORT/PREFIX, the scheme one of {schemes}. "
                f"Received: {parts.scheme}://{hosts}"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", self.prefix):
            raise StoreError(
                "After the address of a Redis and a slash should stand the prefix of its keys, "
                f"letters, digits and any of _-.:. Received: {self.prefix!r}"
            )
        options = dict(urllib.parse.parse_qsl(parts.query))
        access: dict[str, Any] = {
            "username": parts.username,
            "password": os.environ.get(PASSWORD) or None,
            "socket_timeout": _TIMEOUT_SECONDS,
        }
        if parts.scheme.startswith("rediss"):
            access |= {"ssl": True, "ssl_ca_certs": options.get("ca")}
        nodes = [(host.strip("[]"), int(port)) for host, port in addresses]
        self.name = f"{parts.scheme}://{','.join(hosts)}/{self.prefix}"
        # The client's own types are unions with those of its asynchronous twin.
        self.client: Any
        self._node_of_slot = np.zeros(_SLOTS, np.int64)
        try:
            if parts.scheme.endswith("+cluster"):
                start = [redis.cluster.ClusterNode(*node) for node in nodes]
                self.client = redis.cluster.RedisCluster(startup_nodes=start, **access)
                primaries = self.client.get_primaries()
                self.nodes = [self.client.get_redis_connection(node) for node in primaries]
                places = {(node.host, node.port): place for place, node in enumerate(primaries)}
                for (first, last), who in self.client.cluster_slots().items():
                    self._node_of_slot[first : last + 1] = places[who["primary"]]
            else:
                self.client = redis.Redis(*nodes[0], **access)
                self.nodes = [self.client]
            self.client.ping()
        except self.errors as error:
            raise StoreError(f"{self.name}: {error}") from error

    def key(self, *parts: object) -> str:
        """A key of the prefix."""
        return ":".join([self.prefix, *map(str, parts)])

    def ask(self, commands: Sequence[tuple[bytes, bytes]]) -> list[Any]:
        """The answers to packed commands, each with a key of its, in one trip to each node."""
        slots = [binascii.crc_hqx(key, 0) % _SLOTS for _, key in commands]
        owners = self._node_of_slot[slots]
        answers: list[Any] = []
        for place in np.unique(owners):
            own = np.flatnonzero(owners == place).tolist()
            # A pipeline of the client takes five times as long to do the same.
            pool = self.nodes[place].connection_pool
            connection = pool.get_connection()
            try:
                connection.send_packed_command([b"".join([commands[i][0] for i in own])])
                answers += [connection.read_response() for _ in own]
            except BaseException:
                connection.disconnect()  # its answers must not be taken for others
                raise
            finally:
                pool.release(connection)
        return answers

    def _parts(self, count: int) -> Iterator[slice]:
        # Keys of a command must be of one slot, where there are slots.
        size = _KEYS if len(self.nodes) == 1 else 1
        return (slice(start, start + size) for start in range(0, count, size))

    def write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Sets keys to values."""
        pairs = list(zip(keys, values, strict=True))
        parts = [itertools.chain.from_iterable(pairs[p]) for p in self._parts(len(keys))]
        firsts = (keys[p.start] for p in self._parts(len(keys)))
        self.ask([(_pack(b"MSET", *p), key) for p, key in zip(parts, firsts, strict=True)])

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the keys there are."""
        parts = (keys[p] for p in self._parts(len(keys)))
        return sum(self.ask([(_pack(b"EXISTS", *part), part[0]) for part in parts]))

    def text(self, *parts: object) -> str:
        """The value of a key of the prefix; empty if there is none."""
        value = self.client.get(self.key(*parts))
        return "" if value is None else value.decode()


def versions(redis: Redis) -> dict[int, int]:
    """The versions that are whole, each with its space."""
    lines = (line.split() for line in redis.text("VERSIONS").splitlines())
    return {int(version): int(space) for version, space in lines}


def delete(redis: Redis, version: int) -> int:
    """Deletes a version; returns how many keys it had. No graph may read it any more.

    Raises:
      StoreError: it is the one that is published.
    """
    if redis.text("CURRENT") == str(version):
        raise StoreError(
            f"{redis.name}: version {version} is published; publish another one first."
        )
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
    try:
        return _load(redis, folder, version, threads, publish, progress)
    except redis.errors as error:
        what = str(error).rstrip(".")
        raise StoreError(f"{redis.name}: {what}. What is loaded stays; load again.") from error


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
    # The manifest's checksum is one of all rows.
    content = (folder / shards.MANIFEST).read_text()[-9:-1]
    there = redis.text(version, "CONTENT")
    if there != content:
        if version in versions(redis):
            raise StoreError(
                f"{redis.name} holds another version {version}, of checksum {there} and not "
                f"{content}. Give the new one another number, or delete that one."
            )
        if there:  # a load that was given up
            delete(redis, version)
        redis.client.set(redis.key(version, "CONTENT"), content)
    total = sum(block.rows for block in source.blocks)
    loaded = redis.key(version, "LOADED")
    blocks = source.blocks

    def keys(block: _Block, ids: np.ndarray) -> list[bytes]:
        start = redis.key(version, block.table, "").encode()
        return [b"%b%d" % (start, i) for i in ids.tolist()]

    def write(block: _Block) -> int:
        ids, rows = source.rows(block)
        data, size = rows.tobytes(), rows.shape[1]
        values = [data[i : i + size] for i in range(0, len(data), size)]
        redis.write(keys(block, ids), values)
        redis.client.sadd(loaded, block.mark)
        return len(ids)

    def count(block: _Block) -> int:
        return redis.count(keys(block, source.rows(block)[0]))

    def all_there() -> bool:
        return sum(pool.map(count, source.blocks)) == total

    with ThreadPoolExecutor(threads) as pool:
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
