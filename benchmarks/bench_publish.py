"""Publishing a student's graph, whose embeddings are in a store, beside small and large tables.

As `qianmo.pipelines.online` does it: the student's weights move, the graph is written, replayed on
1,000 rows by the session loader, compared with the Keras model and moved into place. Weights are
first weights: time and size do not depend on them. Each size of table has a process of its own.
The last row's feature has a vocabulary instead of a range, which travels in the graph.
"""

from __future__ import annotations

import gc
import multiprocessing
import pathlib
import tempfile
import time
from typing import Any

import common
import numpy as np

REPLAYED_ROWS = 1000
SMALL, LARGE, VOCABULARY = "1,000 rows", "10,000,000 rows", "vocabulary of 100,000"


def resident() -> float:
    """MB of this process's own."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


def measure(name: str, users: int, repeats: int) -> dict[str, Any]:
    """Publishes once with embeddings, then `repeats` graphs."""
    import tensorflow as tf

    from qianmo.export.store import export_store
    from qianmo.layers.features import Categorical, Dense
    from qianmo.layers.schema import Schema
    from qianmo.models import zoo
    from qianmo.pipelines.training import runtime

    runtime.settle()
    user: dict[str, Any] = {"num_ids": users - 1}
    if name == VOCABULARY:
        user = {"vocabulary": tuple(range(users))}
    schema = Schema(
        features=(
            Categorical(name="user", dim=16, **user),
            Categorical(name="item", num_ids=999, dim=16),
            Categorical(name="seen", num_ids=999, dim=16, table="item", max_length=20),
            Dense(name="price", mean=0.0, variance=1.0),
        ),
        labels=("click",),
    )
    model = zoo.build(schema, {"name": "dual_dnn", "interactions": {"fm": {}}})
    model.build()
    rng = np.random.default_rng(0)
    rows = {
        "user": rng.integers(0, users, REPLAYED_ROWS),
        "item": rng.integers(0, 999, REPLAYED_ROWS),
        "seen": rng.integers(0, 999, (REPLAYED_ROWS, 20)),
        "seen_length": rng.integers(0, 20, REPLAYED_ROWS),
        "price": rng.normal(size=REPLAYED_ROWS).astype(np.float32),
    }
    with tempfile.TemporaryDirectory() as temporary:
        base = pathlib.Path(temporary) / "model"
        start = time.perf_counter()
        export_store(model, base, rows)
        whole = time.perf_counter() - start
        took = []
        before = 0.0
        for number in range(repeats):
            if number == repeats // 2:  # by when what stays has been made
                before = resident()
            for variable in model.student_tower.trainable_variables:
                variable.assign_add(tf.random.normal(variable.shape, stddev=0.01))
            start = time.perf_counter()
            version, _ = export_store(model, base, rows, embedding_version=1)
            gc.collect()
            took.append(time.perf_counter() - start)
        grown = (resident() - before) / (repeats - repeats // 2)
        store = base.with_name("model_embeddings")
        embeddings = sum(p.stat().st_size for p in store.rglob("*.rows"))
        graph = sum(p.stat().st_size for p in version.rglob("*") if p.is_file())
    return {
        "users": name,
        "graph, s": float(np.median(took)),
        "graph, s, the slowest": max(took),
        "graph, bytes": graph,
        "memory grown by a graph, MB": grown,
        "with embeddings, s": whole,
        "embeddings, bytes": embeddings,
    }


def run(*, quick: bool) -> dict[str, Any]:
    """All sizes, in turn."""
    repeats = 3 if quick else 20
    sizes = {SMALL: 1000, LARGE: 10_000_000, VOCABULARY: 100_000}
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for name, users in sizes.items():
        with spawn.Pool(1) as pool:
            rows.append(pool.apply(measure, (name, users, repeats)))
        print(rows[-1], flush=True)
    small, large, _ = rows
    targets = {
        "slowest graph, s": common.target(
            max(r["graph, s, the slowest"] for r in (small, large)), 5, at_most=True
        ),
        "largest graph, bytes": common.target(
            max(r["graph, bytes"] for r in (small, large)), 1e6, at_most=True
        ),
        "s beside 10 million rows / beside 1,000": common.target(
            large["graph, s"] / small["graph, s"], 1.25, at_most=True
        ),
        "bytes beside 10 million rows / beside 1,000": common.target(
            large["graph, bytes"] / small["graph, bytes"], 1.01, at_most=True
        ),
    }
    return {"rows": rows, "targets": targets}
