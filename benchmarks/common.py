"""What the benchmarks share: prepared data, quiet training, means over seeds."""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import tf_keras
from ml_collections import ConfigDict

from qianmo.configs import base
from qianmo.layers import metrics
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.datasets import kuairand as _kuairand
from qianmo.pipelines.datasets import movielens_1m as _movielens_1m
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run, train

ROOT = pathlib.Path(__file__).parents[1]
CACHE = ROOT / "runs" / "benchmarks"


def kept(name: str, key: str, make: Callable[[], Any]) -> Any:
    """What an interrupted run of a benchmark left under that key; else `make()`, which is kept.

    What was left is forgotten when the benchmark or a recipe has changed since.
    """
    sources = [ROOT / "benchmarks" / f"bench_{name}.py", *sorted((ROOT / "configs").glob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    path = CACHE / f"{name}.partial.json"
    done = run_dir.read_json(path, {})
    if done.get("sources") != digest:
        done = {"sources": digest}
    if key not in done:
        done[key] = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        run_dir.write_json(path, done)
    return done[key]


def finished(name: str) -> None:
    """Forgets what `kept` holds of a benchmark."""
    (CACHE / f"{name}.partial.json").unlink(missing_ok=True)


def movielens_1m(
    split: str, *, support_history: bool = False, ties: str = "excluded"
) -> pathlib.Path:
    """MovieLens-1M, prepared once."""
    source = os.environ.get("QIANMO_MOVIELENS_1M")
    if not source:
        raise SystemExit(
            "Set QIANMO_MOVIELENS_1M to a folder with ratings.parquet, users.parquet and "
            "movies.parquet; the licence of MovieLens-1M does not let us ship it."
        )
    folder = CACHE / f"movielens_1m_{split}{'_history' * support_history}_{ties}"
    if not folder.exists():
        arguments = {"split": split, "support_history": support_history, "ties": ties}
        _movielens_1m.movielens_1m(source, folder, **arguments)
    return folder


def kuairand(*, support_history: bool = False) -> pathlib.Path:
    """The shipped KuaiRand sample, prepared once."""
    folder = CACHE / f"kuairand{'_history' * support_history}"
    if not (folder / "test_support.parquet").exists():
        _kuairand.kuairand(None, folder, support_history=support_history, overwrite=True)
    return folder


def sha256(folder: pathlib.Path) -> dict[str, str]:
    """Of each part of prepared data."""
    return {p.stem: readers.sha256(p) for p in sorted(folder.glob("*.parquet"))}


@contextmanager
def model_dir() -> Iterator[pathlib.Path]:
    """A folder for one run, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder) / "model"


def point(config: ConfigDict, folder: pathlib.Path, *, valid: bool) -> ConfigDict:
    """Points a recipe to prepared data."""
    for part in ("train", "valid", "test"):
        config.data[part] = f"{part}.parquet"
    if not valid:
        config.data.valid = config.data.valid_support = ""
    return base.point(config, folder)


def trained_model(config: ConfigDict) -> Ranker:
    """Trains a recipe without a report of test rows; returns the model."""
    config.data.test = config.data.test_support = ""
    tf_keras.backend.clear_session()
    with model_dir() as temporary:
        run = Run(Recipe.from_config(config.to_dict()), temporary)
        run.train()
    return run.model


def auc_and_gauc(labels: Any, probabilities: Any, users: Any) -> dict[str, float]:
    """Of one label's rows."""
    return {
        "auc": metrics.auc(labels, probabilities),
        "gauc": metrics.gauc(labels, probabilities, users),
    }


def trained(config: ConfigDict, folder: pathlib.Path | None = None) -> dict[str, Any]:
    """Trains a recipe; returns its report."""
    tf_keras.backend.clear_session()
    recipe = Recipe.from_config(config.to_dict())
    if folder is not None:
        return train(recipe, folder)
    with model_dir() as temporary:
        return train(recipe, temporary)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def shown(values: Sequence[float], digits: int = 4) -> str:
    """`mean +- sd` as text; one value stands alone."""
    mean, sd = mean_and_sd(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def target(value: float, bound: float, *, at_most: bool = False, met: bool | None = None) -> Any:
    """A target's entry."""
    if met is None:
        met = value <= bound if at_most else value >= bound
    asked = f"{'<=' if at_most else '>='} {bound:g}"
    return {"value": round(float(value), 6), "target": asked, "met": bool(met)}


def test_metrics(report: Mapping[str, Any], head: str) -> dict[str, float]:
    """Metrics of a report's first label on all test rows."""
    labels = report["test"][head]
    return dict(next(iter(labels.values()))["all"])
