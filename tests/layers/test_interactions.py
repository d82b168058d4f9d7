"""FM, FwFM, BiInteraction, CIN and CrossNetwork against loops over the papers' equations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.bi_interaction import BiInteraction
from qianmo.layers.cin import CIN
from qianmo.layers.cross import CrossNetwork
from qianmo.layers.fm import FM
from qianmo.layers.fwfm import FwFM

B, F, D = 5, 4, 3
V = np.random.default_rng(0).normal(size=(B, F, D)).astype(np.float32)
PAIRS = list(itertools.combinations(range(F), 2))


def randomise(layer: tf_keras.layers.Layer) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    weights = [0.5 * random.normal(size=w.shape).astype(np.float32) for w in layer.weights]
    layer.set_weights(weights)
    return weights


def test_fm_values() -> None:
    expected = np.array([[sum(v[i] @ v[j] for i, j in PAIRS)] for v in V])
    np.testing.assert_allclose(FM()(V), expected, rtol=1e-5, atol=1e-6)


def test_fm_of_orthogonal_fields_is_zero() -> None:
    np.testing.assert_allclose(FM()(np.eye(4, dtype=np.float32)[None]), [[0.0]], atol=1e-7)


def test_bi_interaction_values() -> None:
    expected = np.array([sum(v[i] * v[j] for i, j in PAIRS) for v in V])
    np.testing.assert_allclose(BiInteraction()(V), expected, rtol=1e-5, atol=1e-6)


def test_one_field_interacts_with_nothing() -> None:
    np.testing.assert_allclose(BiInteraction()(V[:, :1]), np.zeros([B, D]), atol=1e-6)


@pytest.mark.parametrize("per_dim", [False, True])
def test_fwfm_values(per_dim: bool) -> None:
    layer = FwFM(per_dim=per_dim)
    layer(V)
    (r,) = randomise(layer)
    expected = np.array(
        [sum(r[k] * v[i] * v[j] for k, (i, j) in enumerate(PAIRS)) for v in V], np.float32
    )
    if not per_dim:
        expected = expected.sum(1, keepdims=True)
    np.testing.assert_allclose(layer(V), expected, rtol=1e-5, atol=1e-6)


def test_fwfm_starts_as_fm() -> None:
    np.testing.assert_allclose(FwFM()(V), FM()(V), rtol=1e-5, atol=1e-6)


def numpy_cin(
    v: np.ndarray,
    units: tuple[int, ...],
    weights: list[np.ndarray],
    split_half: bool,
    is_linear: bool,
) -> np.ndarray:
    x, pooled = v, []
    for k, width in enumerate(units):
        kernel, bias = weights[2 * k], weights[2 * k + 1]
        maps = np.zeros([len(v), width, D])
        for u, i, h in itertools.product(range(width), range(F), range(x.shape[1])):
            maps[:, u] += kernel[i * x.shape[1] + h, u] * v[:, i] * x[:, h]
        maps = maps + bias[None, :, None]
        maps = maps if is_linear else np.maximum(maps, 0)
        x = direct = maps
        if split_half and k < len(units) - 1:
            x, direct = maps[:, : width // 2], maps[:, width // 2 :]
        pooled.append(direct.sum(2))
    return np.concatenate(pooled, 1)


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize(
    ("units", "split_half", "width"),
    [((6, 4, 3), True, 8), ((5, 3), False, 8), ((5,), True, 5)],
)
def test_cin_values(units: tuple[int, ...], split_half: bool, width: int, is_linear: bool) -> None:
    activation = {} if is_linear else {"activation": "relu"}  # the paper has none
    layer = CIN(units, split_half=split_half, **activation)
    layer(V)
    weights = randomise(layer)
    expected = numpy_cin(V, units, weights, split_half, is_linear)
    assert expected.shape == (B, width)
    np.testing.assert_allclose(layer(V), expected, rtol=1e-4, atol=1e-4)


def test_linear_cin_of_ones_is_the_product_of_the_sums() -> None:
    # With W = 1 every map of a layer is (sum_i v_i) times the sum of the maps before.
    layer = CIN((1, 1), split_half=False)
    layer(V)
    layer.set_weights([np.full(w.shape, float("kernel" in w.name)) for w in layer.weights])
    total = V.sum(1)
    expected = np.stack([(total**2).sum(1), (total**3).sum(1)], 1)
    np.testing.assert_allclose(layer(V), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("projection_dim", [None, 2])
def test_cross_network_values(projection_dim: int | None) -> None:
    x0 = V.reshape(B, F * D)
    layer = CrossNetwork(2, projection_dim)
    layer(x0)
    weights = randomise(layer)
    x = x0
    for cross in (weights[: len(weights) // 2], weights[len(weights) // 2 :]):
        *kernels, bias = cross
        wx = x
        for kernel in kernels:
            wx = wx @ kernel
        x = x0 * (wx + bias) + x
    np.testing.assert_allclose(layer(x0), x, rtol=1e-4, atol=1e-4)


def test_cross_network_without_weights_is_the_identity() -> None:
    x0 = V.reshape(B, F * D)
    layer = CrossNetwork(3)
    layer(x0)
    layer.set_weights([np.zeros(w.shape) for w in layer.weights])
    np.testing.assert_array_equal(layer(x0), x0)


@pytest.mark.parametrize(
    "make", [lambda seed: CIN((6, 4), seed=seed), lambda seed: CrossNetwork(2, seed=seed)]
)
def test_weights_depend_on_the_seed_alone(make: object) -> None:
    def kernels(seed: int) -> list[np.ndarray]:
        layer = make(seed)  # type: ignore[operator]
        layer(V if isinstance(layer, CIN) else V.reshape(B, F * D))
        return [w for w in layer.get_weights() if w.ndim == 2]

    alone = kernels(3)
    tf_keras.utils.set_random_seed(99)
    tf_keras.layers.Dense(4)(V)
    for a, b in zip(alone, kernels(3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(alone[0], kernels(4)[0])
    assert alone[0].shape != alone[1].shape or not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FM()(V[0]), r"`FM` reads field vectors: .* Received: \(4, 3\)"),
        (lambda: BiInteraction()(V[0]), "`BiInteraction` reads field vectors"),
        (lambda: FwFM()(V[0]), "`FwFM` reads field vectors"),
        (lambda: FwFM()(V[:, :1]), "`FwFM` needs at least two fields. Received: 1"),
        (lambda: CIN((4,))(V[0]), "`CIN` reads field vectors"),
        (lambda: CIN(()), r"`units` should be one or more widths >= 1. Received: \(\)"),
        (lambda: CIN((4, 0)), r"`units` should be one or more widths >= 1. Received: \(4, 0\)"),
        (lambda: CIN((3, 4)), r"`units` should be even in all layers but the last.*\(3, 4\)"),
        (lambda: CrossNetwork(0), "`num_layers` should be >= 1. Received: 0"),
        (lambda: CrossNetwork(1, 0), "`projection_dim` should be >= 1, or None. Received: 0"),
        (lambda: CrossNetwork(1)(V), r"`CrossNetwork` reads flat rows: .* Received: \(5, 4, 3\)"),
    ],
)
def test_refusals(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_fields_must_be_known_when_the_layer_is_built() -> None:
    with pytest.raises(ValueError, match=r"with F and D known. Received: \(None, None, 3\)"):
        FM()(tf_keras.Input([None, 3]))


def test_cin_takes_an_empty_batch() -> None:
    assert CIN((4, 2))(tf.zeros([0, F, D])).shape == (0, 4)
