"""Swaps of graphs and embeddings under load, and damaged files.

A server of its own answers 16 clients while embedding versions are published and graph versions
appear. Every table of an embedding version is one number, so that an answer tells which graph
and which embeddings made it, and one of two versions' rows would be seen. Then files of a small
store are damaged, each in its own way, and opened by a process that must survive it.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any

import common
import numpy as np
from bench_serving import start_server

from qianmo.export import embedding_shards as shards
from qianmo.export.store import export_store, tables
from qianmo.layers.features import Categorical
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.models.ranker import Ranker
from qianmo.pipelines.serving.clients import Client

CLIENTS = 16
ROWS = 50
SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=1000, dim=16),
        Categorical(name="item", num_ids=1000, dim=8),
        Categorical(name="seen", num_ids=1000, dim=8, max_length=10),
    ),
    labels=("click",),
)


def request(seed: int) -> dict[str, np.ndarray]:
    """Rows with known ids and full lists."""
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(0, 1000, ROWS),
        "item": rng.integers(0, 1000, ROWS),
        "seen": rng.integers(0, 1000, (ROWS, 10)),
        "seen_length": np.full(ROWS, 10),
    }


def set_embeddings(model: Ranker, version: int) -> None:
    """Gives each table a number of its own, and of the version's."""
    rng = np.random.default_rng(version)
    for name in SCHEMA.tables:
        variable, first, end = model.embed.rows(name)
        rows = variable.numpy()
        rows[first:end] = rng.normal()
        variable.assign(rows)


def set_graph(model: Ranker, version: int) -> None:
    """Gives the dense layers weights of the version's own."""
    rng = np.random.default_rng(1000 + version)
    for variable in [*model.bottom.trainable_variables, *model.tower.trainable_variables]:
        variable.assign(rng.normal(scale=0.5, size=variable.shape))


def swaps(count: int) -> dict[str, Any]:
    """Publishes `count` embedding and graph versions under load."""
    model = zoo.build(SCHEMA, {"name": "mlp", "units": (16,)})
    rows = request(0)
    model(rows)
    expected = np.zeros((count + 1, count + 1))  # of graph and embedding versions, from 1 on
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        base, ready = folder / "model", folder / "ready"
        store = folder / "model_embeddings"
        ready.mkdir()
        for graph in range(1, count + 2):
            set_graph(model, graph)
            for version in range(1, count + 2):
                set_embeddings(model, version)
                score = model({k: v[:1] for k, v in rows.items()})["model"].numpy()[0, 0]
                expected[graph - 1, version - 1] = 1 / (1 + np.exp(-score))
            set_embeddings(model, 1)
            first = None if graph == 1 else 1
            made, _ = export_store(model, base, rows, version=graph, embedding_version=first)
            if graph > 1:
                shutil.move(made, ready)
        for version in range(2, count + 2):
            set_embeddings(model, version)
            shards.write(store, version, tables(model), space=1)
        known = np.sort(expected.ravel())
        server, addresses = start_server(base)
        stop = threading.Event()
        seen: list[set[float]] = [set() for _ in range(CLIENTS)]
        times: list[list[float]] = [[] for _ in range(CLIENTS)]
        faults: list[str] = []

        def ask(number: int) -> None:
            client = Client(addresses["gRPC"], "model")
            rows = request(number)
            while not stop.is_set():
                start = time.perf_counter()
                try:
                    found = client.predict(rows)["click"]
                except Exception as error:
                    faults.append(f"failed: {error}")
                    continue
                times[number].append(time.perf_counter() - start)
                near = known[np.argmin(np.abs(known[:, None] - found), 0)]
                if np.ptp(found) > 1e-6 or np.abs(near - found).max() > 1e-6:
                    faults.append(f"mixed: {found}")
                seen[number].update(near.tolist())

        def answered(scores: np.ndarray) -> None:
            """Waits, at most a minute, until a client got one of these."""
            wanted, end = set(scores.tolist()), time.perf_counter() + 60
            while time.perf_counter() < end and wanted.isdisjoint(set().union(*map(set, seen))):
                time.sleep(0.05)

        threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(CLIENTS)]
        try:
            for thread in threads:
                thread.start()
            for version in range(2, count + 2):
                shutil.move(ready / str(version), base / f".{version}")
                (base / f".{version}").rename(base / str(version))
                answered(expected[version - 1])
                shards.publish(store, version)
                answered(expected[:, version - 1])
            time.sleep(1)
            stop.set()
            for thread in threads:
                thread.join()
        finally:
            server.terminate()
            server.wait(30)
    pairs = set.union(*seen)
    places = {
        round(float(expected[g, v]), 9): (g, v) for g in range(count + 1) for v in range(count + 1)
    }
    met = [places[round(pair, 9)] for pair in pairs]
    every = np.concatenate([np.asarray(t) for t in times]) * 1e3
    return {
        "clients": CLIENTS,
        "requests": len(every),
        "graph versions seen": len({g for g, _ in met}),
        "embedding versions seen": len({v for _, v in met}),
        "failed": sum(f.startswith("failed") for f in faults),
        "mixed": sum(f.startswith("mixed") for f in faults),
        "p50 ms": float(np.percentile(every, 50)),
        "p99 ms": float(np.percentile(every, 99)),
    }


