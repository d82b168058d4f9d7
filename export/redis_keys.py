"""The keys of an embedding store in a Redis or a Redis Cluster, as the loader writes them."""

from __future__ import annotations

import binascii
import importlib
import itertools
import os
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qianmo.export.embedding_shards import StoreError

_SLOTS = 16384
_KEYS = 512  # of a command
_TIMEOUT_SECONDS = 30.0
PASSWORD = "QIANMO_REDIS_PASSWORD"


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
        # Its own types are unions with those of its asynchronous twin.
        redis: Any
        try:
            redis = importlib.import_module("redis")
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
        if parts.password is not None:
            raise StoreError(
                "A Redis URL should hold no password, which others can read there. Give it in the "
                f"environment, as {PASSWORD}."
            )
        self._clustered = parts.scheme.endswith("+cluster")
        if len(hosts) > 1 and not self._clustered:
            raise StoreError(f"A URL of one Redis should name one address. Received: {hosts}")
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
        self._node_of_slot = np.zeros(_SLOTS, np.int64)
        try:
            if self._clustered:
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
        answers: list[Any] = [None] * len(commands)
        for place in np.unique(owners):
            own = np.flatnonzero(owners == place).tolist()
            # A pipeline of the client takes five times as long to do the same.
            pool = self.nodes[place].connection_pool
            connection = pool.get_connection()
            try:
                connection.send_packed_command([b"".join([commands[i][0] for i in own])])
                for i in own:
                    answers[i] = connection.read_response()
            except BaseException:
                connection.disconnect()  # its answers must not be taken for others
                raise
            finally:
                pool.release(connection)
        return answers

    def _parts(self, count: int) -> Iterator[slice]:
        # Keys of a command must be of one slot, where there are slots.
        size = 1 if self._clustered else _KEYS
        return (slice(start, start + size) for start in range(0, count, size))

    def write(self, keys: Sequence[bytes], values: Sequence[bytes]) -> None:
        """Sets keys to values."""
        commands = []
        for part in self._parts(len(keys)):
            pairs = zip(keys[part], values[part], strict=True)
            command = _pack(b"MSET", *itertools.chain.from_iterable(pairs))
            commands.append((command, keys[part.start]))
        self.ask(commands)

    def count(self, keys: Sequence[bytes]) -> int:
        """How many of the keys there are."""
        parts = self._parts(len(keys))
        return sum(self.ask([(_pack(b"EXISTS", *keys[p]), keys[p.start]) for p in parts]))

    def hold(self, keys: Sequence[bytes], values: Sequence[bytes]) -> bool:
        """Whether those of the keys that are there have these values."""
        parts = list(self._parts(len(keys)))
        answers = self.ask([(_pack(b"MGET", *keys[p]), keys[p.start]) for p in parts])
        found = itertools.chain.from_iterable(answers)
        return all(a is None or a == b for a, b in zip(found, values, strict=True))

    def text(self, *parts: object) -> str:
        """The value of a key of the prefix; empty if there is none."""
        value = self.client.get(self.key(*parts))
        return "" if value is None else value.decode()
