"""Clicks and likes by towers that adapt to each user, beside what they should be better than.

Four protocols: MovieLens-1M's new users and all users, KuaiRand with and without the user's id. A
row is one method under one protocol, means over seeds; k is the number of support rows used.
"Unadapted" are the scores of the same weights without support. Gains over the plain model are of
the same seed: their mean, and its standard deviation.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import common
import numpy as np

from qianmo.configs import kuairand_meta, movielens_1m_meta
from qianmo.pipelines.evaluation import adapted, scores
from qianmo.pipelines.evaluation.task_rows import support_rows

SEEDS = (1, 2, 3)
SIZES = (1, 2, 5, 10, 20)
PROTOCOLS = {
    "new_users": "ML-1M, new users",
    "all_users": "ML-1M, all users",
    "kuairand_id": "KuaiRand, user id",
    "kuairand_no_id": "KuaiRand, no user id",
}
METHODS = {
    "plain": "plain",
    "fine-tuned": "plain, fine-tuned at serving",
    "ppnet": "PPNet",
    "poso": "POSO",
    "meta": "meta tower",
    "rate": "rate only",
    "history": "history features",
    "history_meta": "history + meta tower",
}
METRICS = ("auc", "gauc")


def folder(protocol: str) -> pathlib.Path:
    """The protocol's rows, prepared once."""
    if protocol.startswith("kuairand"):
        return common.kuairand(support_history=True)
    return common.movielens_1m(protocol, support_history=True)


def unit(protocol: str, method: str, seed: int, *, quick: bool) -> dict[str, Any]:
    """Trains one model; returns "plain" and, for each k, "adapted" metrics on the test rows."""
    data = folder(protocol)
    recipes = kuairand_meta if protocol.startswith("kuairand") else movielens_1m_meta
    config = recipes.get_config(f"{protocol}-{method}")
    common.point(config, data, valid=True)
    config.train.seed = seed
    if quick:
        config.train.epochs = 1
    model, test = common.trained_model(config), str(data / "test.parquet")
    if model.meta is None:
        scored = scores.score(model, test)
        found = scored.probabilities[model.serving_head][:, 0]
        return {"plain": common.auc_and_gauc(scored.labels[:, 0], found, scored.columns["task_id"])}
    support = support_rows(model, str(data / "test_support.parquet"))
    # History features hold the last 20 rows, whatever k is.
    sizes = SIZES[-1:] if method == "history_meta" else SIZES
    scored = adapted.score(model, test, support, sizes)
    return {
        name: common.auc_and_gauc(scored.labels[:, 0], values[:, 0], scored.columns["task_id"])
        for name, values in scored.probabilities.items()
    }


def all_units(*, quick: bool) -> dict[str, dict[str, Any]]:
    """Every unit's metrics, from what an interrupted run left and then by training."""
    done = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        for protocol in PROTOCOLS:
            for method in movielens_1m_meta.METHODS:
                key = f"{protocol} {method} {seed}"
                make = functools.partial(unit, protocol, method, seed, quick=quick)
                done[key] = make() if quick else common.kept("meta_ctr", key, make)
                print(key, json.dumps(done[key]), flush=True)
    return done


class Found:
    """Metrics over seeds, by protocol, shown method, k and metric."""

    def __init__(self, done: Mapping[str, Mapping[str, Any]]) -> None:
        self.values: dict[tuple[str, str, str, str], list[float]] = {}
        for key, result in done.items():
            protocol, method, _ = key.split()
            for k, found in result.items():
                shown = "fine-tuned" if method == "plain" and k != "plain" else method
                for metric in METRICS:
                    self.values.setdefault((protocol, shown, k, metric), []).append(found[metric])

    def mean(self, *key: str) -> float:
        """Mean over seeds."""
        return float(np.mean(self.values[key]))  # type: ignore[index]

    def gain(self, protocol: str, method: str, metric: str, k: str = "20") -> float:
        """Adapted minus unadapted, of the same weights."""
        base = "plain" if method == "fine-tuned" else method
        return self.mean(protocol, method, k, metric) - self.mean(protocol, base, "plain", metric)

    def over_plain(self, protocol: str, method: str, metric: str) -> list[float]:
        """What each seed gains over the plain model of that seed, at k = 20 where it adapts."""
        ours = self.values.get((protocol, method, "20", metric))
        ours = ours or self.values[protocol, method, "plain", metric]
        plain = self.values[protocol, "plain", "plain", metric]
        return [a - b for a, b in zip(ours, plain, strict=True)]


def run(*, quick: bool) -> dict[str, Any]:
    """All methods under all protocols."""
    found = Found(all_units(quick=quick))
    rows = []
    for protocol, shown_protocol in PROTOCOLS.items():
        for method, shown in METHODS.items():
            row: dict[str, Any] = {"data": shown_protocol, "method": shown}
            for k in ("plain", *map(str, SIZES)):
                for metric in METRICS:
                    if metric == "gauc" and k not in ("plain", "20"):
                        continue
                    values = found.values.get((protocol, method, k, metric))
                    column = f"{metric.upper()} {'unadapted' if k == 'plain' else f'k = {k}'}"
                    row[column] = common.shown(values) if values else ""
            for metric in METRICS:
                gains = [] if method == "plain" else found.over_plain(protocol, method, metric)
                row[f"{metric.upper()} over plain"] = common.shown(gains) if gains else ""
            rows.append(row)
    new, every, kuairand = "new_users", "all_users", ("kuairand_id", "kuairand_no_id")
    plain_auc = found.mean(new, "plain", "plain", "auc")
    plain_gauc = found.mean(new, "plain", "plain", "gauc")
    auc, gauc = found.mean(new, "meta", "20", "auc"), found.mean(new, "meta", "20", "gauc")
    worst = {
        method: min(found.gain(p, method, "auc", str(k)) for p in PROTOCOLS for k in SIZES)
        for method in ("meta", "fine-tuned")
    }
    target = common.target
    targets = {
        "new users, k = 20: AUC over plain": target(auc - plain_auc, 0.03),
        "new users, k = 20: GAUC over plain": target(gauc - plain_gauc, 0.003),
        "new users, k = 20: AUC over fine-tuned": target(
            auc - found.mean(new, "fine-tuned", "20", "auc"), 0.004
        ),
        "new users, history + meta, k = 20: GAUC adapted - unadapted": target(
            found.gain(new, "history_meta", "gauc"), 0.001
        ),
        "all users: AUC adapted - unadapted": target(found.gain(every, "meta", "auc"), 0.003),
        **{
            f"{PROTOCOLS[p]}: AUC adapted - unadapted": target(found.gain(p, "meta", "auc"), 0.001)
            for p in kuairand
        },
        **{
            f"{METHODS[m]}: least AUC adapted - unadapted of any protocol and k": target(w, -0.002)
            for m, w in worst.items()
        },
    }
    sha256 = {
        name: common.sha256(folder(name)) for name in (*movielens_1m_meta.PROTOCOLS, kuairand[0])
    }
    return {"data_sha256": sha256, "rows": rows, "targets": targets}
