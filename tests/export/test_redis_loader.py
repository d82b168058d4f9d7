"""Versions that are loaded into a real Redis, and graphs that read them there."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import time
import types
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis_servers
import tensorflow as tf
import tf_keras
from redis_servers import Server

from qianmo.export import embedding_shards as shards
from qianmo.export import redis_loader
from qianmo.export.embedding_shards import StoreError
from qianmo.export.redis_keys import Redis
from qianmo.export.saved_model import session
from qianmo.export.store import export_fed_store, export_store
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.models.ranker import Ranker
from qianmo.pipelines.serving import predictions
from qianmo.pipelines.serving.fed_client import FedClient
from qianmo.pipelines.serving.server import ModelServer

pytestmark = pytest.mark.skipif(redis_servers.MISSING, reason=redis_servers.REASON)
SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=50, dim=8),
        Categorical(name="city", dim=4, dtype="string", vocabulary=("Rome", "Oslo")),
        Categorical(name="seen", num_ids=40, dim=4, max_length=3, pooling="mean"),
        Dense(name="price", mean=1.0, variance=2.0),
        Dense(name="city_id", mean=0.0, variance=1.0),  # no raw domain, for all its name
    ),
    labels=("click",),
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as started:
        yield started


def write(folder: pathlib.Path, version: int, count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    shards.write(folder, version, [(shards.Table(name="t", dim=4, num_rows=count), [rows])])
    return rows


def stored(server: Server, prefix: str, count: int) -> np.ndarray:
    values = server.client().mget([f"{prefix}:1:t:{i}" for i in range(count)])
    return np.frombuffer(b"".join(values), np.float32).reshape(count, 4)


def test_goes_on_where_it_was_killed(server: Server, tmp_path: pathlib.Path) -> None:
    count = 12 * redis_loader.BLOCK_ROWS
    rows = write(tmp_path, 1, count)
    client = server.client()
    command = [sys.executable, "-m", "qianmo.pipelines.load_redis", f"--store={tmp_path}"]
    command += ["--version=1", f"--redis={server.url('kill')}", "--threads=2"]
    loading = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while client.scard("kill:1:LOADED") < 2:
        assert loading.poll() is None, loading.stderr.read()
        time.sleep(0.001)
    loading.kill()
    loading.communicate()
    marked = client.scard("kill:1:LOADED")
    assert 2 <= marked < 12
    assert not client.exists("kill:CURRENT", "kill:VERSIONS")
    shown: list[tuple[int, int]] = []
    written = redis_loader.load(
        tmp_path, 1, server.url("kill"), progress=lambda *both: shown.append(both)
    )
    assert written == (12 - marked) * redis_loader.BLOCK_ROWS
    assert shown[0] == (marked * redis_loader.BLOCK_ROWS, count)
    assert shown[-1] == (count, count)
    np.testing.assert_array_equal(stored(server, "kill", count), rows)
    assert client.get("kill:CURRENT") == b"1"
    assert client.get("kill:VERSIONS") == b"1 1\n"
    assert not client.exists("kill:1:LOADED")
    assert redis_loader.load(tmp_path, 1, server.url("kill")) == 0
    # Rows that were lost since are found by counting, and are written again.
    client.delete("kill:1:t:77")
    assert redis_loader.load(tmp_path, 1, server.url("kill")) == count
    assert client.exists("kill:1:t:77")


def test_another_version_of_the_same_number(server: Server, tmp_path: pathlib.Path) -> None:
    url, client = server.url("other"), server.client()
    write(tmp_path / "a", 1, 100)
    rows = write(tmp_path / "b", 1, 90, seed=1)
    redis_loader.load(tmp_path / "a", 1, url)
    assert not redis_loader.holds(url, tmp_path / "b", 1)
    with pytest.raises(StoreError, match="holds another version 1"):
        redis_loader.load(tmp_path / "b", 1, url)
    with pytest.raises(StoreError, match="version 1 is published; publish another one"):
        redis_loader.delete(url, 1)
    shards.write(tmp_path / "a", 2, [(shards.Table(name="t", dim=4, num_rows=1), [rows[:1]])])
    assert not redis_loader.holds(url, tmp_path / "a", 2)
    redis_loader.load(tmp_path / "a", 2, url, publish=False)
    assert redis_loader.holds(url, tmp_path / "a", 2)
    assert client.get("other:CURRENT") == b"1"
    redis_loader.load(tmp_path / "a", 2, url)
    assert client.get("other:CURRENT") == b"2"
    assert redis_loader.delete(url, 1) == 102  # and MANIFEST, CONTENT
    assert not client.keys("other:1:*")
    # A load that was given up leaves nothing of itself in another one of its number.
    client.set("other:1:CONTENT", "half")
    client.set("other:1:t:95", "old")
    redis_loader.load(tmp_path / "b", 1, url)
    np.testing.assert_array_equal(stored(server, "other", 90), rows)
    assert not client.exists("other:1:t:95")
    assert redis_loader.versions(Redis(url)) == {2: 2, 1: 1}


@pytest.mark.parametrize("key", ["1:CONTENT", "1:MANIFEST", "VERSIONS", "CURRENT"])
def test_a_key_that_is_lost_is_made_good_by_loading_again(
    server: Server, tmp_path: pathlib.Path, key: str
) -> None:
    prefix = f"lost-{key.replace(':', '-')}"
    url, client = server.url(prefix), server.client()
    rows = write(tmp_path / "a", 1, 100)
    redis_loader.load(tmp_path / "a", 1, url)
    before = {name: client.get(name) for name in client.keys(f"{prefix}:*")}
    assert client.delete(f"{prefix}:{key}") == 1
    # Another version of this number is refused still, with what can be done.
    write(tmp_path / "b", 1, 100, seed=1)
    if key != "VERSIONS":
        with pytest.raises(StoreError, match=r"differ from those of .*or load and publish another"):
            redis_loader.load(tmp_path / "b", 1, url)
    redis_loader.load(tmp_path / "a", 1, url)
    assert {name: client.get(name) for name in client.keys(f"{prefix}:*")} == before
    assert redis_loader.holds(url, tmp_path / "a", 1)
    np.testing.assert_array_equal(stored(server, prefix, 100), rows)
    shards.write(tmp_path / "a", 2, [(shards.Table(name="t", dim=4, num_rows=1), [rows[:1]])])
    redis_loader.load(tmp_path / "a", 2, url)
    redis_loader.delete(url, 1)  # once another one is published
    assert not client.keys(f"{prefix}:1:*")


def test_a_cluster_of_one_node(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "store", 1, 1000)
    (tmp_path / "nodes").mkdir()
    with redis_servers.cluster(tmp_path / "nodes", nodes=1) as cluster:
        assert redis_loader.load(tmp_path / "store", 1, cluster.url()) == 1000
        redis = Redis(cluster.url())
        redis.client.delete(redis.key(1, "CONTENT"))
        assert redis_loader.load(tmp_path / "store", 1, cluster.url()) == 0
        assert redis_loader.holds(cluster.url(), tmp_path / "store", 1)


def test_refusals(server: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 100)
    for url, message in (
        ("http://127.0.0.1:1/p", "A Redis URL should be"),
        ("redis://127.0.0.1/p", "A Redis URL should be"),
        ("redis://127.0.0.1:1/", "the prefix of its keys"),
        ("redis://127.0.0.1:1/p", "Connection refused"),
        ("redis://me:secret@127.0.0.1:1/p", "should hold no password"),
        ("redis://127.0.0.1:1,127.0.0.1:2/p", "should name one address"),
    ):
        with pytest.raises(StoreError, match=message):
            redis_loader.load(tmp_path, 1, url)
    with pytest.raises(StoreError, match="7/MANIFEST: No such file"):
        redis_loader.load(tmp_path, 7, server.url("refused"))
    client = server.client()
    try:
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(StoreError, match=r"should be noeviction.*Received: allkeys-lru"):
            redis_loader.load(tmp_path, 1, server.url("refused"))
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1mb")
        with pytest.raises(StoreError, match=r"'maxmemory'. What is loaded stays; load"):
            redis_loader.load(tmp_path, 1, server.url("refused"))
    finally:
        client.config_set("maxmemory", "0")
    assert not client.exists("refused:CURRENT", "refused:VERSIONS")
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match=r"pip install 'qianmo\[redis\]'"):
        redis_loader.load(tmp_path, 1, server.url("refused"))


def rows(count: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "user": rng.integers(-2, 55, count),
        "city": rng.choice(np.array([b"Rome", b"Oslo", b"Bonn"], object), count),
        "seen": rng.integers(-2, 45, (count, 3)),
        "seen_length": rng.integers(0, 4, count),
        "price": rng.normal(size=count).astype(np.float32),
        "city_id": rng.normal(size=count).astype(np.float32),
    }


def model(seed: int = 1) -> Ranker:
    config = {"name": "mlp", "units": (8,), "embedding_stddev": 1.0, "embedding_seed": seed}
    tf_keras.utils.set_random_seed(seed)
    made = zoo.build(SCHEMA, config)
    made({k: tf.constant(v) for k, v in rows(2).items()})
    return made


def scores(made: Ranker) -> np.ndarray:
    return tf.sigmoid(made({k: tf.constant(v) for k, v in rows().items()})["model"])[:, 0].numpy()


def test_a_graph_reads_redis(server: Server, tmp_path: pathlib.Path) -> None:
    url, made, client = server.url("graph"), model(), server.client()
    first, _ = export_store(made, tmp_path / "m", rows(), redis=url)
    assert (first / "assets/embedding_store").read_text() == f"{url}\n"
    before = scores(made)
    made.embed.tables["8"].assign_add(tf.ones_like(made.embed.tables["8"]))
    second, _ = export_store(made, tmp_path / "m", rows(), changes_of=1, redis=url)
    after = scores(made)
    assert client.get("graph:CURRENT") == b"2"
    with session(second) as run:
        for version, expected in ((b"2", after), (b"1", before)):
            client.set("graph:CURRENT", version)
            for _ in range(100):
                found = run("serving_default", rows())["click"]
                if np.allclose(found, expected, atol=1e-6):
                    break
                time.sleep(0.05)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def predicted(folder: pathlib.Path, target: str) -> list[dict[str, float]]:
    """What `qianmo-predict --lookup` writes for the rows."""
    columns = rows()
    pairs = zip(columns["seen"], columns.pop("seen_length"), strict=True)
    columns["seen"] = [ids[:length].tolist() for ids, length in pairs]
    columns["city"] = [name.decode() for name in columns["city"]]
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    (folder / "schema.json").write_text(json.dumps(SCHEMA.to_config()))
    flags = {"server": target, "model_name": "m", "lookup": folder / "m_lookup", "rest": False}
    flags |= {"data": str(folder / "rows.parquet"), "schema": folder / "schema.json"}
    flags |= {"signature_name": "serving_default", "rows": 0, "batch_size": 64}
    predictions.write_predictions(types.SimpleNamespace(**flags, output=folder / "scores"))
    return [json.loads(line) for line in (folder / "scores").read_text().splitlines()]


@pytest.mark.parametrize("where", ["folder", "redis"])
def test_the_client_of_fed(server: Server, tmp_path: pathlib.Path, where: str) -> None:
    redis = server.url("fed") if where == "redis" else ""
    old, new = model(1), model(2)
    export_fed_store(old, tmp_path / "m", rows(), redis=redis)
    with ModelServer({"m": tmp_path / "m"}, port=0, rest_api_port=0) as serving:
        client = FedClient(f"127.0.0.1:{serving.port}", "m", tmp_path / "m_lookup")
        assert sorted(client.inputs()) == sorted(rows())
        answers = client.predict(rows())
        np.testing.assert_allclose(answers["click"], scores(old), atol=1e-6)
        assert answers["status"].tolist() == [0] * 100
        written = predicted(tmp_path, f"127.0.0.1:{serving.port}")
        np.testing.assert_allclose([row["click"] for row in written], scores(old), atol=1e-6)
        none = rows() | {"seen": np.zeros((100, 3), np.int64), "seen_length": np.zeros(100, int)}
        narrow = client.predict(none | {"seen": none["seen"][:, :0]})["click"]
        np.testing.assert_allclose(narrow, client.predict(none)["click"], atol=1e-6)
        with pytest.raises(ValueError, match=r"`seen` should have shape \[\?, 3\]"):
            client.predict(none | {"seen": np.zeros((100, 4), np.int64)})
        bad = rows() | {"price": np.full(100, np.nan, np.float32), "seen_length": np.full(100, 9)}
        assert client.predict(bad)["status"].tolist() == [3] * 100
        # New embeddings and their graph take over together.
        export_fed_store(new, tmp_path / "m", rows(), redis=redis)
        for _ in range(100):
            found = client.predict(rows())["click"]
            if np.allclose(found, scores(new), atol=1e-6):
                break
            np.testing.assert_allclose(found, scores(old), atol=1e-6)
            time.sleep(0.05)
        np.testing.assert_allclose(found, scores(new), atol=1e-6)
        client.close()
    with pytest.raises(ValueError, match="should hold a folder named by a version number"):
        FedClient("127.0.0.1:1", "m", tmp_path / "none")
