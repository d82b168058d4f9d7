"""Layers that differ by domain or by task, against their equations in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from qianmo.layers.auxiliary_network import AuxiliaryNetwork
from qianmo.layers.bottom import Bottom
from qianmo.layers.domain_column import DomainColumn, read_domain
from qianmo.layers.domain_experts import DomainExperts
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.domain_towers import DomainTowers
from qianmo.layers.embed import Embedded
from qianmo.layers.epnet import EPNet
from qianmo.layers.expert_mixture import ExpertMixture
from qianmo.layers.extended import Extended
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.gated_tower import GatedTower
from qianmo.layers.label_towers import LabelTowers
from qianmo.layers.mlp import MLP, Layer
from qianmo.layers.mmoe import MMoE
from qianmo.layers.partitioned_norm import PartitionedNorm
from qianmo.layers.personal_gate import PersonalGate
from qianmo.layers.ple import PLE
from qianmo.layers.schema import Schema
from qianmo.layers.seeding import derive_seed
from qianmo.layers.select import Select
from qianmo.layers.star import StarDense
from qianmo.layers.star_tower import StarTower
from qianmo.layers.tower import Tower

Array = Any
DOMAIN = np.array([2, 1, 0, 3, 1, 2, 2])  # of three; the third row's is unknown
ROWS = len(DOMAIN)


def normal(*shape: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def embedded(domain: Array = DOMAIN) -> Embedded:
    fields = tf.constant(normal(len(domain), 2, 2))
    dense = tf.constant(normal(len(domain), 1, seed=4))
    return Embedded((fields,), tf.zeros([len(domain), 2, 0]), dense, tf.constant(domain))


def randomise(layer: Any) -> None:
    random = np.random.default_rng(5)
    for weight in layer.trainable_weights:
        weight.assign_add(0.3 * random.normal(size=weight.shape))


def weights_of(layer: Any) -> list[Array]:
    return [w.numpy() for w in layer.trainable_weights]


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expert(seed: int) -> Bottom:
    return Bottom(networks=[MLP((4,), seed=seed)])


def apart(x: Array, kernels: Array, biases: Array) -> Array:
    """Row by row x W + b by the row's place in the first axes."""
    return np.einsum("bi,bij->bj", x, kernels) + biases


def test_star_dense() -> None:
    layer = StarDense(4, 3, seed=1)
    x = normal(ROWS, 5)
    layer((x, DOMAIN))
    randomise(layer)
    w, b, leaves, shifts = weights_of(layer)
    known = [d - 1 for d in DOMAIN]
    star = apart(x, leaves[known] * w, shifts[known] + b)
    expected = np.where(DOMAIN[:, None] > 0, star, x @ w + b)
    np.testing.assert_allclose(layer((x, DOMAIN)), expected, rtol=1e-4, atol=1e-5)
    folded = layer((x.reshape(1, ROWS, 5), DOMAIN.reshape(1, ROWS)))
    np.testing.assert_allclose(folded[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, ROWS])
def test_a_star_tower_starts_equal_to_the_plain_tower_bit_for_bit(batch: int) -> None:
    x = normal(batch, 5)
    h = np.concatenate([x, DOMAIN[:batch, None].astype(np.float32)], 1)
    star, plain = StarTower(2, 3, (4, 3), seed=7), Tower(2, (4, 3), seed=7)
    outputs = [tf.nest.flatten(found[:2]) for found in (star(h), plain(x))]
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # A leaf moves its own domain alone.
    star.leaves[0].kernels[1].assign(star.leaves[0].kernels[1] + 1.0)
    moved = (star(h).logits.numpy() != plain(x).logits.numpy()).any(1)
    np.testing.assert_array_equal(moved, DOMAIN[:batch] == 2)


def test_star_tower_adds_the_auxiliary_logits_and_counts_its_own_columns() -> None:
    x, s = normal(ROWS, 5), normal(ROWS, 2, seed=9)
    h = np.concatenate([x, s, DOMAIN[:, None].astype(np.float32)], 1)
    star = StarTower(2, 3, (4,), seed=7, auxiliary=True)
    plain = Tower(2, (4,), seed=7)
    np.testing.assert_allclose(star(h).logits, plain(x).logits + s, rtol=1e-6)
    assert star.dense_shapes(8) == plain.dense_shapes(5)
    np.testing.assert_array_equal(star(h).h, h)

    def correction(number: int, a: tf.Tensor, layer: Layer) -> tf.Tensor:
        return layer(a) + 1.0 + number

    found = star(h, correction=correction).logits
    np.testing.assert_allclose(found, plain(x, correction=correction).logits + s, rtol=1e-6)


