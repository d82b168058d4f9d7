"""What the student saves in serving: time of a request and size of the graph, against its teachers.

Every model is exported twice, whole and without its embeddings, and answers real rows through the
session loader, as TensorFlow Serving runs it. The graph fed with vectors holds the network alone;
the whole graph also looks up ids and vectors, which costs every model the same. Weights are first
weights: speed does not depend on them.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import common
import numpy as np

from qianmo.configs import movielens_1m_distillation as recipes
from qianmo.export.saved_model import STATUS, export_fed, export_in_graph, session
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.evaluation import cost
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import runtime

STUDENT, BI, CIN = "student MLP(16)", "teacher MLP + bi-interaction + FM", "teacher MLP + CIN"
# Shown name -> (interactions of the recipe, head).
MODELS = {STUDENT: ("bi", "student"), BI: ("bi", "teacher"), CIN: ("cin", "teacher")}
BATCHES = (1, 64, 512)

Call = Callable[[], Any]


def size(version: pathlib.Path) -> dict[str, int]:
    """Bytes of a SavedModel's weights and of its graph."""
    weights = sum(p.stat().st_size for p in (version / "variables").glob("variables.data*"))
    return {"weights": weights, "graph": (version / "saved_model.pb").stat().st_size}


def run(*, quick: bool) -> dict[str, Any]:
    """Exports, then measures."""
    runtime.settle()
    repeats = 2 if quick else 30
    folder = common.movielens_1m("random")
    config = common.point(recipes.get_config(), folder, valid=False)
    schema = Recipe.from_config(config.to_dict()).schema
    schema = statistics.complete(schema, config.data.train)
    data = readers.dataset(schema, config.data.test, batch_size=max(BATCHES))
    features = {k: v.numpy() for k, v in next(iter(data))[0].items()}

    calls: dict[tuple[str, int], dict[str, Call]] = {}
    exports: dict[str, tuple[pathlib.Path, pathlib.Path, Any]] = {}
    with contextlib.ExitStack() as stack:
        base = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for place, (name, (teacher, head)) in enumerate(MODELS.items()):
            recipe_config = common.point(recipes.get_config("dual", teacher), folder, valid=False)
            recipe_config.schema = schema.to_config()
            model: Ranker = run_dir.build(Recipe.from_config(recipe_config.to_dict()))
            whole, _ = export_in_graph(model, base / f"{place}_whole", features, heads=(head,))
            fed, _ = export_fed(model, base / f"{place}_fed", features, heads=(head,))
            with session(base / f"{place}_fed_lookup" / fed.name) as lookup:
                vectors = dict(lookup("serving_default", features))
            del vectors[STATUS]
            exports[name] = whole, fed, vectors
        sizes = {name: size(fed) for name, (_, fed, _) in exports.items()}
        for name, (whole, fed, vectors) in exports.items():
            for graph, version, inputs in (
                ("fed with vectors", fed, vectors),
                ("whole", whole, features),
            ):
                ask = stack.enter_context(session(version))
                for batch in BATCHES:
                    rows = {k: v[:batch] for k, v in inputs.items()}
                    calls.setdefault((graph, batch), {})[name] = lambda ask=ask, rows=rows: ask(
                        "serving_default", rows
                    )
        found = {
            key: {name: float(np.median(took)) for name, took in cost.times(group, repeats).items()}
            for key, group in calls.items()
        }

    rows_ = []
    for name in MODELS:
        for graph in ("fed with vectors", "whole"):
            row: dict[str, Any] = {"model": name, "graph": graph}
            for batch in BATCHES:
                took = found[graph, batch][name]
                row[f"ms at {batch}"] = round(1e3 * took, 3)
                row[f"rows/s at {batch}"] = batch / took
            if graph != "whole":
                row["weights, bytes"] = sizes[name]["weights"]
                row["saved_model.pb, bytes"] = sizes[name]["graph"]
            rows_.append(row)

    def faster(graph: str, batch: int, teacher: str) -> float:
        return found[graph, batch][teacher] / found[graph, batch][STUDENT]

    fed_name = "fed with vectors"
    total = {name: sum(s.values()) for name, s in sizes.items()}
    targets = {
        "network, 512 rows: student / MLP + bi-interaction, rows/s": common.target(
            faster(fed_name, 512, BI), 1.5
        ),
        "network, 512 rows: student / CIN, rows/s": common.target(faster(fed_name, 512, CIN), 10),
        "network, 64 rows: student / CIN, rows/s": common.target(faster(fed_name, 64, CIN), 3),
        "whole graph, 512 rows: student / MLP + bi-interaction, rows/s": common.target(
            faster("whole", 512, BI), 1.5
        ),
        "weights: teacher with CIN / student, bytes": common.target(
            sizes[CIN]["weights"] / sizes[STUDENT]["weights"], 3
        ),
        "weights + saved_model.pb: teacher with CIN / student, bytes": common.target(
            total[CIN] / total[STUDENT], 3
        ),
        "weights + saved_model.pb: teacher with bi-interaction / student, bytes": common.target(
            total[BI] / total[STUDENT], 3
        ),
    }
    return {"data_sha256": common.sha256(folder), "rows": rows_, "targets": targets}
