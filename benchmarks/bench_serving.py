"""The embedded server against a direct session.run of the same graph.

The graph is the student of the KuaiRand recipe, its weights as initialised: speed does not depend
on them. The server runs in a process of its own on loopback; so do the clients, one or 16 threads
of one process. The direct runs are as many threads on one session.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np

from qianmo.configs import kuairand_dual_dnn
from qianmo.export.saved_model import export_in_graph, session
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import statistics
from qianmo.pipelines.data.replay import first_rows
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.serving.clients import Client, RestClient
from qianmo.pipelines.training import runtime

ROWS = 8192
Rows = dict[str, np.ndarray]


def exported(folder: pathlib.Path) -> tuple[pathlib.Path, Rows]:
    """A version of the recipe's student, and real rows for it."""
    data = common.kuairand()
    config = common.point(kuairand_dual_dnn.get_config("dual"), data, valid=True)
    recipe = Recipe.from_config(config.to_dict())
    whole = statistics.complete(recipe.schema, recipe.data.train)
    model = run_dir.build(dataclasses.replace(recipe, schema=whole))
    rows = first_rows(whole, recipe.data.test, ROWS)
    version, _ = export_in_graph(model, folder / "model", {k: v[:1000] for k, v in rows.items()})
    return version, rows


def load(
    calls: list[Callable[[Rows], Any]], rows: Rows, size: int, seconds: float
) -> tuple[float, float, float]:
    """Rows/s, p50 and p99 in ms of callers that ask for `size` rows again and again."""
    times: list[list[float]] = [[] for _ in calls]
    begin = threading.Barrier(len(calls) + 1)
    end = [0.0]

    def ask(index: int) -> None:
        call = calls[index]
        batches = [
            {k: v[i : i + size] for k, v in rows.items()} for i in range(0, ROWS - size + 1, size)
        ]
        for batch in batches[:3]:
            call(batch)
        begin.wait()
        number = index
        while time.perf_counter() < end[0]:
            start = time.perf_counter()
            call(batches[number % len(batches)])
            times[index].append(time.perf_counter() - start)
            number += 1

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    # Set before the barrier opens: the callers read it right after.
    while begin.n_waiting < len(calls):
        time.sleep(0.01)
    start = time.perf_counter()
    end[0] = start + seconds
    begin.wait()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    every = np.concatenate([np.asarray(t) for t in times]) * 1e3
    return (
        size * len(every) / took,
        float(np.percentile(every, 50)),
        float(np.percentile(every, 99)),
    )


def ask_server(kind: str, address: str, clients: int, rows: Rows, size: int, seconds: float) -> Any:
    """`load` with clients of a server."""
    make = {"gRPC": Client, "REST": RestClient}[kind]
    opened = [make(address, "model") for _ in range(clients)]
    return load([c.predict for c in opened], rows, size, seconds)


def start_server(base_path: pathlib.Path) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """The embedded server in a process of its own, and its addresses."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "qianmo.pipelines.serve",
            f"--model_base_path={base_path}",
            "--model_name=model",
            "--embedded",
            "--port=0",
            "--rest_api_port=0",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"ready: gRPC (\S+), REST http://([^,\s]+)", line)
        if found:
            return process, {"gRPC": found[1], "REST": found[2]}
    raise SystemExit("The server ended before it was ready.")


def run(*, quick: bool) -> dict[str, Any]:
    """Direct, gRPC and REST in turn, at each size and number of callers."""
    runtime.settle()
    seconds = 1.0 if quick else 5.0
    rows_of_table = []
    targets: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        version, rows = exported(pathlib.Path(temporary))
        server, addresses = start_server(version.parent)
        try:
            spawn = multiprocessing.get_context("spawn")
            with spawn.Pool(1) as pool, session(version) as direct:
                for size in (1, 64, 512):
                    for callers in (1, 16):
                        found = {
                            "session.run": load(
                                [lambda batch: direct("serving_default", batch)] * callers,
                                rows,
                                size,
                                seconds,
                            )
                        }
                        for kind, address in addresses.items():
                            found[kind] = pool.apply(
                                ask_server, (kind, address, callers, rows, size, seconds)
                            )
                        for way, (speed, p50, p99) in found.items():
                            rows_of_table.append(
                                {
                                    "way": way,
                                    "rows a request": size,
                                    "clients": callers,
                                    "rows/s": speed,
                                    "p50 ms": p50,
                                    "p99 ms": p99,
                                    "rows/s / session.run's": speed / found["session.run"][0],
                                }
                            )
                            print(rows_of_table[-1], flush=True)
        finally:
            server.terminate()
            code = server.wait(30)
    targets["server ends with status 0 on SIGTERM"] = {
        "value": code,
        "target": "== 0",
        "met": code == 0,
    }
    return {
        "data_sha256": common.sha256(common.kuairand()),
        "rows": rows_of_table,
        "targets": targets,
    }
