"""What belongs to one domain or label stays as it is in steps that do not speak of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.own_weights import Own, collect, spoken_of
from qianmo.layers.rowwise_adagrad import RowwiseAdagrad
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.models import zoo

Array = Any
Part = tuple[Any, Any]  # a variable, and an index of what is owned of it
SCENES = (7, 1, 4)  # places 1, 2 and 3
SCHEMA = Schema(
    features=(
        Categorical(name="scene", vocabulary=SCENES, dim=4),
        Categorical(name="user", num_ids=9, dim=4, side="user"),
        Categorical(name="topic", num_ids=9, dim=4, domains=(1,)),
        Dense(name="age", mean=0.0, variance=1.0, side="user"),
    ),
    labels=("click", "like"),
    domain="scene",
    task_id="user",
)
ALL, EXPERT = slice(None), {"expert_units": (6,), "tower_units": (4,)}


def whole(*layers: Any) -> list[Part]:
    return [(v, ...) for layer in layers for v in layer.trainable_weights]


def columns(dense: Any, first: int, size: int = 1) -> list[Part]:
    here = slice(first, first + size)
    return [(dense.kernel, (ALL, here)), (dense.bias, here)]


def leaves(tower: Any, p: int) -> list[Part]:
    return [(v, p - 1) for leaf in tower.leaves for v in leaf.trainable_weights]


def norm(layer: Any, p: int) -> list[Part]:
    return [(v, p - 1) for v in (layer.domain_gammas, layer.domain_betas)]


# model -> config, and what place p owns of it
DOMAINS: dict[str, tuple[dict[str, Any], Callable[[Any, int], list[Part]]]] = {
    "star": (
        {"name": "star", "units": (6, 4), "norm": True},
        lambda m, p: leaves(m.tower, p) + norm(m.tower.norm, p),
    ),
    "cross_domain": (
        {"name": "cross_domain", **EXPERT},
        lambda m, p: leaves(m.tower, p) + whole(m.bottom.bottom.own.experts[p - 1]),
    ),
    "ple": (
        {
            "name": "ple",
            "tasks": "domains",
            "hide_rate": 0.0,
            "expert_units": ((6,), (4,)),
            "num_own": 2,
        },
        lambda m, p: (
            (
                [(v, p - 1) for e in m.bottom.bottom._own for v in e.trainable_weights]
                + [part for g in m.bottom.bottom._gates for part in columns(g.dense, 3 * p, 3)]
            )
            * (p > 0)  # an unknown domain has one expert, the shared one, and no choice
            + whole(m.tower.towers[p])
        ),
    ),
    "mmoe": (
        {"name": "mmoe", "tasks": "domains", "hide_rate": 0.0, "num_experts": 2, **EXPERT},
        lambda m, p: columns(m.bottom.bottom.gates.dense, 2 * p, 2) + whole(m.tower.towers[p]),
    ),
    "shared_bottom": (
        {
            "name": "shared_bottom",
            "tasks": "domains",
            "hide_rate": 0.0,
            "units": (6,),
            "tower_units": (4,),
        },
        lambda m, p: whole(m.tower.towers[p]),
    ),
}
# model -> config, and what label k owns of it
LABELS: dict[str, tuple[dict[str, Any], Callable[[Any, int], list[Part]]]] = {
    "mlp": ({"name": "mlp", "units": (6,)}, lambda m, k: columns(m.tower.head, k)),
    "star": (
        {"name": "star", "units": (6,), "auxiliary_units": (3,)},
        lambda m, k: [
            *columns(m.tower.head, k),
            *columns(m.bottom.columns[0].dense, k),
            (m.tower.leaves[-1].kernels, (ALL, ALL, k)),
            (m.tower.leaves[-1].biases, (ALL, k)),
        ],
    ),
    "mmoe": (
        {"name": "mmoe", "num_experts": 3, **EXPERT},
        lambda m, k: whole(m.tower.towers[k]) + columns(m.bottom.gates.dense, 3 * k, 3),
    ),
    "ple": (
        {"name": "ple", "expert_units": ((6,), (4,)), "num_own": 1, "tower_units": (4,)},
        # Through the shared gate, all labels move the own experts of the first level.
        lambda m, k: whole(m.tower.towers[k], m.bottom._own[2 + k], *m.bottom._gates[k::2]),
    ),
    "dual_dnn": (
        {"name": "dual_dnn", "interactions": {"fm": {}}, "teacher_units": (6,)},
        lambda m, k: columns(m.tower.head, k) + columns(m.student_tower.head, k),
    ),
}
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: tf_keras.optimizers.Adam(0.05),
    "adam with weight decay": lambda: tf_keras.optimizers.Adam(0.05, weight_decay=0.1),
    "sgd with momentum": lambda: tf_keras.optimizers.SGD(0.05, momentum=0.9),
    "adagrad": lambda: tf_keras.optimizers.Adagrad(0.05),
    "rowwise_adagrad": lambda: RowwiseAdagrad(0.05),
    "sparse_adam": lambda: SparseAdam(0.05),
}


def batch(scenes: list[int], seed: int, labels: Array = None) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    scene = np.array(scenes * 12)
    count = len(scene)
    features = {
        "scene": scene,
        "user": rng.integers(0, 9, count),
        "topic": rng.integers(0, 9, count),
        "age": rng.normal(size=count).astype(np.float32),
    }
    y = rng.integers(0, 2, (count, 2)).astype(np.float32)
    if labels is not None:
        y[:, labels] = np.nan
    targets = {"labels": y, "weight": np.ones(count, np.float32), "task_id": features["user"]}
    return tf.nest.map_structure(tf.constant, (features, targets))


def built(config: dict[str, Any], optimizer: Any) -> Any:
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, {"embedding_stddev": 1.0, **config})
    model.build()
    random = np.random.default_rng(2)
    for weight in model.trainable_variables:
        weight.assign_add(0.3 * random.normal(size=weight.shape))
    model.compile(optimizer, SparseAdam(0.01), tf_keras.optimizers.Adam(0.01))
    return model


def moments(optimizer: Any, variable: Any) -> list[Any]:
    """An optimiser's slots of a variable, found by their names."""
    name = "/" + variable._shared_name
    return [v for v in optimizer.variables if v.name.removesuffix(":0").endswith(name)]


