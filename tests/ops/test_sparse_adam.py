"""The op `Qianmo>SparseAdam`: values, order of sums, what it refuses, what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from qianmo.ops import library as module
from qianmo.ops.library import library

RATE, BETA_1, BETA_2, EPSILON = 0.01, 0.9, 0.999, 1e-7


def state(shape: tuple[int, ...], seed: int = 0) -> list[tf.Variable]:
    """A table and its moments, the second positive."""
    random = np.random.default_rng(seed)
    w, m, v = (random.normal(size=shape).astype(np.float32) for _ in range(3))
    return [tf.Variable(w), tf.Variable(m), tf.Variable(v**2)]


def step(variables: list[tf.Variable], indices: Any, gradients: Any, t: int = 3) -> Any:
    return library().qianmo_sparse_adam(
        *(variable.handle for variable in variables),
        indices=tf.cast(indices, tf.int64),
        gradients=gradients,
        learning_rate=RATE,
        step=t,
        beta_1=BETA_1,
        beta_2=BETA_2,
        epsilon=EPSILON,
    )


@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, 4), (9, 17), (9, 2, 3)])
def test_values(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(1)
    indices = random.integers(0, 6, 40)
    gradients = random.normal(size=(40, *shape[1:])).astype(np.float32)
    variables = state(shape)
    w, m, v = (variable.numpy().astype(np.float64) for variable in variables)
    step(variables, indices, gradients)
    for row in range(6):
        g = gradients[indices == row].sum(0, dtype=np.float64)
        m[row] = BETA_1 * m[row] + (1 - BETA_1) * g
        v[row] = BETA_2 * v[row] + (1 - BETA_2) * g**2
        alpha = RATE * np.sqrt(1 - BETA_2**3) / (1 - BETA_1**3)
        w[row] -= alpha * m[row] / (np.sqrt(v[row]) + EPSILON)
    for variable, expected, before in zip(variables, (w, m, v), state(shape), strict=True):
        np.testing.assert_allclose(variable, expected, rtol=2e-6, atol=1e-6)
        np.testing.assert_array_equal(variable[6:], before[6:])


def test_duplicates_are_summed_in_their_order() -> None:
    # In any other order a 1 would survive, or two of them.
    gradients = np.array([[1.0], [1e8], [5.0], [-1e8], [1.0]], np.float32)
    variables = [tf.Variable(tf.zeros([3, 1])) for _ in range(3)]
    step(variables, [2, 2, 0, 2, 2], gradients)
    np.testing.assert_allclose(variables[1], [[0.5], [0.0], [0.1]], rtol=1e-6)


def test_threads_that_share_a_step_do_not_change_its_bits() -> None:
    random = np.random.default_rng(2)
    indices = random.integers(0, 30_000, 60_000)
    gradients = random.normal(size=(60_000, 16)).astype(np.float32)
    variables = [tf.Variable(tf.zeros([40_000, 16])) for _ in range(3)]
    step(variables, indices, gradients)
    sums = np.zeros([40_000, 16], np.float32)
    np.add.at(sums, indices, gradients)  # one after the other
    np.testing.assert_array_equal(variables[1], np.float32(1 - BETA_1) * sums)
    again = [tf.Variable(tf.zeros([40_000, 16])) for _ in range(3)]
    step(again, indices, gradients)
    for a, b in zip(variables, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bad", [-1, 4, 2**62])
def test_an_index_out_of_range_writes_nothing(bad: int) -> None:
    variables = state((4, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match=rf"\[0, 4\). Received: {bad} at .* 2"):
        step(variables, [0, 1, bad], tf.ones([3, 2]))
    for variable, before in zip(variables, state((4, 2)), strict=True):
        np.testing.assert_array_equal(variable, before)


def test_a_value_read_before_the_step_stays() -> None:
    variables = state((4, 2))
    read = [variable.read_value() for variable in variables]
    step(variables, [1], tf.ones([1, 2]))
    for variable, value, before in zip(variables, read, state((4, 2)), strict=True):
        np.testing.assert_array_equal(value, before)
        assert not np.array_equal(variable, before)


def test_no_rows_move_nothing() -> None:
    variables = state((4, 2))
    step(variables, tf.zeros([0], tf.int64), tf.zeros([0, 2]))
    np.testing.assert_array_equal(variables[0], state((4, 2))[0])


def test_refusals() -> None:
    w, m, v = state((4, 2))
    with pytest.raises(tf.errors.InvalidArgumentError, match="one row of the variable's shape"):
        step([w, m, v], [0, 1], tf.ones([2, 3]))
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"variables .* of one shape"):
        step([w, tf.Variable(tf.ones([3, 2])), v], [0], tf.ones([1, 2]))
    with pytest.raises(tf.errors.FailedPreconditionError, match="of float"):
        step([tf.Variable(tf.ones([4, 2], tf.float64)), m, v], [0], tf.ones([1, 2]))


@pytest.mark.parametrize(("indices", "gradients"), [([2, 1], [2, 3]), ([2], [3, 3]), ([2], [])])
def test_shapes_are_refused_when_a_graph_is_built(indices: list[int], gradients: list[int]) -> None:
    def build() -> None:
        step(state((4, 3)), tf.zeros(indices, tf.int64), tf.zeros(gradients))

    with tf.Graph().as_default(), pytest.raises(ValueError, match=r"[Ss]hape|[Dd]imension"):
        build()


def test_a_missing_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(module, "_FILE", tmp_path / "_qianmo_ops.so")
    with pytest.raises(RuntimeError, match=r"there is no such file\. Compile them: .*make nat"):
        library.__wrapped__()