def damaged(path: pathlib.Path, rng: np.random.Generator) -> bytes:
    """The file's bytes with one fault."""
    data = bytearray(path.read_bytes())
    place = int(rng.integers(0, len(data) if rng.random() < 0.5 else min(len(data), 144)))
    fault = rng.integers(0, 4)
    if fault == 0:
        return bytes(data[:place])
    if fault == 1:
        return bytes(data + rng.bytes(int(rng.integers(1, 5000))))
    if fault == 2:
        data[place : place + 16] = rng.bytes(len(data[place : place + 16]))
    else:
        data[place] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)


def open_damaged(folder: str, count: int) -> dict[str, int]:
    """Opens a store with one damaged file, again and again."""
    import tensorflow as tf

    from qianmo.ops.embedding_lookup import EmbeddingStore, Read

    rng = np.random.default_rng(0)
    store = pathlib.Path(folder)
    ids = np.arange(3000)
    reads = [Read("dense", 4, tf.constant(ids)), Read("hash", 4, tf.constant(ids * 1_000_003))]
    right = [v.numpy() for v in EmbeddingStore(folder).lookup(reads)]
    files = sorted((store / "1").iterdir())
    kept = {path: path.read_bytes() for path in files}
    result = {"refused": 0, "read correctly": 0, "read wrongly": 0}
    for number in range(count):
        path = files[int(rng.integers(0, len(files)))]
        damage = damaged(path, rng)
        path.unlink()  # the old file may be mapped
        path.write_bytes(damage)
        try:
            for verify in (False, True):
                opened = EmbeddingStore(folder, verify=verify)
                found = [v.numpy() for v in opened.lookup(reads)]
                opened.close()
        except tf.errors.FailedPreconditionError:
            result["refused"] += 1
        else:
            same = all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))
            result["read correctly" if same else "read wrongly"] += 1
        path.unlink()
        path.write_bytes(kept[path])
        if number % 100 == 0:
            print(result, flush=True)
    return result


def mutations(count: int) -> dict[str, Any]:
    """Damages files of a small store, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows = np.random.default_rng(0).normal(size=(3000, 4)).astype(np.float32)
        dense = shards.Table(name="dense", dim=4, num_rows=3000)
        hashed = shards.Table(name="hash", dim=4, num_rows=3000, hashed=True)
        ids = np.arange(3000) * 1_000_003
        shards.write(folder, 1, [(dense, [rows]), (hashed, [(ids, rows)])], shard_rows=1024)
        shards.publish(folder, 1)
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        process = context.Process(target=_report, args=(queue, folder, count))
        process.start()
        process.join()
        result: dict[str, Any] = {} if process.exitcode else queue.get()
        return {"files": count, "crashes": int(bool(process.exitcode)), **result}


def _report(queue: Any, folder: str, count: int) -> None:
    queue.put(open_damaged(folder, count))


def run(*, quick: bool) -> dict[str, Any]:
    """Both."""
    files = mutations(100 if quick else 1000)
    print(files, flush=True)
    count = 3 if quick else 20
    load, versions = swaps(count), count + 1
    print(load, flush=True)
    wrong = files.get("read wrongly", -1) + files["crashes"]
    return {
        "damaged files": files,
        "rows": [load],
        "targets": {
            "failed requests": common.target(load["failed"], 0, at_most=True),
            "mixed answers": common.target(load["mixed"], 0, at_most=True),
            **{
                f"{kind} versions seen": common.target(load[f"{kind} versions seen"], versions)
                for kind in ("graph", "embedding")
            },
            "crashes or wrong rows of damaged files": common.target(wrong, 0, at_most=True),
        },
    }
