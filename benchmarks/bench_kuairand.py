"""KuaiRand clicks: the dual DNN's student and teacher beside models that are trained alone.

Every model has the same features and stopping rule. The epoch is chosen on 4 May, each model by
its own AUC; 5 May is read once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import common
import numpy as np
from ml_collections import ConfigDict

from qianmo.configs import kuairand_dual_dnn

# Shown name -> (recipe, head).
MODELS = {
    "logistic regression": ("lr", "model"),
    "DeepFM": ("deepfm", "model"),
    "MLP = student alone": ("student_alone", "student"),
    "student of the dual DNN": ("dual", "student"),
    "teacher of the dual DNN": ("dual", "teacher"),
    "teacher alone": ("teacher_alone", "model"),
}
# One-hot logistic regression on ids and attributes on the same split.
REFERENCE = {"auc": 0.7153, "gauc": 0.6133}


def recipe(name: str) -> ConfigDict:
    """A variant of the recipe, or another model on the same features."""
    if name not in ("lr", "deepfm"):
        return kuairand_dual_dnn.get_config(name)
    config = kuairand_dual_dnn.get_config("student_alone")
    units = config.model.student_units
    config.model = {"name": name, "embedding_l2": config.model.embedding_l2}
    if name == "deepfm":
        config.model.units = units
    else:  # its weights are the logit's own terms, and have further to go
        for optimizer in (config.train.optimizer, config.train.table_optimizer):
            optimizer.learning_rate = 5e-3
    return config


def run(*, quick: bool) -> dict[str, Any]:
    """All models, seed by seed in turn."""
    folder = common.kuairand()
    seeds = [1] if quick else [1, 2, 3, 4, 5]
    found: dict[str, list[Mapping[str, Any]]] = {}
    for seed in seeds:
        for name in dict.fromkeys(name for name, _ in MODELS.values()):
            config = common.point(recipe(name), folder, valid=True)
            config.train.seed = seed
            if quick:
                config.train.epochs = 1
            found.setdefault(name, []).append(common.trained(config))
    rows, auc, gauc = [], {}, {}
    for shown, (name, head) in MODELS.items():
        tests = [common.test_metrics(report, head) for report in found[name]]
        epochs = [epoch for report in found[name] for epoch in report["history"]]
        auc[shown] = float(np.mean([t["auc"] for t in tests]))
        gauc[shown] = float(np.mean([t["gauc"] for t in tests]))
        rows.append(
            {
                "model": shown,
                "AUC": common.shown([t["auc"] for t in tests]),
                "GAUC": common.shown([t["gauc"] for t in tests]),
                "log loss": common.shown([t["log_loss"] for t in tests]),
                "PCOC": common.shown([t["pcoc"] for t in tests], 3),
                "training samples/s": float(np.median([e["samples_per_second"] for e in epochs])),
            }
        )
    targets = {}
    for shown in MODELS:
        if "student" in shown or "teacher" in shown:
            targets[f"{shown}: AUC"] = common.target(auc[shown], 0.744)
            targets[f"{shown}: GAUC"] = common.target(gauc[shown], 0.62)
    # Anything must beat one-hot logistic regression on ids and attributes, without any history.
    student, without = "student of the dual DNN", "against logistic regression without history"
    targets[f"{student}: AUC, {without}"] = common.target(auc[student], REFERENCE["auc"])
    targets[f"{student}: GAUC, {without}"] = common.target(gauc[student], REFERENCE["gauc"])
    return {"data_sha256": common.sha256(folder), "rows": rows, "targets": targets}
