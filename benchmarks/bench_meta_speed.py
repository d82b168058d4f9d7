"""Episodes in the training step, and MeLU's net on one thread.

Steps: MovieLens-1M rows of 64 users, 16 of each, half of them support; an MLP 256-128, a seam of 64
and a tower 64-32-1. The plain step is that of the same model and batch without episodes. The loop
does the episodes' part of one step, loss and gradients, one task after the other in one graph.

MeLU: 8 vectors of 32, all three dense layers 256-64-64-1 adapted by 5 steps, 32 users of 13 to 100
ratings in a batch, padded to the longest, three quarters of the rows support. Meta-training is the
whole step, from ids to the optimisers' updates of net and tables, of users as they are drawn;
adaptation is ids to the adapted scores of the query rows, of the same users, by size: what a user
gets does not depend on the batch.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import numpy as np
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

from qianmo.configs import movielens_1m_melu, movielens_1m_meta
from qianmo.configs.base import base_config
from qianmo.layers.inner_loop import Support
from qianmo.layers.label_heads import elementwise
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.models.road import Road
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.data.replay import columns
from qianmo.pipelines.evaluation import cost
from qianmo.pipelines.recipe import Recipe, optimizer
from qianmo.pipelines.training import runtime

TASKS, ROWS, H = 64, 16, 64
STEP_SIZE, SHRINKAGE = 0.1, 3.0
MELU_TASKS, MELU_BATCHES = 32, 4
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "1 step": {},
    "1 step, materialised": {"form": "materialised"},
    "1 step, first order": {"first_order": True},
    "3 steps": {"steps": 3},
    "3 steps, materialised": {"steps": 3, "form": "materialised"},
    "3 steps, first order": {"steps": 3, "first_order": True},
}

Batch = tuple[Mapping[str, tf.Tensor], Mapping[str, tf.Tensor]]


def completed(config: ConfigDict) -> Schema:
    """Counts the recipe's vocabularies."""
    schema = Recipe.from_config(config.to_dict()).schema
    schema = statistics.complete(schema, config.data.train)
    config.schema = schema.to_config()
    return schema


def compiled(model: Ranker, config: ConfigDict) -> Ranker:
    """Gives a model the optimisers of its recipe."""
    train = Recipe.from_config(config.to_dict()).train
    names = ("optimizer", "table_optimizer", "meta_optimizer")
    model.compile(*(optimizer(getattr(train, name), name) for name in names))
    return model


def batch(schema: Schema, rows: Mapping[str, np.ndarray], index: np.ndarray) -> Batch:
    """Some rows as a batch."""
    taken = {name: column[index] for name, column in rows.items()}
    return tf.nest.map_structure(tf.constant, readers.batch(schema, taken))


def by_task(task: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each task, in the rows' order."""
    order = np.argsort(task, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(task[order])) + 1)


