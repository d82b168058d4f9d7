"""What it costs to know which data a run read: hashing beside a pass, an epoch and a resume.

The files are hashed by a thread while the first pass decodes them, so what a run pays is less than
the time of hashing alone, which stands here. Epochs are the second of a recipe, whose graph is
traced; files are in the page cache in all of them.
"""

from __future__ import annotations

import pathlib
import time
from typing import Any

import common
import numpy as np
from ml_collections import ConfigDict

from qianmo.configs import kuairand_dual_dnn, movielens_1m_ctr
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import identity, readers

REPEATS = 9


def hashing(schema: Schema, path: str) -> list[float]:
    """Seconds that the identity of a data set takes, by itself."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        identity.of(schema, path)
        seconds.append(time.perf_counter() - start)
    return seconds


def decoding(schema: Schema, path: str) -> float:
    """Seconds of a pass of the reader, by itself."""
    start = time.perf_counter()
    for _ in readers.blocks(schema, path):
        pass
    return time.perf_counter() - start


def measured(name: str, config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """A recipe's second epoch, and the identity of its training rows."""
    common.point(config, folder, valid=False)
    config.data.test = ""
    config.train.epochs = 2
    report = common.trained(config)
    path, schema = config.data.train, Schema.from_config(config.schema.to_dict())
    hashes = hashing(schema, path)
    epoch = report["history"][1]["seconds"]
    return {
        "rows of": name,
        "rows": report["rows"]["train"],
        "MB": pathlib.Path(path).stat().st_size / 1e6,
        "hashing, ms": 1e3 * float(np.median(hashes)),
        "a pass of the reader, s": decoding(schema, path),
        "second epoch, s": epoch,
        "hashing / epoch, %": 100 * float(np.median(hashes)) / epoch,
    }


def run(*, quick: bool) -> dict[str, Any]:
    """DeepFM on MovieLens-1M, the fastest epoch of all recipes, and the dual DNN on KuaiRand."""
    kuairand = common.kuairand()
    rows = [measured("KuaiRand, dual DNN", kuairand_dual_dnn.get_config("dual"), kuairand)]
    hashes = {"kuairand": common.sha256(kuairand)}
    if not quick:
        movielens = common.movielens_1m("time")
        recipe = movielens_1m_ctr.get_config("deepfm")
        rows.append(measured("MovieLens-1M, DeepFM", recipe, movielens))
        hashes["movielens_1m"] = common.sha256(movielens)
    worst = max(row["hashing / epoch, %"] for row in rows)
    targets = {"hashing / epoch, %": common.target(worst, 2.0, at_most=True)}
    return {"data_sha256": hashes, "rows": rows, "targets": targets}