def test_partitioned_norm_is_the_pooled_statistics_of_domain_and_all() -> None:
    layer = PartitionedNorm(3, window=10, prior_rows=4)
    x = normal(ROWS, 2) * 3 + 1
    layer((x, DOMAIN))
    randomise(layer)
    gamma, beta, gammas, betas = weights_of(layer)
    trained = layer((x, DOMAIN), training=True).numpy()

    expected = np.zeros_like(x)
    for i, d in enumerate(DOMAIN):
        own = x[d == DOMAIN]
        k = len(own) / (len(own) + 4) if d else 0.0
        shift = own.mean(0) - x.mean(0)
        mean = x.mean(0) + k * shift
        variance = k * own.var(0) + (1 - k) * x.var(0) + k * (1 - k) * shift**2
        scale = gamma * (gammas[d - 1] if d else 1)
        expected[i] = scale * (x[i] - mean) / np.sqrt(variance + 1e-3)
        expected[i] += beta + (betas[d - 1] if d else 0)
    np.testing.assert_allclose(trained, expected, rtol=2e-3, atol=1e-4)
    # The first batch is all that is known yet: inference sees the same numbers, in any batch.
    np.testing.assert_allclose(layer((x, DOMAIN)), trained, rtol=1e-5, atol=1e-6)
    for i in range(ROWS):
        alone = layer((x[i : i + 1], DOMAIN[i : i + 1]))
        np.testing.assert_allclose(alone[0], trained[i], rtol=1e-5, atol=1e-6)


def test_partitioned_norm_remembers_a_window_of_rows() -> None:
    layer = PartitionedNorm(2, window=8)
    rows = normal(24, 3)
    domain = np.array([1, 1, 1, 2] * 6)
    layer((rows, domain))
    seen = [rows[:4], rows[4:8]]
    for i, batch in enumerate(seen):
        layer((batch, domain[4 * i : 4 * i + 4]), training=True)
    every, own = np.concatenate(seen), rows[:8][domain[:8] == 1]
    np.testing.assert_allclose(layer.means[0], every.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.variances[1], own.var(0), rtol=1e-5)
    assert layer.rows.numpy().tolist() == [8, 6, 2]
    for i in range(2, 6):
        layer((rows[4 * i : 4 * i + 4], domain[:4]), training=True)
    assert layer.rows.numpy().tolist() == [12, 11, 6]  # the window, and the batch's own rows


def test_partitioned_norm_keeps_the_statistics_of_absent_domains() -> None:
    layer = PartitionedNorm(3)
    layer((normal(ROWS, 2), DOMAIN), training=True)
    before = [v.numpy() for v in (layer.rows, layer.means, layer.variances)]
    layer((normal(4, 2, seed=8), np.array([1, 0, 1, 1])), training=True)
    for a, v in zip(before, (layer.rows, layer.means, layer.variances), strict=True):
        np.testing.assert_array_equal(a[2:], v.numpy()[2:])
        assert not np.array_equal(a[:2], v.numpy()[:2])


def test_partitioned_norm_holds_for_a_domain_of_one_row_and_an_empty_one() -> None:
    layer = PartitionedNorm(3)
    x = normal(9, 2)
    domain = np.array([1] * 8 + [2])
    y = layer((x, domain), training=True)
    assert np.abs(y).max() < 5
    assert np.isfinite(layer((x, np.full(9, 3)))).all()  # a domain that was never seen
    np.testing.assert_allclose(layer((x, np.full(9, 3))), layer((x, np.zeros(9, int))))


def test_domain_experts_see_their_own_rows() -> None:
    layer = DomainExperts([MLP((4,), seed=p) for p in range(3)])
    x = normal(ROWS, 5)
    layer((x, DOMAIN))
    parts = [weights_of(e) for e in layer.experts]
    expected = [relu(x[i] @ parts[d - 1][0]) if d else np.zeros(4) for i, d in enumerate(DOMAIN)]
    np.testing.assert_allclose(layer((x, DOMAIN)), expected, rtol=1e-5)
    only = layer((x, np.full(ROWS, 3)))
    np.testing.assert_allclose(only, relu(x @ parts[2][0]), rtol=1e-5)