def loop(
    weights: list[tf.Variable], h: tf.Tensor, labels: tf.Tensor, steps: int
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Loss and gradients of the episodes of [T, R, H], one task after the other."""

    def logits(at: list[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
        for layer in range(0, len(at) - 2, 2):
            x = tf.nn.relu(x @ at[layer] + at[layer + 1])
        return x @ at[-2] + at[-1]

    def bce(at: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(elementwise((), y, logits(at, x)))

    half = ROWS // 2
    with tf.GradientTape() as tape:
        tape.watch(h)
        phi = [tf.convert_to_tensor(w) for w in weights]
        losses = []
        for task in range(TASKS):
            at = phi
            for _ in range(steps):
                with tf.GradientTape() as inner:
                    inner.watch(at)
                    support = tf.stop_gradient(h[task, :half])
                    loss = bce(at, support, labels[task, :half]) / (half + SHRINKAGE)
                moves = inner.gradient(loss, at)
                at = [w - STEP_SIZE * g for w, g in zip(at, moves, strict=True)]
            losses.append(bce(at, h[task, half:], labels[task, half:]))
        total = tf.add_n(losses) / (TASKS * (ROWS - half))
    return total, tape.gradient(total, [*weights, h])


def part(
    model: Ranker, h: tf.Tensor, labels: tf.Tensor, task: tf.Tensor
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """The same by the model, from its rows [B, H]."""
    assert model.meta is not None
    tower = model.tower_of(model.serving_head)
    with tf.GradientTape() as tape:
        tape.watch(h)
        time, step = tf.zeros_like(task), tf.zeros([], tf.int64)
        loss = model.meta.loss(
            tower, h, labels, tf.ones_like(labels[:, 0]), tf.ones_like(labels), task, time, step
        )
    gradients = tape.gradient(loss, [*tower.trainable_variables, h])
    return loss, [tf.convert_to_tensor(g) for g in gradients]


def steps_and_loops(
    quick: bool,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
    """Seconds of whole training steps, and of the episodes' part against the loop."""
    folder = common.movielens_1m("time")
    config = common.point(movielens_1m_meta.get_config("all_users-plain"), folder, valid=False)
    schema = completed(config)
    rows = columns(schema, config.data.train, 1 << 18)
    index = [own[:ROWS] for own in by_task(rows[schema.task_id]) if len(own) >= ROWS]
    data = batch(schema, rows, np.concatenate(index[:TASKS]))
    whole: dict[str, Callable[[], Any]] = {}
    parts: dict[str, Callable[[], Any]] = {}
    eager: dict[str, Callable[[], Any]] = {}
    random = np.random.default_rng(1)
    h = tf.constant(random.normal(size=(TASKS * ROWS, H)).astype(np.float32))
    labels = tf.constant(random.integers(0, 2, (TASKS * ROWS, 1)).astype(np.float32))
    task = tf.repeat(tf.range(TASKS), ROWS)
    for name, inner in VARIANTS.items():
        tf_keras.utils.set_random_seed(1)
        config.model = {
            "name": "mlp",
            "units": (256, 128),
            "seam_dim": H,
            "tower_units": (64, 32),
            "embedding_l2": 1e-2,
        }
        if inner is not None:
            start = {"step_size": STEP_SIZE, "shrinkage": SHRINKAGE}
            config.model.meta = {"inner": {**start, **inner}}
        model = run_dir.build(Recipe.from_config(config.to_dict()))
        step = tf.function(compiled(model, config).train_step)
        whole[name] = lambda step=step: step(data)["loss"].numpy()
        if inner is None:
            continue
        alone = tf.function(functools.partial(part, model))
        parts[name] = lambda alone=alone: alone(h, labels, task)[0].numpy()
        if name in ("1 step", "3 steps"):
            weights = model.tower_of("model").trainable_variables
            one_by_one = functools.partial(loop, weights, steps=inner.get("steps", 1))
            shaped = [tf.reshape(x, [TASKS, ROWS, -1]) for x in (h, labels)]
            graph = tf.function(one_by_one)
            parts[f"{name}, loop over tasks"] = lambda graph=graph, x=shaped: graph(*x)[0].numpy()
            eager[f"{name}, eager loop over tasks"] = lambda f=one_by_one, x=shaped: f(*x)[
                0
            ].numpy()
            for ours, theirs in zip(alone(h, labels, task)[1], one_by_one(*shaped)[1], strict=True):
                np.testing.assert_allclose(ours, tf.reshape(theirs, ours.shape), atol=1e-5)
    repeats = 2 if quick else 15
    alone_took = {**cost.times(parts, repeats), **cost.times(eager, 1)}
    return cost.times(whole, repeats), alone_took, common.sha256(folder)


class MeLU(Road):
    """MeLU's objective: episodes alone, without a loss of the unadapted net."""

    def loss_terms(self, heads: Mapping[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
        """Nothing."""
        return {"none": tf.zeros_like(targets["weight"])}


def padded(first: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of each task, [T, most], and 1 where there is a row, else 0, [T, most, 1]."""
    place = np.arange(count.max())
    inside = place < count[:, None]
    return np.where(inside, first[:, None] + place, 0), inside[:, :, None].astype(np.float32)


def melu(quick: bool) -> dict[str, float]:
    """Tasks/s of processor time of MeLU's net; in a process of its own, which keeps one thread."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    runtime.settle()
    folder = common.movielens_1m("melu")
    config = base_config()
    config.schema = {
        **movielens_1m_melu.schema(),
        "label_kinds": {"label": "rating"},
        "label_moments": {"label": (0.0, 1.0)},
    }
    common.point(config, folder, valid=False)
    inner = {"steps": 5, "step_size": 0.01, "max_support": 100}
    meta = {"inner": inner, "support_share": 0.75, "max_query": 100, "gradient_to": "embeddings"}
    config.model = {"name": "mlp", "units": (), "tower_units": (64, 64), "meta": meta}
    schema = completed(config)
    model = run_dir.build(Recipe.from_config(config.to_dict()))
    model = compiled(MeLU.from_config(model.get_config()), config)
    parts = [columns(schema, str(folder / f"{name}.parquet")) for name in ("test_support", "test")]
    rows = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    warm = rows[schema.task_id] < 10_000  # the first of the four states
    rows = {name: column[warm] for name, column in rows.items()}
    tasks = by_task(rows[schema.task_id])
    drawn = np.random.default_rng(1).permutation(len(tasks))[: MELU_TASKS * MELU_BATCHES]
    by_size = sorted(drawn, key=lambda task: len(tasks[task]))

    def asked(order: Sequence[int]) -> list[tuple[Batch, list[tf.Tensor]]]:
        """Batches, each with its users' support rows, their weights and query rows."""
        found = []
        for i in range(0, len(order), MELU_TASKS):
            own = [tasks[task] for task in order[i : i + MELU_TASKS]]
            counts = np.array([len(x) for x in own])
            used = (0.75 * counts).astype(np.int64)
            first = np.cumsum(counts) - counts
            numbers = (*padded(first, used), padded(first + used, counts - used)[0])
            data = batch(schema, rows, np.concatenate(own))
            found.append((data, [tf.constant(x) for x in numbers]))
        return found

    train = tf.function(model.train_step, reduce_retracing=True)

    @tf.function(reduce_retracing=True)
    def adapt(data: Batch, support: tf.Tensor, weights: tf.Tensor, query: tf.Tensor) -> tf.Tensor:
        h = model.tower_input(data[0], "model")
        own = Support(tf.gather(h, support), tf.gather(data[1]["labels"], support), weights)
        correction = model.meta.inner.adapt(model.tower, own)
        return model.tower(tf.gather(h, query), correction=correction).logits

    as_drawn, alike = asked(drawn), asked(by_size)
    calls = {
        "training": lambda: [train(data)["loss"] for data, _ in as_drawn][-1].numpy(),
        "adaptation": lambda: [adapt(data, *numbers) for data, numbers in alike][-1].numpy(),
        "adaptation, users as drawn": lambda: [adapt(data, *numbers) for data, numbers in as_drawn][
            -1
        ].numpy(),
    }
    # Of one thread the processor's time tells, whoever else wants the processor.
    took = cost.times(calls, 2 if quick else 8, clock=time.process_time)
    return {
        name: MELU_BATCHES * MELU_TASKS / float(np.median(seconds))
        for name, seconds in took.items()
    }


def run(*, quick: bool) -> dict[str, Any]:
    """Steps and loops, then MeLU's net."""
    runtime.settle()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        rates = pool.apply(melu, (quick,))
    whole, parts, sha256 = steps_and_loops(quick)
    plain = float(np.median(whole["plain"]))
    table = [
        {
            "what": f"training step, {name}",
            "ms": 1e3 * float(np.median(seconds)),
            "against plain": float(np.median(seconds)) / plain,
        }
        for name, seconds in whole.items()
    ]
    table += [
        {"what": f"episodes alone, {name}", "ms": 1e3 * float(np.median(seconds))}
        for name, seconds in parts.items()
    ]
    table += [
        {"what": f"MeLU's net, {name}, one thread", "tasks/s": rate} for name, rate in rates.items()
    ]

    def faster(steps: str, kind: str) -> float:
        return float(np.median(parts[f"{steps}, {kind} over tasks"]) / np.median(parts[steps]))

    target = common.target
    targets = {
        "training step, 1 step: time / plain": target(
            float(np.median(whole["1 step"])) / plain, 1.5, at_most=True
        ),
        "training step, 3 steps: time / plain": target(
            float(np.median(whole["3 steps"])) / plain, 2.2, at_most=True
        ),
        "1 step: loop over tasks in the graph / ours, time": target(faster("1 step", "loop"), 10),
        "1 step: eager loop over tasks / ours, time": target(faster("1 step", "eager loop"), 10),
        "3 steps: loop over tasks in the graph / ours, time": target(faster("3 steps", "loop"), 10),
        "MeLU's net, tasks/s of meta-training": target(rates["training"], 370),
        "MeLU's net, tasks/s of adaptation": target(rates["adaptation"], 1800),
    }
    sha = {"time": sha256, "melu": common.sha256(common.movielens_1m("melu"))}
    return {"data_sha256": sha, "rows": table, "targets": targets}
