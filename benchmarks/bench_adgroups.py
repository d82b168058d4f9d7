"""A tower for each adgroup beside one trunk: size, memory and time of a request by their number.

An adgroup is five consecutive rows of one MovieLens-1M user, so that the training rows make
100,000 of them. The trunk is an MLP 256-128 with a seam of 16, its weights as initialised; a tower
is 16-16-1, 289 numbers. Each export answers requests of 200 rows through the session loader, as
TensorFlow Serving does, for 10 adgroups or for 200, drawn anew for each request; the exports take
turns. Memory is that of a process that holds one export and has answered; what the process took
before it loaded is left out.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import numpy as np

from qianmo.configs import movielens_1m_meta
from qianmo.export.personal_towers import export_personal, fine_tune
from qianmo.export.saved_model import STATUS, session
from qianmo.layers.inner_loop import InnerLoop
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import statistics
from qianmo.pipelines.data.replay import columns
from qianmo.pipelines.evaluation import cost
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import runtime

ADGROUPS = (10, 1_000, 100_000)
QUICK_ADGROUPS = (10, 100, 1_000)
OWN_ROWS = 5
ROWS, REQUESTS = 200, 50
ASKED = (10, 200)  # adgroups of a request

Rows = dict[str, np.ndarray]


def resident() -> dict[str, int]:
    """Bytes of memory that this process holds now, and that it held at most."""
    status = dict(
        line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines()
    )
    return {name: 1024 * int(status[name].split()[0]) for name in ("VmRSS", "VmHWM")}


def memory(version: pathlib.Path, rows: Rows) -> tuple[int, int]:
    """Bytes that an export takes, once loaded and at most while loading."""
    before = resident()["VmRSS"]
    with session(version) as run:
        run("serving_default", rows)
        after = resident()
    return after["VmRSS"] - before, after["VmHWM"] - before


def size(version: pathlib.Path) -> int:
    """Bytes of a version's files."""
    return sum(path.stat().st_size for path in version.rglob("*") if path.is_file())


def asking(run: Callable[[str, Rows], Any], requests: list[Rows]) -> Callable[[], Any]:
    """A call that asks for one request after the other, for ever."""
    turn: Iterator[Rows] = itertools.cycle(requests)
    return lambda: run("serving_default", next(turn))


def run(*, quick: bool) -> dict[str, Any]:
    """Fine-tunes all adgroups, exports some of them and asks."""
    runtime.settle()
    numbers = QUICK_ADGROUPS if quick else ADGROUPS
    folder = common.movielens_1m("time")
    config = common.point(movielens_1m_meta.get_config("all_users-plain"), folder, valid=False)
    schema = Recipe.from_config(config.to_dict()).schema
    schema = statistics.complete(schema, config.data.train)
    held = columns(schema, config.data.train)
    order = np.argsort(held["user_id"], kind="stable")[: OWN_ROWS * numbers[-1]]
    rows = {name: column[order] for name, column in held.items()}
    rows["adgroup"] = np.arange(len(order)) // OWN_ROWS
    config.schema = {**schema.to_config(), "task_id": "adgroup"}
    config.model = {"name": "mlp", "units": (256, 128), "seam_dim": 16, "tower_units": (16,)}
    model = run_dir.build(Recipe.from_config(config.to_dict()))
    inner = InnerLoop(steps=5, step_size=0.1, shrinkage=3.0, max_support=OWN_ROWS)
    fine_tune(model, inner, {name: column[:4096] for name, column in rows.items()})  # traces
    start = time.perf_counter()
    ids, towers = fine_tune(model, inner, rows)
    tuned = len(ids) / (time.perf_counter() - start)

    random = np.random.default_rng(1)

    def requests(adgroups: int, asked: int) -> list[Rows]:
        made = []
        for _ in range(REQUESTS):
            index = random.integers(0, len(order), ROWS)
            found = {name: rows[name][index] for name in model.schema.input_names}
            drawn = random.permutation(adgroups)[:asked]
            made.append({**found, "adgroup": drawn[np.arange(ROWS) % len(drawn)]})
        return made

    table: list[dict[str, Any]] = []
    calls: dict[tuple[int, int], Callable[[], Any]] = {}
    with contextlib.ExitStack() as stack:
        base = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        versions = {}
        for number in numbers:
            sample = requests(number, 10)[0]
            versions[number], _ = export_personal(
                model, base / f"adgroups_{number}", sample, ids[:number], towers[:number]
            )
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                now, most = pool.apply(memory, (versions[number], sample))
            table.append(
                {
                    "adgroups": number,
                    "MB of towers": 4 * towers.shape[1] * number / 1e6,
                    "MB on disk": size(versions[number]) / 1e6,
                    "MB of memory": now / 1e6,
                    "MB of memory while loading": most / 1e6,
                }
            )
        for number, version in versions.items():
            direct = stack.enter_context(session(version))
            for asked in ASKED:
                if asked <= number:
                    made = requests(number, asked)
                    assert not any(direct("serving_default", x)[STATUS].any() for x in made)
                    calls[number, asked] = asking(direct, made)
        found = cost.times(calls, 2 if quick else 100)
    for row in table:
        for asked in ASKED:
            if (row["adgroups"], asked) in found:
                took = 1e3 * found[row["adgroups"], asked]
                row[f"p50 ms, {asked} a request"] = float(np.median(took))
                row[f"p99 ms, {asked} a request"] = float(np.percentile(took, 99))
    few, many = table[0], table[-1]
    many["fine-tuned, adgroups/s"] = tuned
    shown = f"{numbers[-1]:,} adgroups"
    return {
        "data_sha256": common.sha256(folder),
        "rows": table,
        "targets": {
            f"{shown}: p99 / that of 10, 10 a request": common.target(
                many["p99 ms, 10 a request"] / few["p99 ms, 10 a request"], 1.2, at_most=True
            ),
            f"{shown}: p50 / that of 10, 10 a request": common.target(
                many["p50 ms, 10 a request"] / few["p50 ms, 10 a request"], 1.2, at_most=True
            ),
        },
    }