def test_domain_mlp_is_an_mlp_for_each_domain() -> None:
    stacked = DomainMLP(3, (6, 4), seed=9)
    x = tf.constant(normal(ROWS, 5))
    stacked((x, DOMAIN))
    alone = [MLP((6, 4), seed=derive_seed(9, p)) for p in range(3)]
    for p, one in enumerate(alone):
        one(x)
        names = {"_layers/0/kernel", "_layers/0/bias", "_layers/1/kernel", "_layers/1/bias"}
        parts = stacked.of_domain(p)
        assert set(parts) == names
        for variable, own in zip(parts.values(), one.trainable_weights, strict=True):
            np.testing.assert_array_equal(variable[p], own)
    apart = DomainExperts(alone)
    both = []
    for layer in (stacked, apart):
        with tf.GradientTape() as tape:
            y = layer((x, DOMAIN))
            loss = tf.reduce_sum(y**2)
        both.append((y, [tf.convert_to_tensor(g) for g in tape.gradient(loss, layer.weights)]))
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-6, atol=1e-7)
    # Kernels and biases of all layers come first, each of all domains.
    for place, stacked_gradient in enumerate(both[0][1]):
        own = [both[1][1][4 * p + place] for p in range(3)]
        np.testing.assert_allclose(stacked_gradient, own, rtol=1e-5, atol=1e-6)
    alone_rows = [stacked((x[i : i + 1], DOMAIN[i : i + 1]))[0] for i in range(ROWS)]
    np.testing.assert_allclose(alone_rows, both[0][0], rtol=1e-5, atol=1e-6)


def test_domain_mlp_drops_out_in_training_alone() -> None:
    layer = DomainMLP(2, (4, 3), dropout=0.5, seed=1)
    x, domain = tf.ones([2000, 5]), np.array([1, 2] * 1000)
    plain = layer((x, domain)).numpy()
    twice = [layer((x, domain), training=True).numpy() for _ in range(2)]
    assert (twice[0] != twice[1]).any()
    np.testing.assert_array_equal(layer((x, domain)), plain)
    one = DomainMLP(2, (4,), dropout=0.5, seed=1)
    expected = one((x, domain)).numpy()
    dropped = one((x, domain), training=True).numpy()
    kept = expected > 0
    share = (dropped == 0)[kept].mean()
    assert abs(share - 0.5) < 0.03
    np.testing.assert_allclose(dropped[dropped > 0], 2 * expected[dropped > 0], rtol=1e-6)


def test_expert_mixture() -> None:
    schema = Schema(
        features=(
            Categorical(name="scene", num_ids=3, dim=2),
            Categorical(name="user", num_ids=5, dim=2),
            Dense(name="age", mean=0.0, variance=1.0),
        ),
        labels=("y",),
        domain="scene",
    )
    layer = ExpertMixture(
        [expert(1), expert(2)],
        DomainExperts([expert(3), expert(4), expert(5)]),
        PersonalGate(3, seed=1),
        Select(schema, ["user", "age"]),
    )
    e = embedded()
    layer(e)
    randomise(layer)
    x = e.flat.numpy()
    shared = [relu(apart_from(x, s)) for s in layer.shared]
    own = [relu(apart_from(x, o)) for o in layer.own.experts]
    gate_input = np.concatenate([e.fields[0][:, 1].numpy(), e.dense.numpy()], 1)
    logits = gate_input @ weights_of(layer.gate)[0] + weights_of(layer.gate)[1]
    expected = []
    for i, d in enumerate(DOMAIN):
        experts = [s[i] for s in shared] + ([own[d - 1][i]] if d else [])
        g = softmax(logits[i, : len(experts)])
        expected.append(sum(w * y for w, y in zip(g, experts, strict=True)))
    np.testing.assert_allclose(layer(e), expected, rtol=1e-4, atol=1e-6)


def apart_from(x: Array, layer: Any) -> Array:
    """The first dense layer of an expert."""
    kernel, bias = weights_of(layer)
    return x @ kernel + bias


@pytest.mark.parametrize("by_domain", [False, True])
def test_mmoe(by_domain: bool) -> None:
    layer = MMoE([expert(1), expert(2)], 4, by_domain=by_domain, seed=1)
    e = embedded()
    layer(e)
    randomise(layer)
    x = e.flat.numpy()
    y = np.stack([relu(apart_from(x, one)) for one in layer.experts], 1)
    kernel, bias = weights_of(layer.gates)
    g = softmax((x @ kernel + bias).reshape(ROWS, 4, 2))
    h = np.einsum("bte,beh->bth", g, y)
    expected = h[np.arange(ROWS), DOMAIN] if by_domain else h.reshape(ROWS, 16)
    np.testing.assert_allclose(layer(e), expected, rtol=1e-4, atol=1e-6)