def values(model: Any, parts: list[Part]) -> list[Array]:
    """The parts, and their moments."""
    found = []
    for variable, index in parts:
        for one in (variable, *moments(model.optimizer, variable)):
            if one.shape == variable.shape:
                found.append(one.numpy()[index])
    return found


def equal(first: list[Array], second: list[Array]) -> list[bool]:
    return [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("name", DOMAINS)
def test_an_absent_domain_s_weights_stay_with_their_moments(name: str) -> None:
    config, own = DOMAINS[name]
    model = built(config, OPTIMIZERS["adam with weight decay"]())
    # Where tasks are domains, an unknown one has weights too.
    scenes = dict(enumerate([*SCENES], 1)) | ({0: 99} if "tasks" in config else {})
    model.train_step(batch([*scenes.values()], 1))
    parts = {p: own(model, p) for p in scenes}
    for step, absent in enumerate(scenes):
        before = {p: values(model, parts[p]) for p in scenes}
        model.train_step(batch([s for p, s in scenes.items() if p != absent], 2 + step))
        for p in scenes:
            stays = equal(before[p], values(model, parts[p]))
            assert all(stays) if p == absent else not any(stays), f"place {p}, absent {absent}"


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("absent", [0, 1])
def test_an_absent_label_s_weights_stay_with_their_moments(name: str, absent: int) -> None:
    config, own = LABELS[name]
    model = built(config, OPTIMIZERS["adam with weight decay"]())
    model.train_step(batch([*SCENES], 1))
    parts = [own(model, k) for k in (0, 1)]
    before = [values(model, part) for part in parts]
    model.train_step(batch([*SCENES], 2, labels=absent))
    assert all(equal(before[absent], values(model, parts[absent])))
    assert not any(equal(before[1 - absent], values(model, parts[1 - absent])))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_holds_for_any_optimiser(name: str) -> None:
    config, own = DOMAINS["star"]
    model = built(config, OPTIMIZERS[name]())
    model.train_step(batch([*SCENES], 1))
    before = {p: values(model, own(model, p)) for p in (1, 2)}
    iterations = int(model.optimizer.iterations)
    model.train_step(batch([1, 4], 2))
    assert all(equal(before[1], values(model, own(model, 1))))
    assert not any(equal(before[2], values(model, own(model, 2))))
    assert int(model.optimizer.iterations) == iterations + 1


def test_steps_with_all_domains_are_those_of_the_optimiser() -> None:
    """Nothing is kept still where the batch speaks of everything."""
    config, _ = DOMAINS["star"]
    found = []
    for plain in (True, False):
        model = built(config, OPTIMIZERS["adam"]())
        for seed in (1, 2):
            features, targets = batch([*SCENES, 99], seed)
            if not plain:
                model.train_step((features, targets))
                continue
            with tf.GradientTape() as tape:
                embedded = model.embed(model.encode(features), training=True)
                heads = model.heads(embedded, ("model",), training=True)
                loss = tf.add_n([*model.mean_terms(heads, targets).values()])
            tables = model.embed.trainable_variables
            of_tables = {v.ref() for v in tables}
            dense = [v for v in model.trainable_variables if v.ref() not in of_tables]
            gradients = tape.gradient(loss, [*tables, *dense])
            model.table_optimizer.apply_gradients(zip(gradients, tables, strict=False))
            model.optimizer.apply_gradients(zip(gradients[len(tables) :], dense, strict=True))
        found.append([v.numpy() for v in model.trainable_variables])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_batch_without_episodes_moves_no_step_size() -> None:
    config = {"name": "mlp", "units": (6,), "tower_units": (4,)}
    inner = {"rates": "rank_one", "shrinkage": 2.0}
    model = built({**config, "meta": {"inner": inner, "split": "random"}}, OPTIMIZERS["adam"]())
    features, targets = batch([*SCENES], 1)
    model.train_step((features, targets))
    before = [v.numpy() for v in model.meta.trainable_variables]
    alone = {**targets, "task_id": tf.range(36, dtype=tf.int64)}
    model.train_step((features, alone))
    assert all(equal(before, [v.numpy() for v in model.meta.trainable_variables]))
    # An episode of one label moves the step sizes of that label's logits alone.
    targets["labels"] = tf.where([True, False], targets["labels"], np.float32(np.nan))
    model.train_step((features, targets))
    after = [v.numpy() for v in model.meta.trainable_variables]
    assert len(before) == 7
    for a, b in zip(before, after, strict=True):
        assert not np.array_equal(a, b)
        if a.shape[-1:] == (2,):
            assert (a[0] != b[0], a[1] == b[1]) == (True, True)


def test_parts_that_a_gradient_speaks_of() -> None:
    gradient = np.zeros((2, 3, 4), np.float32)
    gradient[1, 2, 3] = -1e-30
    for parts in ((2, 1, 1), (1, 3, 2), (2, 3, 4), (1, 1, 4), (1, 1, 1)):
        found = np.broadcast_to(spoken_of(tf.constant(gradient), parts).numpy(), (2, 3, 4))
        size = [n // count for n, count in zip((2, 3, 4), parts, strict=True)]
        expected = np.zeros((2, 3, 4), bool)
        expected[tuple(slice(n - s, n) for n, s in zip((2, 3, 4), size, strict=True))] = True
        np.testing.assert_array_equal(found, expected)
    assert not spoken_of(tf.zeros([2, 4]), (2, 2)).numpy().any()


def test_the_finer_parts_of_a_variable_count() -> None:
    variable, other = tf.Variable(tf.zeros([3, 4])), tf.Variable(tf.zeros([2]))

    class Layer:
        own_weights = (Own(variable, (3, 1)), Own(other))

    class Head:
        own_weights = (Own(variable, (1, 4)),)

    found = collect([Layer(), Head(), object()])
    assert found == {variable.ref(): (3, 4), other.ref(): (1,)}
