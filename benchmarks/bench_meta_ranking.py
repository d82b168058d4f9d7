"""Click, like and long view by one MMoE whose towers adapt to each user by their own labels.

KuaiRand without the user's id, the last day, both methods of `configs/kuairand_mmoe_meta.py`. k is
the number of support rows used; "unadapted" are the scores of the same weights without support.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import common
import numpy as np

from qianmo.configs import kuairand_mmoe_meta
from qianmo.pipelines.evaluation import adapted
from qianmo.pipelines.evaluation.task_rows import support_rows

NAME = "meta_ranking"
SEEDS = (1, 2, 3)
SIZES = (1, 2, 5, 10, 20)
METHODS = {"fine_tune": "plain, fine-tuned at serving", "meta": "meta-trained"}
LABELS = {"is_click": "click", "is_like": "like", "long_view": "long view"}


def unit(method: str, seed: int, *, quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Trains one model; returns label -> "plain" and each k -> AUC and GAUC of the test rows."""
    data = common.kuairand(support_history=True)
    config = kuairand_mmoe_meta.get_config(method)
    common.point(config, data, valid=True)
    config.train.seed = seed
    if quick:
        config.train.epochs = 1
    model = common.trained_model(config)
    support = support_rows(model, str(data / "test_support.parquet"))
    scored = adapted.score(model, str(data / "test.parquet"), support, SIZES)
    users = scored.columns["task_id"]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for column, label in enumerate(config.schema.labels):
        y = scored.labels[:, column]
        found[label] = {
            k: common.auc_and_gauc(y, p[:, column], users) for k, p in scored.probabilities.items()
        }
    print(method, seed, json.dumps(found), flush=True)
    return found


def run(*, quick: bool) -> dict[str, Any]:
    """Both methods, all seeds."""
    seeds = SEEDS[:1] if quick else SEEDS
    units: dict[str, list[Any]] = {method: [] for method in METHODS}
    for seed in seeds:
        for method, found in units.items():
            make = functools.partial(unit, method, seed, quick=quick)
            found.append(make() if quick else common.kept(NAME, f"{method} {seed}", make))

    def values(method: str, label: str, k: str, metric: str) -> list[float]:
        return [found[label][k][metric] for found in units[method]]

    def gain(method: str, label: str, k: str) -> float:
        pairs = (values(method, label, which, "auc") for which in (k, "plain"))
        return float(np.subtract(*map(np.asarray, pairs)).mean())

    rows = []
    for label, shown_label in LABELS.items():
        for method, shown in METHODS.items():
            row: dict[str, Any] = {"label": shown_label, "method": shown}
            for metric, sizes in (("auc", SIZES), ("gauc", SIZES[-1:])):
                for k in ("plain", *map(str, sizes)):
                    name = f"{metric.upper()} {'unadapted' if k == 'plain' else f'k = {k}'}"
                    row[name] = common.shown(values(method, label, k, metric))
            rows.append(row)
    last = str(SIZES[-1])
    targets = {
        **{
            f"{LABELS[label]}, {METHODS[method]}: AUC at k = {last} - unadapted": common.target(
                gain(method, label, last), 0.001
            )
            for label in LABELS
            for method in METHODS
        },
        "meta-trained: least AUC adapted - unadapted of any label and k": common.target(
            min(gain("meta", label, str(k)) for label in LABELS for k in SIZES), -0.002
        ),
    }
    sha256 = common.sha256(common.kuairand(support_history=True))
    if not quick:
        common.finished(NAME)
    return {"data_sha256": sha256, "rows": rows, "targets": targets, "seeds": len(seeds)}
