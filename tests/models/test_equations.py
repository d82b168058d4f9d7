"""Every model of the zoo against its equation in NumPy: logits, and the gradient of its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equations as eq
import numpy as np
import pytest
import tensorflow as tf
import zoo_cases
from zoo_cases import COUNTS, B, batch, tensors

from qianmo.layers.schema import Schema
from qianmo.models import zoo

Array = Any
Logits = dict[str, Array]
GATE = ("scene", "user", "age")


class Values:
    """What weights hold, in float64; some of them moved."""

    def __init__(self, model: Any) -> None:
        self.values = {v.ref(): v.numpy().astype(np.float64) for v in model.variables}

    def __call__(self, variable: Any) -> Array:
        return self.values[variable.ref()]

    def moved(self, variable: Any, by: Array) -> Values:
        other = object.__new__(Values)
        other.values = {**self.values, variable.ref(): self(variable) + by}
        return other


def ctr(parts: Callable[[Any, Any, eq.Rows], list[Array]], first_order: bool = False) -> Any:
    """z = W [parts] + b + s, with s the first-order terms of ids and dense features, if any."""

    def equation(model: Any, w: Any, sg: Any, features: Any) -> Logits:
        rows, bottom, s = eq.Rows(model, w, features), model.bottom, 0.0
        if first_order:
            (layer,) = bottom.columns
            bottom, s = bottom.bottom, rows.linear()
            if layer.dense:
                s += rows.dense() @ w(layer.kernel)
        return {"model": eq.tower(w, model.tower, np.concatenate(parts(bottom, w, rows), 1)) + s}

    return equation


def deep(bottom: Any, w: Any, rows: eq.Rows, place: int = 0) -> Array:
    return eq.mlp(w, bottom.networks[place], rows.flat())[-1]


def interactions(bottom: Any, w: Any, rows: eq.Rows) -> list[Array]:
    """As INTERACTIONS names them, those on the flat row behind."""
    v = rows.fields()
    fwfm, cin = bottom.interactions[2:]
    parts = [eq.fm(v), eq.bi_interaction(v), eq.fwfm(w, fwfm, v), eq.cin(w, cin, v)]
    return [*parts, eq.cross(w, bottom.networks[0], rows.flat())]


def teacher(model: Any, w: Any, features: Any) -> Array:
    rows = eq.Rows(model, w, features)
    h = [*interactions(model.bottom, w, rows), rows.flat()]
    return eq.mlp(w, model.tower.mlp, np.concatenate(h, 1))


def teacher_alone(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    return {"model": eq.affine(w, model.tower.head, teacher(model, w, features)[-1])}


def dual_dnn(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    a_t = teacher(model, w, features)
    a_s = eq.mlp(w, model.student_tower.mlp, eq.Rows(model, sg, features).flat())
    return {
        "teacher": eq.affine(w, model.tower.head, a_t[-1]),
        "student": eq.affine(w, model.student_tower.head, a_s[-1]),
    }


def dual_loss(model: Any, w: Any, sg: Any, features: Any, targets: Any) -> Array:
    """Both cross-entropies, D by soft labels at temperature 2, and hints of all layers."""
    z = dual_dnn(model, w, sg, features)
    y, there = np.nan_to_num(targets["labels"]), ~np.isnan(targets["labels"])
    p = eq.sigmoid(dual_dnn(model, sg, sg, features)["teacher"] / 2)
    q = z["student"] / 2
    kd = 4 * (there * (-p * np.log(eq.sigmoid(q)) - (1 - p) * np.log(eq.sigmoid(-q)))).sum(1)
    a_t = teacher(model, sg, features)[1:]
    a_s = eq.mlp(w, model.student_tower.mlp, eq.Rows(model, sg, features).flat())[1:]
    (project,) = model.hint_projections
    hint = ((a_t[-1] - a_s[-1] @ w(project.kernel)) ** 2).sum(1)
    losses = [labels_loss(y, z[head], there) for head in z]
    return sum(losses) + 0.7 * kd + 0.3 * hint


def labels_loss(y: Array, z: Array, there: Array) -> Array:
    each = -y * np.log(eq.sigmoid(z)) - (1 - y) * np.log(eq.sigmoid(-z))
    return (there * each).sum(1)


def distilled(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """A star teacher, and a student with a plain network."""
    rows, still = eq.Rows(model, w, features), eq.Rows(model, sg, features)
    student = eq.mlp(w, model.student_bottom.networks[0], still.flat())[-1]
    return {
        "teacher": eq.star(w, model, rows.flat(), rows.domain, 0.0),
        "student": eq.tower(w, model.student_tower, student),
    }


def distilled_loss(model: Any, w: Any, sg: Any, features: Any, targets: Any) -> Array:
    """Both cross-entropies, and the square of the difference of probabilities."""
    z = distilled(model, w, sg, features)
    y, there = np.nan_to_num(targets["labels"]), ~np.isnan(targets["labels"])
    still = distilled(model, sg, sg, features)["teacher"]
    kd = (there * (eq.sigmoid(still) - eq.sigmoid(z["student"])) ** 2).sum(1)
    return sum(labels_loss(y, z[head], there) for head in z) + kd


def star(model: Any, w: Any, sg: Any, features: Any, training: bool = False) -> Logits:
    rows, still = eq.Rows(model, w, features), eq.Rows(model, sg, features)
    a, extra = rows.flat(), 0.0
    if model.tower.auxiliary:
        network = model.bottom.columns[0]
        extra = eq.affine(w, network.dense, eq.mlp(w, network.mlp, a)[-1])
    if model.tower.norm is not None:
        assert training
        a = eq.norm(w, model.tower.norm, a, still.flat(), rows.domain)
    return {"model": eq.star(w, model, a, rows.domain, extra)}


def cross_domain(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """h = sum_e g_e E_e(x): one shared expert, FM beside an MLP, and each domain's own."""
    rows = eq.Rows(model, w, features)
    mixture = model.bottom.bottom
    v, stacked = rows.fields(), not mixture.shared[0].interactions

    def expert(layer: Any, names: Any) -> Array:
        own = np.stack([rows.vector[n] for n in rows._order(names)], 1)
        x = eq.mlp(w, layer.networks[0], rows.flat(names))[-1]
        return x if stacked else np.concatenate([eq.fm(own), x], 1)

    shared = expert(mixture.shared[0], ())
    assert v.shape[1] == len(model.schema.categorical)
    reads = {d: [f.name for f in model.schema.features if f.name != "scene"] for d in (1, 2, 3)}
    if not stacked:  # domain 1 is scene 7, and so on
        reads = {1: ["tags", "price", "user", "age"], 2: ["tags", "topic", "user", "age"]}
        reads[3] = reads[1]

    def own(d: int) -> Array:
        if stacked:
            (layer,) = mixture.own.bottom.networks
            weights = zip(layer.kernels, layer.biases, strict=True)
            return eq.of_domain([*weights], w, d, rows.flat(reads[d]))
        return expert(mixture.own.experts[d - 1].bottom, reads[d])

    logits = eq.gate(w, mixture.gate, rows.flat(GATE))[:, 0]

    def fused(d: int, i: slice) -> Array:
        outputs = [shared[i]] + ([own(d)[i]] if d else [])
        g = eq.softmax(logits[i, : len(outputs)])
        return sum(g[:, e : e + 1] * y for e, y in enumerate(outputs))

    h = eq.row_by_row(rows.domain, fused)
    return {"model": eq.star(w, model, h, rows.domain, 0.0)}


