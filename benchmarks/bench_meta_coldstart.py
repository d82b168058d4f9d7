"""MovieLens-1M's new users and new films: MeLU's four states.

The honest protocol of `protocols.melu`: ratings of warm users and films train, without those to be
scored. A column is the mean absolute error of ratings in one state and, beside it, how it differs
from that of two shrunk means on the same users (and the standard error over users). Rows that
predict the mean of a rating, which is what the references do, stand apart from those that predict
its median, which a mean absolute error rewards whatever the model.

Finished units are kept in runs/benchmarks/meta_coldstart, from which a killed run goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import common
import melu_references as references
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import tensorflow as tf
import tf_keras

from qianmo.configs import movielens_1m_coldstart, movielens_1m_melu
from qianmo.layers.bottom import Bottom
from qianmo.layers.inner_loop import Support
from qianmo.layers.schema import Schema
from qianmo.layers.tower import Tower
from qianmo.models.ranker import Ranker
from qianmo.models.road import Road
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import chunks, readers, statistics
from qianmo.pipelines.datasets.protocols import STATES
from qianmo.pipelines.recipe import optimizer

SEEDS, PLAIN_SEEDS, MELU_SEEDS = (1, 2, 3, 4, 5), (1, 2, 3), (1,)
DONE = common.CACHE / "meta_coldstart"
USERS = (2653, 668, 2863, 723)  # of each state
BAR = (0.7415, 0.7425, 0.8867, 0.8745)
STRETCH = (0.726, 0.725, 0.872, 0.870)
MELU = (0.745, 0.754, 0.916, 0.906)
SHOWN = dict(zip(STATES, ("warm", "new users", "new films", "both new"), strict=True))
STEPS = (0, 1, 5, 8, 16)  # the recipe's own are among them
SERVING_STEPS = 16  # best on `valid`: what is known has shaped the vectors, new tasks need more

HELD: dict[Any, Any] = {}  # rows that were read

Errors = dict[str, npt.NDArray[np.float64]]


@dataclasses.dataclass
class Rows:
    """Rows as a model reads them, and where each task's are: [T, most], with a mask."""

    features: list[Mapping[str, tf.Tensor]]
    labels: npt.NDArray[np.float32]
    index: npt.NDArray[np.int64]
    is_there: npt.NDArray[np.bool_]

    @classmethod
    def read(cls, schema: Schema, path: pathlib.Path, tasks: npt.NDArray[np.int64]) -> Rows:
        """Reads a file; `tasks` rise."""
        key = path, schema.input_names
        if key not in HELD:
            HELD[key] = [*readers.dataset(schema, str(path), batch_size=16384)]
        batches = HELD[key]
        labels, ids = (
            np.concatenate([targets[name].numpy() for _, targets in batches])
            for name in ("labels", "task_id")
        )
        order = np.argsort(ids, kind="stable")
        first, stop = (np.searchsorted(ids[order], tasks, side) for side in ("left", "right"))
        places = first[:, None] + np.arange((stop - first).max())
        is_there = places < stop[:, None]
        return cls([f for f, _ in batches], labels, order[np.where(is_there, places, 0)], is_there)


def logits(
    model: Ranker, query: Rows, support: Rows, all_steps: Sequence[int]
) -> dict[int, npt.NDArray[np.float32]]:
    """Logits of the query rows after so many steps on their tasks' support."""
    meta, head = model.meta, model.serving_head
    assert meta is not None
    tower = model.tower_of(head)
    encode = tf.function(lambda features: model.tower_input(features, head), reduce_retracing=True)
    h, support_h = (
        np.concatenate([encode(batch).numpy() for batch in rows.features])
        for rows in (query, support)
    )
    found = {}
    for steps in all_steps:

        @tf.function(reduce_retracing=True)
        def adapted(
            h: tf.Tensor, h_s: tf.Tensor, y_s: tf.Tensor, w_s: tf.Tensor, steps: int = steps
        ) -> tf.Tensor:
            if not steps:
                return tower(h).logits
            adaptation = meta.inner.adapt(tower, Support(h_s, y_s, w_s), steps)
            return tower(h, correction=adaptation).logits

        values = np.empty((len(h), query.labels.shape[1]), np.float32)
        for first in range(0, len(query.index), 256):
            some = slice(first, first + 256)
            rows = support.index[some]
            y_s = support.labels[rows]
            w_s = np.broadcast_to(support.is_there[some, :, None], y_s.shape).astype(np.float32)
            z = adapted(*map(tf.constant, (h[query.index[some]], support_h[rows], y_s, w_s)))
            values[query.index[some][query.is_there[some]]] = z.numpy()[query.is_there[some]]
        found[steps] = values
    return found


