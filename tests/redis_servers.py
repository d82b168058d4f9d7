"""Real Redis servers on loopback, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

MISSING = shutil.which("redis-server") is None
REASON = "no redis-server here; on Debian or Ubuntu: apt-get install redis-server"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """One redis-server; it can be killed and started again on its port."""

    def __init__(self, folder: pathlib.Path, *options: str, password: str = "") -> None:
        self.port = free_port()
        self._password = password
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        self._command += ["--dir", str(folder), "--logfile", str(folder / "log")]
        if password:
            self._command += ["--requirepass", password]
        self._command += options
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        import redis

        for _ in range(200):
            with contextlib.suppress(redis.ConnectionError, redis.BusyLoadingError):
                self.client().ping()
                return
            assert self.process.poll() is None, "redis-server has ended"
            time.sleep(0.05)
        raise AssertionError("redis-server does not answer")

    def client(self, **options: Any) -> Any:
        import redis

        return redis.Redis(port=self.port, password=self._password or None, **options)

    def url(self, prefix: str = "test", options: str = "") -> str:
        return f"redis://127.0.0.1:{self.port}/{prefix}{options}"

    def kill(self) -> None:
        """At once, without a chance to save."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def server(folder: pathlib.Path, *options: str, password: str = "") -> Iterator[Server]:
    """A server that keeps nothing on the disk, unless told to."""
    started = Server(folder, *(options or ("--save", "")), password=password)
    try:
        yield started
    finally:
        started.kill()


class Cluster:
    """Nodes that share the slots; those that are up serve theirs when one is down."""

    def __init__(self, folder: pathlib.Path, nodes: int = 3) -> None:
        self.servers: list[Server] = []
        for i in range(nodes):
            (folder / str(i)).mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-port", str(free_port())]
            options += ["--cluster-node-timeout", "5000", "--cluster-require-full-coverage", "no"]
            options += ["--appendonly", "yes", "--appendfsync", "no", "--save", ""]
            self.servers.append(Server(folder / str(i), *options))
        first = self.servers[0].client()
        for i, node in enumerate(self.servers):
            share = 16384 // nodes + 1
            last = min(share * (i + 1), 16384) - 1
            node.client().execute_command("CLUSTER ADDSLOTSRANGE", share * i, last)
            bus = node._command[node._command.index("--cluster-port") + 1]
            first.execute_command("CLUSTER MEET", "127.0.0.1", node.port, bus)
        for node in self.servers:
            for _ in range(600):
                together = len(node.client().cluster("slots")) == nodes
                if together and node.client().cluster("info")["cluster_state"] == "ok":
                    break
                time.sleep(0.05)
            else:
                raise AssertionError("the cluster does not come together")

    def url(self, prefix: str = "test", options: str = "") -> str:
        nodes = ",".join(f"127.0.0.1:{s.port}" for s in self.servers)
        return f"redis+cluster://{nodes}/{prefix}{options}"


@contextlib.contextmanager
def cluster(folder: pathlib.Path, nodes: int = 3) -> Iterator[Cluster]:
    started = Cluster(folder, nodes)
    try:
        yield started
    finally:
        for node in started.servers:
            node.kill()