def of_labels(model: Any, w: Any, states: list[Array]) -> Logits:
    logits = [eq.tower(w, t, h) for t, h in zip(model.tower.towers, states, strict=True)]
    return {"model": np.concatenate(logits, 1)}


def of_domains(model: Any, w: Any, h: Array, domain: Array) -> Logits:
    towers = model.tower.towers
    return {"model": eq.row_by_row(domain, lambda d, i: eq.tower(w, towers[d], h[i]))}


def shared_bottom(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    h = deep(model.bottom, w, eq.Rows(model, w, features))
    return of_labels(model, w, [h, h])


def shared_bottom_of_domains(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    rows = eq.Rows(model, w, features)
    return of_domains(model, w, deep(model.bottom.bottom, w, rows), rows.domain)


def mmoe(model: Any, w: Any, sg: Any, features: Any, by_domain: bool = False) -> Logits:
    """h_t = sum_e softmax(W_t x + b_t)_e E_e(x)."""
    rows = eq.Rows(model, w, features)
    layer = model.bottom.bottom if by_domain else model.bottom
    y = np.stack([deep(expert, w, rows) for expert in layer.experts], 1)
    g = eq.softmax(eq.gate(w, layer.gates, rows.flat()))
    h = np.einsum("bte,beh->bth", g, y)
    if by_domain:
        return of_domains(model, w, h[np.arange(B), rows.domain], rows.domain)
    return of_labels(model, w, [h[:, 0], h[:, 1]])


def fuse(w: Any, gate: Any, x: Array, y: list[Array], task: int = 0) -> Array:
    g = eq.softmax(eq.gate(w, gate, x)[:, task, : len(y)])
    return sum(g[:, e : e + 1] * one for e, one in enumerate(y))


def ple(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """Two levels of two own experts of each label and one shared expert."""
    layer, x = model.bottom, eq.Rows(model, w, features).flat()
    of_task, shared = [x, x], x
    for level in (0, 1):
        own = [
            [eq.mlp(w, layer._own[4 * level + 2 * t + i], of_task[t])[-1] for i in (0, 1)]
            for t in (0, 1)
        ]
        common = eq.mlp(w, layer._shared[level], shared)[-1]
        before, gates = of_task, layer._gates[2 * level :]
        of_task = [fuse(w, gates[t], before[t], [*own[t], common]) for t in (0, 1)]
        if level == 0:
            shared = fuse(w, layer._shared_gates[0], shared, [*own[0], *own[1], common])
    return of_labels(model, w, of_task)


def ple_of_domains(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """One own expert of each domain and one shared; an unknown domain has the shared alone."""
    rows = eq.Rows(model, w, features)
    layer = model.bottom.bottom

    def one(d: int, i: slice) -> Array:
        x = shared = rows.flat()[i]
        for level in (0, 1):
            stacked = layer._own[level]
            weights = [*zip(stacked.kernels, stacked.biases, strict=True)]
            own = [eq.of_domain(weights, w, d, x)] if d else []
            common = eq.mlp(w, layer._shared[level], shared)[-1]
            y = [*own, common]
            g_own, g_shared = layer._gates[level], layer._shared_gates[:1]
            # An expert that is not there has no weight: the gate's logits of the others remain.
            logits = eq.gate(w, g_own, x)[:, d, 1 - len(own) :]
            weights_of = eq.softmax(logits)
            if level == 0:
                shared_logits = eq.gate(w, g_shared[0], shared)[:, 0, 1 - len(own) :]
                g = eq.softmax(shared_logits)
                shared = sum(g[:, e : e + 1] * part for e, part in enumerate(y))
            x = sum(weights_of[:, e : e + 1] * part for e, part in enumerate(y))
        return x

    return of_domains(model, w, eq.row_by_row(rows.domain, one), rows.domain)


def gated(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """PPNet, a tower for each label; PEPNet where an EPNet scales the row by its domain first."""
    rows, still = eq.Rows(model, w, features), eq.Rows(model, sg, features)
    scaled = getattr(model.bottom.bottom, "before", [])

    def a(of: Any, at: eq.Rows) -> Array:
        x = at.flat()
        return eq.epnet(of, scaled[0], at.flat(["scene"]), x, still.flat()) if scaled else x

    u, stopped = rows.flat(GATE), a(sg, still)
    logits = [eq.gated(w, tower, a(w, rows), u, stopped) for tower in model.tower.towers]
    return {"model": np.concatenate(logits, 1)}


def poso(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """One tower, whose gates read no row."""
    rows = eq.Rows(model, w, features)
    return {"model": eq.gated(w, model.tower, rows.flat(), rows.flat(GATE), None)}


def epnet(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    rows, still = eq.Rows(model, w, features), eq.Rows(model, sg, features)
    layer = model.bottom.before[0]
    x = eq.epnet(w, layer, rows.flat(["scene"]), rows.flat(), still.flat())
    return {"model": eq.tower(w, model.tower, x)}


def sides(model: Any, w: Any, features: Any) -> tuple[Array, Array]:
    """u and v; the user's seam is centred."""
    rows = eq.Rows(model, w, features)
    bottom = model.user_bottom
    u = eq.affine(w, bottom.seam, eq.mlp(w, bottom.networks[0], rows.flat(["user", "age"]))[-1])
    u = (u - u.mean(1, keepdims=True)) / np.sqrt(u.var(1, keepdims=True) + 1e-3)
    u = eq.unit(eq.tower(w, model.tower.tower, u))
    v = eq.mlp(w, model.item_bottom.networks[0], rows.flat(["topic", "tags"]))[-1]
    return u, eq.unit(eq.tower(w, model.item_tower, v))


def two_tower(model: Any, w: Any, sg: Any, features: Any) -> Logits:
    """z = <u, v> / tau - log sum_j w_j exp(<u, n_j> / tau)."""
    u, v = sides(model, w, features)
    ids = model.tower.queue._ids.numpy()
    inverse = 1 / (COUNTS + 1)[ids]
    n = w(model.tower.queue._vectors)
    against = eq.logsumexp(u @ n.T / 0.2 + np.log(inverse / inverse.mean()))
    return {"model": ((u * v).sum(1) / 0.2 - against)[:, None]}


def two_tower_loss(model: Any, w: Any, sg: Any, features: Any, targets: Any) -> Array:
    """Softmax over the batch's items, less log Q, of the rows with a positive label."""
    u, v = sides(model, w, features)
    item = np.where((features["topic"] < 5) & (features["topic"] >= 0), features["topic"] + 1, 0)
    p = (COUNTS[item] + 1) / (COUNTS.sum() + 6)
    scores = u @ v.T / 0.2 - np.log(p)
    scores[(item[:, None] == item[None]) & ~np.eye(B, dtype=bool)] = -np.inf
    positive = targets["labels"][:, 0]
    total = targets["weight"].sum() / (targets["weight"] * positive).sum()
    return total * positive * (eq.logsumexp(scores) - np.diag(scores))


# case -> its equation, and the loss of each row where it is not of the labels
Case = tuple[Any, Any]
CASES: dict[str, Case] = {
    "lr": (ctr(lambda b, w, r: [r.dense()], first_order=True), None),
    "mlp": (ctr(lambda b, w, r: [deep(b, w, r)]), None),
    "wdl": (ctr(lambda b, w, r: [deep(b, w, r)], first_order=True), None),
    "deepfm": (
        ctr(lambda b, w, r: [eq.fm(r.fields()), deep(b, w, r)], first_order=True),
        None,
    ),
    **{
        f"dcn of rank {rank}": (
            ctr(
                lambda b, w, r, rank=rank: [
                    eq.cross(w, b.networks[0], r.flat(), rank),
                    deep(b, w, r, 1),
                ]
            ),
            None,
        )
        for rank in (None, 2)
    },
    **{
        name: (
            ctr(
                lambda b, w, r, act=act: [
                    eq.cin(w, b.interactions[0], r.fields(), *act),
                    deep(b, w, r),
                ],
                first_order=True,
            ),
            None,
        )
        for name, act in (("xdeepfm", ()), ("xdeepfm of relu", (eq.relu,)))
    },
    "teacher_alone": (teacher_alone, None),
    "dual_dnn": (dual_dnn, dual_loss),
    "distilled": (distilled, distilled_loss),
    "star": (star, None),
    "cross_domain": (cross_domain, None),
    "cross_domain stacked": (cross_domain, None),
    "shared_bottom": (shared_bottom, None),
    "shared_bottom of domains": (shared_bottom_of_domains, None),
    "mmoe": (mmoe, None),
    "mmoe of domains": (lambda *x: mmoe(*x, by_domain=True), None),
    "ple": (ple, None),
    "ple of domains": (ple_of_domains, None),
    "ppnet": (gated, None),
    "pepnet": (gated, None),
    "poso": (poso, None),
    "epnet": (epnet, None),
    "two_tower": (two_tower, two_tower_loss),
}
every_case = pytest.mark.parametrize("name", CASES)
Shapes = list[tuple[int, ...]]
# x has 18 columns (4 features of 4 and 2 numbers), 13 where domains own none.
DEEP: Shapes = [(18, 6), (6, 5)]
STAR: Shapes = [(18, 6), (6, 5), (5, 2), (3, 18, 6), (3, 6), (3, 6, 5), (3, 5), (3, 5, 2), (3, 2)]
TEACHER: Shapes = [(16, 4), (8, 3), (18, 18), (18, 18), (50, 7), (7, 5), (5, 2)]
LABEL_TOWERS: Shapes = [(5, 4), (4, 1)] * 2
DOMAIN_TOWERS: Shapes = [(5, 4), (4, 2)] * 4
GATED: Shapes = [(18, 6), (3, 6), (6, 5), (3, 5)]
PPNET: Shapes = [*GATED, (27, 3), (27, 3), (5, 1)] * 2
# Weights of two axes and more, but the tables; they are as many as there are, by their sizes.
SHAPES: dict[str, Shapes] = {
    "lr": [(2, 2)],
    "mlp": [*DEEP, (5, 2)],
    "wdl": [*DEEP, (5, 2), (2, 2)],
    "deepfm": [*DEEP, (6, 2), (2, 2)],
    "dcn of rank None": [*DEEP, (18, 18), (18, 18), (23, 2)],
    "dcn of rank 2": [*DEEP, *[(18, 2), (2, 18)] * 2, (23, 2)],
    "xdeepfm": [*DEEP, (16, 4), (8, 3), (10, 2), (2, 2)],
    "xdeepfm of relu": [*DEEP, (16, 4), (8, 3), (10, 2), (2, 2)],
    "teacher_alone": TEACHER,
    "dual_dnn": [*TEACHER, (18, 4), (4, 2), (4, 5)],
    "distilled": [
        *[(18, 6), (6, 2), (3, 18, 6), (3, 6), (3, 6, 2), (3, 2)],
        *[(18, 5), (5, 4), (4, 2)],
    ],
    "star": [*STAR, (18, 3), (3, 2)],
    "cross_domain": [
        *[*DEEP, (10, 6), (6, 5), (13, 6), (6, 5), (10, 6), (6, 5), (9, 2)],
        *[(6, 4), (4, 2), (3, 6, 4), (3, 4), (3, 4, 2), (3, 2)],
    ],
    "cross_domain stacked": [
        *[(13, 6), (6, 5), (3, 9, 6), (3, 6), (3, 6, 5), (3, 5), (9, 2)],
        *[(5, 4), (4, 2), (3, 5, 4), (3, 4), (3, 4, 2), (3, 2)],
    ],
    "shared_bottom": [*DEEP, *LABEL_TOWERS],
    "shared_bottom of domains": [*DEEP, *DOMAIN_TOWERS],
    "mmoe": [*DEEP * 3, (18, 6), *LABEL_TOWERS],
    "mmoe of domains": [*DEEP * 3, (18, 12), *DOMAIN_TOWERS],
    "ple": [
        *[*[(18, 6)] * 5, (18, 3), (18, 3), (18, 5)],
        *[*[(6, 5)] * 5, (6, 3), (6, 3), *LABEL_TOWERS],
    ],
    "ple of domains": [
        *[(3, 18, 6), (3, 6), (18, 6), (18, 8), (18, 2)],
        *[(3, 6, 5), (3, 5), (6, 5), (6, 8), *DOMAIN_TOWERS],
    ],
    "ppnet": PPNET,
    "pepnet": [*PPNET, (22, 3), (3, 18)],
    "poso": [*GATED, (9, 3), (9, 3), (5, 2)],
    "epnet": [*DEEP, (5, 2), (22, 3), (3, 18)],
    "two_tower": [(5, 6), (6, 5), (5, 3), (8, 6), (6, 3)],
}


def built(name: str, **changes: Any) -> Any:
    return zoo_cases.built(zoo_cases.schema_of(name), {**zoo_cases.CONFIGS[name], **changes})


def test_every_model_of_the_zoo_has_an_equation() -> None:
    assert set(CASES) == set(zoo_cases.CONFIGS)
    assert {config["name"] for config in zoo_cases.CONFIGS.values()} == set(zoo.MODELS)


@every_case
def test_weights_have_the_sizes_asked_for(name: str) -> None:
    model = built(name)
    tables = [v.ref() for v in model.embed.trainable_variables]
    found = [tuple(v.shape) for v in model.trainable_variables if v.ref() not in tables]
    assert sorted(shape for shape in found if len(shape) > 1) == sorted(SHAPES[name])


@every_case
def test_logits_are_those_of_the_equation(name: str) -> None:
    model = built(name)
    features, _ = batch(model.schema)
    w = Values(model)
    expected = CASES[name][0](model, w, w, features)
    found = model(tensors(features))
    assert set(found) == set(expected)
    for head, z in found.items():
        # Float32 sums of up to 60 products, of magnitudes that add up to less than 100, in at most
        # five layers: 5 * 60^0.5 * 6e-8 * 100.
        np.testing.assert_allclose(z, expected[head], rtol=0, atol=2.5e-4)
        assert np.abs(expected[head]).max() > 0.3


def check_gradient(name: str, model: Any, training: bool, equation: Any) -> None:
    """Each weight's derivative along a random direction against central differences."""
    features, targets = batch(model.schema)
    with tf.GradientTape() as tape:
        encoded = model.encode(tensors(features))
        heads = model.heads(model.embed(encoded), model.head_names, training=training)
        terms = model.mean_terms(heads, model.targets_of(encoded, tensors(targets)))
        loss = tf.add_n(list(terms.values()))
    gradients = tape.gradient(loss, model.trainable_variables)
    start, random = Values(model), np.random.default_rng(9)
    y, there = np.nan_to_num(targets["labels"]), ~np.isnan(targets["labels"])

    def total(w: Values) -> float:
        if CASES[name][1] is not None:
            losses = CASES[name][1](model, w, start, features, targets)
        else:
            losses = labels_loss(y, equation(model, w, start, features)["model"], there)
        return float(np.average(losses, weights=targets["weight"]))

    assert float(loss) == pytest.approx(total(start), rel=1e-4)
    reached = 0
    for variable, gradient in zip(model.trainable_variables, gradients, strict=True):
        direction = random.normal(size=variable.shape)
        ahead, behind = (total(start.moved(variable, h * direction)) for h in (1e-6, -1e-6))
        expected = (ahead - behind) / 2e-6
        found = 0.0
        if gradient is not None:
            found = float(np.sum(tf.convert_to_tensor(gradient).numpy() * direction))
            reached += 1
        # The differences are exact to 1e-8; the gradient is a float32 sum over rows and layers.
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-5), variable.name
    assert reached == len(model.trainable_variables)


@every_case
def test_gradients_are_those_of_the_equation(name: str) -> None:
    check_gradient(name, built(name), False, CASES[name][0])


@pytest.mark.parametrize("name", ["lr", "wdl", "deepfm", "xdeepfm"])
def test_a_label_has_first_order_terms_of_its_own(name: str) -> None:
    """Also where the tower has hidden layers, past which they go."""
    model = built(name, tower_units=(3,))
    features, _ = batch(model.schema)
    before = model(tensors(features))["model"].numpy()
    table = model.embed.tables["1" if name == "lr" else "4"]
    # Each of the first-order columns of one label, of four features a row, grows by 1.
    table.assign(table + np.eye(table.shape[1])[-2])
    moved = model(tensors(features))["model"].numpy() - before
    owned = eq.Rows(model, Values(model), features).first_order
    expected = sum((column[:, 0] != 0).astype(float) for column in owned.values())
    np.testing.assert_allclose(moved[:, 0], expected, rtol=1e-4)
    np.testing.assert_array_equal(moved[:, 1], 0)


def test_logistic_regression_of_ids_alone() -> None:
    schema = Schema(features=zoo_cases.SCHEMA.features[2:3], labels=("click", "like"))
    model = zoo_cases.built(schema, {"name": "lr"})
    w, rows = Values(model), {"scene": np.array([7, 4, 99])}
    expected = eq.Rows(model, w, rows).linear() + w(model.tower.head.bias)
    np.testing.assert_allclose(model(tensors(rows))["model"], expected, rtol=1e-5)


def test_partitioned_norm_of_a_star_model_counts_its_batch_in() -> None:
    model = built("star", norm=True)

    def equation(*arguments: Any) -> Logits:
        return star(*arguments, training=True)

    check_gradient("star", model, True, equation)