def gated(gate: Any, x: Array, y: Array, place: Array | None = None) -> Array:
    kernel, bias = weights_of(gate)
    logits = (x @ kernel + bias).reshape(len(x), -1, y.shape[1])
    logits = logits[:, 0] if place is None else logits[np.arange(len(x)), place]
    return np.einsum("be,beh->bh", softmax(logits), y)


def test_ple_of_labels() -> None:
    layer = PLE(2, [[4], [3]], num_own=2, num_shared=1, seed=1)
    e = embedded()
    layer(e)
    randomise(layer)
    x = [e.flat.numpy()] * 2
    s = e.flat.numpy()
    for level in range(2):
        own = [relu(apart_from(x[i // 2], layer._own[4 * level + i])) for i in range(4)]
        shared = relu(apart_from(s, layer._shared[level]))
        x = [
            gated(layer._gates[2 * level + t], x[t], np.stack([*own[2 * t :][:2], shared], 1))
            for t in range(2)
        ]
        if not level:
            s = gated(layer._shared_gates[0], s, np.stack([*own, shared], 1))
    np.testing.assert_allclose(layer(e), np.concatenate(x, 1), rtol=1e-4, atol=1e-6)


def test_ple_of_domains_uses_a_rows_own_experts() -> None:
    layer = PLE(3, [[4], [3]], by_domain=True, seed=1)
    e = embedded()
    layer(e)
    randomise(layer)
    found = layer(e).numpy()
    for i, d in enumerate(DOMAIN):
        x = s = e.flat.numpy()[i : i + 1]
        for level in range(2):
            shared = relu(apart_from(s, layer._shared[level]))
            y = shared[:, None]
            if d:
                kernels, biases = weights_of(layer._own[level])
                own = relu(x @ kernels[d - 1] + biases[d - 1])
                y = np.stack([own, shared], 1)
                x = gated(layer._gates[level], x, y, np.array([d]))
                s = gated(layer._shared_gates[0], s, y) if not level else s
            else:  # one expert is left, whatever the gates say
                x = s = shared
        np.testing.assert_allclose(found[i], x[0], rtol=1e-4, atol=1e-6)


def test_label_towers() -> None:
    h = normal(ROWS, 6)
    for split in (False, True):
        layer = LabelTowers([Tower(1, (3,), seed=k) for k in (1, 2)], split=split)
        found = layer(h)
        states = np.split(h, 2, 1) if split else [h, h]
        one = [t(s) for t, s in zip(layer.towers, states, strict=True)]
        np.testing.assert_array_equal(found.logits, np.concatenate([o.logits for o in one], 1))
        assert found.hidden[0].shape == (ROWS, 6)
        assert [s.is_last for s in layer.dense_shapes(6)] == [False, True] * 2
        calls: list[int] = []

        def correction(
            number: int, a: tf.Tensor, layer: Layer, calls: list[int] = calls
        ) -> tf.Tensor:
            calls.append(number)
            return layer(a)

        layer(h, correction=correction)
        assert calls == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"2 hidden states of one width\. Received: 5 columns"):
        LabelTowers([Tower(1), Tower(1)], split=True)(normal(3, 5))


def test_domain_towers_have_one_for_unknown_domains() -> None:
    x = normal(ROWS, 5)
    h = np.concatenate([x, DOMAIN[:, None].astype(np.float32)], 1)
    layer = DomainTowers(2, 3, (4,), seed=1)
    found = layer(h).logits
    for i, d in enumerate(DOMAIN):
        expected = layer.towers[d](x[i : i + 1]).logits[0]
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reads_input", [True, False], ids=["ppnet", "poso"])
def test_gated_tower(reads_input: bool) -> None:
    layer = GatedTower(2, 3, (4, 2), gate_units=5, reads_input=reads_input, seed=1)
    h = tf.constant(normal(ROWS, 9))
    layer(h)
    randomise(layer)
    a, u = np.split(h.numpy(), [6], 1)
    c = np.concatenate([u, a], 1) if reads_input else u
    for hidden, gate, scale in zip(layer._hidden, layer._gates, layer._scales, strict=True):
        one = relu(apart_from(c, gate))
        a = 2 * sigmoid(apart_from(one, scale)) * relu(apart_from(a, hidden))
    expected = apart_from(a, layer.head)
    np.testing.assert_allclose(layer(h).logits, expected, rtol=1e-4, atol=1e-5)
    # Without the way through the hidden layer, only the gate reads a^0; it does not teach it.
    for hidden, value in zip(layer._hidden, (0.0, 1.0), strict=True):
        kernel, bias = hidden.trainable_weights
        kernel.assign(tf.fill(kernel.shape, value))
        bias.assign(tf.ones(bias.shape))
    with tf.GradientTape() as tape:
        tape.watch(h)
        loss = tf.reduce_sum(layer(h).logits)
    gradient = tape.gradient(loss, h).numpy()
    assert not gradient[:, :6].any()
    assert gradient[:, 6:].any()


def test_epnet_scales_the_row_and_does_not_teach_it() -> None:
    schema = Schema(
        features=(
            Categorical(name="scene", num_ids=3, dim=2),
            Categorical(name="user", num_ids=5, dim=2),
            Dense(name="age", mean=0.0, variance=1.0),
        ),
        labels=("y",),
        domain="scene",
    )
    layer = EPNet(Select(schema, ["scene"]), units=4, seed=1)
    e = embedded()
    layer(e)
    randomise(layer)
    x = e.flat.numpy()
    one = relu(apart_from(np.concatenate([e.fields[0][:, 0].numpy(), x], 1), layer.hidden))
    g = 2 * sigmoid(apart_from(one, layer.scale))
    np.testing.assert_allclose(layer(e).flat, x * g, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(layer(e).domain, DOMAIN)
    with tf.GradientTape() as tape:
        tape.watch(e.dense)
        loss = tf.reduce_sum(layer(e).flat)
    # As if the gate were a constant: d loss / d x = g.
    np.testing.assert_allclose(tape.gradient(loss, e.dense), g[:, 4:], rtol=1e-4)


def test_auxiliary_network() -> None:
    layer = AuxiliaryNetwork(2, (3,), seed=1)
    e = embedded()
    layer(e)
    randomise(layer)
    expected = apart_from(relu(apart_from(e.flat.numpy(), layer.mlp)), layer.dense)
    np.testing.assert_allclose(layer(e), expected, rtol=1e-4, atol=1e-6)


def test_the_domain_crosses_the_seam_as_the_last_column() -> None:
    bottom = Extended(expert(1), columns=[DomainColumn()])
    h = bottom(embedded())
    assert h.shape == (ROWS, 5)
    np.testing.assert_array_equal(read_domain(h[:, -1], 3), DOMAIN)
    narrow = tf.cast(tf.range(257), tf.bfloat16)
    np.testing.assert_array_equal(read_domain(narrow, 256), np.arange(257))
    with pytest.raises(ValueError, match="257 domains cannot cross the tower seam as bfloat16"):
        read_domain(narrow, 257)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StarDense(4, 0), "`num_domains` should be >= 1. Received: 0"),
        (lambda: PartitionedNorm(3, window=0), "`window` should be >= 1"),
        (lambda: DomainExperts([]), "one layer for each domain"),
        (lambda: DomainMLP(0, (4,)), "`num_domains` should be >= 1. Received: 0"),
        (lambda: DomainMLP(3, ()), "`units` should hold at least one width"),
        (lambda: DomainMLP(3, (4,), dropout=1.0), "`dropout` should be in"),
        (lambda: DomainMLP(3, (4,)).of_domain(3), r"`place` should be in \[0, 3\)"),
        (lambda: PersonalGate(0), "`num_experts` should be >= 1"),
        (
            lambda: ExpertMixture([], expert(1), PersonalGate(1), Extended(expert(1))),
            "`shared` should hold an expert",
        ),
        (
            lambda: ExpertMixture([expert(1)], expert(1), PersonalGate(3), Extended(expert(1))),
            "`gate` should have 2 experts",
        ),
        (lambda: PLE(2, []), "`levels` should be >= 1"),
        (lambda: GatedTower(1, 2, ()), "`units` should hold a width"),
        (lambda: DomainTowers(1, 0), "`num_domains` should be >= 1"),
        (lambda: AuxiliaryNetwork(0), "`num_labels` should be >= 1"),
        (lambda: LabelTowers([]), "`towers` should hold one for each label. Received: none"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
