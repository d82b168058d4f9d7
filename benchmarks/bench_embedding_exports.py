"""The forms of an export against the Keras model on all test rows, and what small dtypes cost.

One trained model on each data set is exported as `in_graph`, `fed` and `store`, the last with
tables of each dtype, and read from a Redis. Each export answers every test row through the session
loader, as TensorFlow Serving runs it.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, get_args

import common
import numpy as np
from ml_collections import ConfigDict

from qianmo.configs import kuairand_dual_dnn, movielens_1m_ctr
from qianmo.export.embedding_shards import DType
from qianmo.export.saved_model import STATUS, Rows, export_fed, export_in_graph, session
from qianmo.export.store import export_store
from qianmo.layers.metrics import auc
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers

sys.path.append(str(common.ROOT / "tests"))
import redis_servers

BATCH = 4096
ANY = 1.0  # the tolerance of exports whose difference is what is measured


def data_sets() -> dict[str, tuple[pathlib.Path, ConfigDict]]:
    """Prepared data and a recipe for each data set."""
    folders = {"MovieLens-1M": common.movielens_1m("time"), "KuaiRand": common.kuairand()}
    recipes = {
        "MovieLens-1M": movielens_1m_ctr.get_config("deepfm"),
        "KuaiRand": kuairand_dual_dnn.get_config("student_alone"),
    }
    return {name: (folders[name], recipes[name]) for name in folders}


def batches(model: Ranker, path: str) -> list[tuple[Rows, np.ndarray]]:
    """Features and the first label of the rows of a file."""
    return [
        ({k: v.numpy() for k, v in features.items()}, targets["labels"][:, 0].numpy())
        for features, targets in readers.dataset(model.schema, path, batch_size=BATCH)
    ]


def size(folder: pathlib.Path) -> int:
    """Bytes of a folder's files."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def exports(model: Ranker, base: pathlib.Path, rows: Rows) -> Iterator[tuple[str, str, Any]]:
    """Form, dtype, and the folders of graph, lookup and tables, as each is written."""
    yield "in_graph", "float32", (export_in_graph(model, base / "whole", rows)[0], None, None)
    fed = export_fed(model, base / "fed", rows)[0]
    yield "fed", "float32", (fed, base / "fed_lookup" / fed.name, None)
    for dtype in get_args(DType):
        graph, _ = export_store(model, base / dtype, rows, dtype=dtype, tolerance=ANY)
        yield "store", dtype, (graph, None, base / f"{dtype}_embeddings" / "1")
    (base / "server").mkdir()
    with redis_servers.server(base / "server") as redis:
        graph, _ = export_store(model, base / "redis", rows, redis=redis.url())
        yield "store, Redis", "float32", (graph, None, None)


def scores(
    model: Ranker, batches: list[Rows], graph: pathlib.Path, lookup: pathlib.Path | None
) -> np.ndarray:
    """What an export answers."""
    label = model.schema.labels[0]
    if lookup is not None:
        dense = [d.name for d in model.schema.dense]
        fed = []
        with session(lookup) as look_up:
            for rows in batches:
                found = dict(
                    look_up("serving_default", {k: v for k, v in rows.items() if k not in dense})
                )
                del found[STATUS]
                fed.append({**found, **{k: rows[k] for k in dense}})
        batches = fed
    with session(graph) as ask:
        return np.concatenate([ask("serving_default", rows)[label] for rows in batches])


def compare(name: str, model: Ranker, path: str) -> Iterator[dict[str, Any]]:
    """A row for each export of a model."""
    features, labels_of = zip(*batches(model, path), strict=True)
    labels = np.concatenate(labels_of)
    head = model.serving_head
    keras = np.concatenate([model.probabilities(rows)[head][:, 0].numpy() for rows in features])
    first = {k: v[:1000] for k, v in features[0].items()}
    with tempfile.TemporaryDirectory() as temporary:
        for form, dtype, (graph, lookup, tables) in exports(model, pathlib.Path(temporary), first):
            served = scores(model, list(features), graph, lookup)
            beside = lookup or tables
            yield {
                "data": name,
                "form": form,
                "tables": dtype,
                "largest difference to Keras": float(np.abs(served - keras).max()),
                "AUC": auc(labels, served),
                "AUC lost": auc(labels, keras) - auc(labels, served),
                "graph, bytes": size(graph),
                "lookup or tables, bytes": beside and size(beside),
            }


def run(*, quick: bool) -> dict[str, Any]:
    """Trains, exports and compares on both data sets."""
    if redis_servers.MISSING:
        raise SystemExit(redis_servers.REASON)
    rows: list[dict[str, Any]] = []
    hashes = {}
    for name, (folder, config) in data_sets().items():
        common.point(config, folder, valid=False)
        config.train.epochs = 1 if quick else config.train.epochs
        with common.model_dir() as model_dir:
            common.trained(config, model_dir)
            model, recipe = run_dir.load(model_dir)
            for row in compare(name, model, recipe.data.test):
                print(row, flush=True)
                rows.append(row)
        hashes[name] = common.sha256(folder)
    targets = {}
    for form in dict.fromkeys(row["form"] for row in rows):
        exact = [r for r in rows if r["form"] == form and r["tables"] == "float32"]
        worst = max(r["largest difference to Keras"] for r in exact)
        # In millionths, as targets keep six digits.
        targets[f"{form}, float32: largest difference to Keras, in 1e-6"] = common.target(
            1e6 * worst, 1, at_most=True
        )
    for row in rows:
        if row["tables"] in ("float16", "int8"):
            targets[f"{row['data']}, {row['tables']}: AUC lost, in 1e-6"] = common.target(
                1e6 * row["AUC lost"], 500, at_most=True
            )
    return {"data_sha256": hashes, "rows": rows, "targets": targets}