def mean_rating(z: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """1 + sum_k p(rating >= k), of logits for k = 2 to 5."""
    return 1 + (1 / (1 + np.exp(-z.astype(np.float64)))).sum(1)


def median_rating(z: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The least rating that is not exceeded with probability 1/2 or more."""
    return 1 + (z > 0).sum(1).astype(np.float64)


def learned(method: str, seed: int, folder: pathlib.Path, parts: Sequence[str]) -> dict[str, Any]:
    """Trains the recipe and predicts by its weights after some numbers of steps."""
    config = movielens_1m_coldstart.get_config(method)
    for part in ("train", "valid", "test", "test_support"):
        config.data[part] = str(folder / f"{parts[0]}.parquet") if part == "train" else ""
    config.train.seed = seed
    model = common.trained_model(config)
    support, query = read(model.schema, folder, parts)
    steps = STEPS if method == "meta" else (0, SERVING_STEPS)
    found: dict[str, Any] = {}
    for k, z in logits(model, query, support, steps).items():
        found[f"mean {k}"] = mean_rating(z)
        found[f"median {k}"] = median_rating(z)
    return found


def melu(seed: int, folder: pathlib.Path, parts: Sequence[str], epochs: int = 30) -> dict[str, Any]:
    """MeLU's own net and training, of our layers: no ids, no original loss, three dense layers."""
    train = str(folder / f"{parts[0]}.parquet")
    of_rating = {"label_kinds": {"label": "rating"}, "label_moments": {"label": (0.0, 1.0)}}
    config = {**movielens_1m_melu.schema(), **of_rating}
    schema = statistics.complete(Schema.from_config(config), train)
    tf_keras.utils.set_random_seed(seed)
    inner = {"steps": 5, "step_size": 0.01, "max_support": 100}
    model = Road(
        schema,
        Bottom(flat=True, name="bottom"),
        Tower(1, (64, 64), name="tower"),
        embedding_stddev=0.1,
        meta={"inner": inner, "split": "random", "max_query": 100, "gradient_to": "embeddings"},
    )
    adam = {"learning_rate": 1e-3}
    model.compile(
        optimizer({"name": "adam", **adam}, "dense"),
        optimizer({"name": "sparse_adam", **adam}, "tables"),
        steps_per_execution=16,
    )
    reader = chunks.ChunkReader(schema, train, rows=100, tasks=32)

    def of_ratings(features: Any, targets: Any) -> Any:
        labels, original = 1 + 4 * targets["labels"], tf.zeros_like(targets["original"])
        return features, {**targets, "labels": labels, "original": original}

    for epoch in range(epochs):
        data = reader.dataset(seed=seed, epoch=epoch).map(of_ratings)
        model.fit(data, steps_per_epoch=reader.num_batches(), verbose=0)
    support, query = read(schema, folder, parts)
    support.labels = 1 + 4 * support.labels
    steps = (0, 5)
    return {
        f"mean {k}": z[:, 0].astype(np.float64)
        for k, z in logits(model, query, support, steps).items()
    }


def read(schema: Schema, folder: pathlib.Path, parts: Sequence[str]) -> tuple[Rows, Rows]:
    """Support and rows to be scored, of the tasks of the latter."""
    tasks = np.unique(pq.read_table(folder / f"{parts[2]}.parquet", columns=["task"])["task"])
    support, query = (Rows.read(schema, folder / f"{part}.parquet", tasks) for part in parts[1:])
    return support, query


def unit(name: str, seed: int, folder: pathlib.Path, *, quick: bool) -> dict[str, Errors]:
    """Errors of one trained model, by what is predicted and state; from DONE where it is there."""
    parts = ("fit", "valid_support", "valid") if quick else ("train", "test_support", "test")
    says = json.dumps(
        [movielens_1m_coldstart.get_config(name).to_dict() if name != "melu" else "", seed, parts],
        sort_keys=True,
    )
    file = DONE / f"{name}_{seed}_{hashlib.sha256(says.encode()).hexdigest()[:12]}.npz"
    if not file.exists():
        tf_keras.backend.clear_session()
        if name == "melu":
            predicted = melu(seed, folder, parts, **({"epochs": 1} if quick else {}))
        else:
            predicted = learned(name, seed, folder, parts)
        test = pq.read_table(folder / f"{parts[2]}.parquet")
        found = {key: references.errors(values, test) for key, values in predicted.items()}
        for key, errors in found.items():
            print(name, seed, key, *(f"{e.mean():.4f}" for e in errors.values()), flush=True)
        if quick:
            return found
        DONE.mkdir(parents=True, exist_ok=True)
        flat = {f"{key}/{s}": e for key, errors in found.items() for s, e in errors.items()}
        with open(file, "wb") as out:
            np.savez(out, **flat)
    stored = np.load(file, allow_pickle=False)
    keys = dict.fromkeys(key.split("/")[0] for key in stored)
    return {key: {state: stored[f"{key}/{state}"] for state in STATES} for key in keys}


def row(shown: str, runs: Sequence[Errors], bar: Errors) -> dict[str, Any]:
    """A model's row: its error in each state, and the difference to the bar's, user by user."""
    cells: dict[str, Any] = {"model": shown, "seeds": len(runs)}
    for state in STATES:
        errors = np.array([found[state] for found in runs])
        means = errors.mean(1)
        many = len(runs) > 1
        cells[SHOWN[state]] = common.shown([*means]) if many else f"{means[0]:.4f}"
        gap = errors.mean(0) - bar[state]
        se = gap.std(ddof=1) / math.sqrt(len(gap))
        cells[f"{SHOWN[state]}, - bar"] = f"{gap.mean():+.4f} ({se:.4f})" if gap.any() else ""
    return cells


def run(*, quick: bool) -> dict[str, Any]:
    """The references, our model in several ways, and MeLU's setting."""
    folder = common.movielens_1m("melu")
    names = ("fit", "valid_support", "valid") if quick else ("train", "test_support", "test")
    train, support, test = (pq.read_table(folder / f"{part}.parquet") for part in names)
    two_means, ridge = (
        model(train, support, test) for model in (references.two_means, references.kernel_ridge)
    )

    def of(predicted: npt.NDArray[np.float64]) -> list[Errors]:
        return [references.errors(predicted, test)]

    def rounded(predicted: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip(np.round(predicted), 1, 5)

    bar = of(two_means)[0]
    counts = tuple(len(bar[state]) for state in STATES)
    if not quick and counts != USERS:
        raise ValueError(f"The states should have {USERS} users. Received: {counts}")
    units = {
        name: [unit(name, seed, folder, quick=quick) for seed in (seeds[:1] if quick else seeds)]
        for name, seeds in (("meta", SEEDS), ("melu", MELU_SEEDS), ("plain", PLAIN_SEEDS))
    }

    def seeds_of(name: str, key: str) -> list[Errors]:
        return [found[key] for found in units[name]]

    trained, own = movielens_1m_coldstart.STEPS, SERVING_STEPS
    rows = [
        row("two shrunk means (the bar)", [bar], bar),
        row("kernel ridge", of(ridge), bar),
        row(f"meta tower, {own} steps", seeds_of("meta", f"mean {own}"), bar),
        *(
            row(
                f"the same weights, {k} step{'s' * (k != 1)}{', as trained' * (k == trained)}",
                seeds_of("meta", f"mean {k}"),
                bar,
            )
            for k in STEPS
            if k != own
        ),
        row("trained without meta, unadapted", seeds_of("plain", "mean 0"), bar),
        row(f"trained without meta, fine-tuned {own} steps", seeds_of("plain", f"mean {own}"), bar),
        row("MeLU's setting", seeds_of("melu", "mean 5"), bar),
        row("MeLU's setting, unadapted", seeds_of("melu", "mean 0"), bar),
        row("medians: two shrunk means, rounded", of(rounded(two_means)), bar),
        row("medians: kernel ridge, rounded", of(rounded(ridge)), bar),
        row(f"medians: meta tower, {own} steps", seeds_of("meta", f"median {own}"), bar),
        row(
            f"medians: trained without meta, fine-tuned {own} steps",
            seeds_of("plain", f"median {own}"),
            bar,
        ),
    ]
    targets = {}
    for key, shown, bounds in (
        (f"mean {own}", "meta tower", BAR),
        (f"mean {own}", "meta tower, stretch", STRETCH),
    ):
        for state, bound in zip(STATES, bounds, strict=True):
            value = float(np.mean([e[state].mean() for e in seeds_of("meta", key)]))
            targets[f"{SHOWN[state]}: {shown}"] = common.target(value, bound, at_most=True)
    for state, bound in zip(STATES, MELU, strict=True):
        value = float(np.mean([e[state].mean() for e in seeds_of("melu", "mean 5")]))
        targets[f"{SHOWN[state]}: MeLU's setting - {bound}, either way"] = common.target(
            abs(value - bound), 0.015, at_most=True
        )
    return {
        "data_sha256": common.sha256(folder),
        "users": dict(zip(STATES, counts, strict=True)),
        "config": run_dir.plain(movielens_1m_coldstart.get_config("meta").to_dict()),
        "rows": rows,
        "targets": targets,
    }
