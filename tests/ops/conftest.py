"""Redis servers for the tests of one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis_servers
from redis_servers import Cluster, Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as started:
        yield started


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with redis_servers.cluster(tmp_path_factory.mktemp("cluster")) as started:
        yield started
