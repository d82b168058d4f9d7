"""Adapted scores against the plain score of one exported graph.

The graph is that of the MovieLens-1M meta recipe with all users, its weights as initialised: speed
does not depend on them. A request holds 200 films for 1, 16 or 64 users with 20 support rows each,
which the graph's table holds or the request brings, those of a user once. One client asks, through
the session loader and through the embedded server's gRPC; all the ways of asking take turns.
"""

from __future__ import annotations

import contextlib
import functools
import pathlib
import tempfile
from typing import Any

import bench_serving
import common
import numpy as np

from qianmo.configs import movielens_1m_meta
from qianmo.export.adapted import ADAPT, by_request_specs, export_adapted
from qianmo.export.saved_model import STATUS, session
from qianmo.export.shared_support import brought
from qianmo.layers.schema import Schema
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import statistics
from qianmo.pipelines.data.replay import columns
from qianmo.pipelines.evaluation import cost
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.serving.clients import Client
from qianmo.pipelines.training import runtime

ROWS, SUPPORT = 200, 20
TASKS, STEPS = (1, 16, 64), (1, 5)
SIGNATURES = {"table": "adapted", "request": "adapted_by_request"}

Rows = dict[str, np.ndarray]


class Requests:
    """Requests made of real rows: films of random rows for users with enough support."""

    def __init__(self, schema: Schema, path: str) -> None:
        self.schema = schema
        # The file's first rows are the oldest; a quarter of them hold a thousand users.
        self.held = columns(schema, path, 1 << 18)
        user = self.held[schema.task_id]
        order = np.argsort(user, kind="stable")
        _, start, count = np.unique(user[order], return_index=True, return_counts=True)
        last = (start + count)[count >= SUPPORT]
        self.support = order[last[:, None] - np.arange(SUPPORT, 0, -1)]  # [users, SUPPORT]

    def table(self) -> Rows:
        """The support rows of all users, in order of time."""
        rows = np.sort(self.support.ravel())
        return {name: column[rows] for name, column in self.held.items()}

    def plain(self, tasks: int) -> Rows:
        """Features of one request about so many users."""
        films = np.random.default_rng(1).integers(0, len(self.held[self.schema.task_id]), ROWS)
        users = self.support[np.arange(ROWS) % tasks, 0]
        own = {f.name for f in self.schema.categorical if f.side == "user"}
        return {
            name: self.held[name][users if name in own else films]
            for name in self.schema.input_names
        }

    def adapted(self, tasks: int, source: str) -> Rows:
        """The same, with support from the "table" or the "request"."""
        found = {**self.plain(tasks), ADAPT: np.ones(ROWS, bool)}
        if source == "request":
            users = found[self.schema.task_id]
            found |= brought(by_request_specs(self.schema, SUPPORT), users, self.of_users(tasks))
        return found

    def of_users(self, tasks: int) -> dict[int, Rows]:
        """The support rows of so many users, by user."""
        names = (*self.schema.input_names, *self.schema.labels)
        return {
            self.held[self.schema.task_id][rows[0]]: {n: self.held[n][rows] for n in names}
            for rows in self.support[:tasks]
        }


def run(*, quick: bool) -> dict[str, Any]:
    """Exports with 1 and 5 steps, then asks."""
    runtime.settle()
    folder = common.movielens_1m("time")
    config = common.point(movielens_1m_meta.get_config("all_users-meta"), folder, valid=False)
    schema = statistics.complete(Recipe.from_config(config.to_dict()).schema, config.data.train)
    config.schema = schema.to_config()
    requests = Requests(schema, config.data.train)
    calls: dict[tuple[Any, ...], Any] = {}
    with contextlib.ExitStack() as stack:
        base = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions = {}
        for steps in STEPS:
            config.model.meta.inner.steps = steps
            model = run_dir.build(Recipe.from_config(config.to_dict()))
            versions[steps], _ = export_adapted(
                model, base / f"steps_{steps}", requests.plain(64), requests.table()
            )
        for steps, version in versions.items():
            server, addresses = bench_serving.start_server(version.parent)
            stack.callback(server.wait, 30)
            stack.callback(server.terminate)
            client = Client(addresses["gRPC"], "model")
            direct = stack.enter_context(session(version))
            ways = {
                "session.run": direct,
                "gRPC": lambda name, rows, client=client: client.predict(rows, name),
            }
            for way, ask in ways.items():
                asked = {}
                if steps == STEPS[0]:
                    asked[0, ""] = ("serving_default", requests.plain(16))
                for tasks in TASKS:
                    for source, signature in SIGNATURES.items():
                        asked[tasks, source] = (signature, requests.adapted(tasks, source))
                for (tasks, source), (signature, rows) in asked.items():
                    call = functools.partial(ask, signature, rows)
                    if way == "gRPC" and source == "request":  # each user's support once
                        support, task = requests.of_users(tasks), schema.task_id
                        plain = requests.plain(tasks)
                        call = functools.partial(client.predict_adapted, plain, task, support)
                    assert not call()[STATUS].any()
                    calls[way, steps, tasks, source] = call
        found = cost.times(calls, 2 if quick else 100)
    table = []
    for (way, steps, tasks, source), took in found.items():
        plain = found[way, STEPS[0], 0, ""]
        table.append(
            {
                "way": way,
                "score": f"adapted, support from the {source}" if source else "plain",
                "steps": steps if source else "",
                "tasks": tasks if source else "",
                "rows/s": ROWS / float(np.mean(took)),
                "p50 ms": 1e3 * float(np.median(took)),
                "p99 ms": 1e3 * float(np.percentile(took, 99)),
                "p50 / plain p50": float(np.median(took) / np.median(plain)),
                "p99 / plain p99": float(np.percentile(took, 99) / np.percentile(plain, 99)),
            }
        )

    def ratio(way: str, source: str, at: float) -> float:
        pair = (found[way, 1, 16, source], found[way, 1, 0, ""])
        return float(np.percentile(pair[0], at) / np.percentile(pair[1], at))

    targets = {
        f"16 tasks, 1 step, support from the {source}, {way}: p{at} / plain p{at}": common.target(
            ratio(way, source, at),
            2.5 if (source, way) == ("request", "gRPC") else 3,
            at_most=True,
        )
        for source in SIGNATURES
        for way in ("session.run", "gRPC")
        for at in (50, 99)
    }
    return {"data_sha256": common.sha256(folder), "rows": table, "targets": targets}
