"""MLP: values, weights that depend on the seed alone, dropout that resumes."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.mlp import MLP
from qianmo.layers.seeding import derive_seed, pick_seed

X = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def numpy_mlp(x: np.ndarray, weights: list[np.ndarray]) -> list[np.ndarray]:
    outputs = []
    for kernel, bias in zip(weights[::2], weights[1::2], strict=True):
        x = np.maximum(x @ kernel + bias, 0)
        outputs.append(x)
    return outputs


def test_values_of_all_layers() -> None:
    mlp = MLP((7, 3), seed=1)
    last = mlp(X)
    mlp.set_weights([w + np.float32(0.1) for w in mlp.get_weights()])
    last, hidden = mlp(X), mlp.hidden(tf.constant(X))
    expected = numpy_mlp(X, mlp.get_weights())
    assert [h.shape[1] for h in hidden] == [7, 3]
    for h, e in zip(hidden, expected, strict=True):
        np.testing.assert_allclose(h, e, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(last, hidden[-1])


def test_hidden_builds_a_layer_that_was_not_called() -> None:
    mlp = MLP((7, 3), dropout=0.5, seed=1)
    hidden = mlp.hidden(tf.constant(X), training=True)
    assert len(hidden) == 2
    assert len(mlp.weights) == 5


def test_without_units_it_is_the_identity() -> None:
    mlp = MLP((), dropout=0.5)
    np.testing.assert_array_equal(mlp(X, training=True), X)
    assert mlp.hidden(tf.constant(X)) == []


def test_weights_depend_on_the_seed_and_not_on_what_was_built_before() -> None:
    def weights(seed: int) -> list[np.ndarray]:
        mlp = MLP((7, 3), seed=seed)
        mlp(X)
        return mlp.get_weights()

    alone = weights(3)
    tf_keras.utils.set_random_seed(99)
    MLP((7, 3))(X)
    tf_keras.layers.Dense(4)(X)
    for a, b in zip(alone, weights(3), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(alone[0], weights(4)[0])


def test_glorot_limits_and_unequal_layers() -> None:
    mlp = MLP((50, 50, 50), seed=0)
    mlp(np.zeros([1, 50], np.float32))
    kernels = mlp.get_weights()[::2]
    limit = np.sqrt(6 / 100)
    for kernel in kernels:
        assert 0.98 * limit < np.abs(kernel).max() <= limit
    assert not np.array_equal(kernels[0], kernels[1])
    assert not np.array_equal(kernels[1], kernels[2])


def test_without_a_seed_one_is_drawn_and_kept_in_the_config() -> None:
    first, second = MLP((3,)), MLP((3,))
    assert first.seed != second.seed
    again = MLP.from_config(first.get_config())
    first(X)
    again(X)
    np.testing.assert_array_equal(first.get_weights()[0], again.get_weights()[0])


def test_l2_is_a_loss_on_the_kernels() -> None:
    mlp = MLP((7, 3), l2=0.25, seed=1)
    mlp(X)
    mlp.set_weights([w + np.float32(0.1) for w in mlp.get_weights()])
    kernels = mlp.get_weights()[::2]
    expected = 0.25 * sum(np.square(k).sum() for k in kernels)
    np.testing.assert_allclose(sum(mlp.losses), expected, rtol=1e-6)
    plain = MLP((7, 3))
    plain(X)
    assert plain.losses == []


def test_dropout_keeps_the_mean_and_drops_the_rate() -> None:
    mlp = MLP((200,), dropout=0.3, seed=1)
    x = np.ones([100, 8], np.float32)
    kept = mlp(x).numpy()
    dropped = mlp(x, training=True).numpy()
    positive = kept > 0
    share = np.mean(dropped[positive] == 0)
    assert abs(share - 0.3) < 0.02
    survivors = positive & (dropped != 0)
    np.testing.assert_allclose(dropped[survivors], kept[survivors] / 0.7, rtol=1e-6)
    np.testing.assert_array_equal(mlp(x), kept)


def test_masks_differ_between_calls_and_layers_and_repeat_with_the_seed() -> None:
    def masks(seed: int, calls: int) -> list[np.ndarray]:
        # A positive input through identity kernels: the outputs are the masks, scaled.
        mlp = MLP((50, 50), dropout=0.5, seed=seed)
        x = np.ones([4, 50], np.float32)
        mlp(x)
        eye, zero = np.eye(50, dtype=np.float32), np.zeros(50, np.float32)
        mlp.set_weights([eye, zero, eye, zero, np.int64(0)])
        found = []
        for _ in range(calls):
            first, second = mlp.hidden(tf.constant(x), training=True)
            found += [first.numpy() > 0, second.numpy()[first.numpy() > 0] > 0]
        return found

    one = masks(1, 2)
    assert not np.array_equal(one[0], one[2])
    # A second layer with the first one's mask would drop nothing that is left.
    assert 0.3 < np.mean(one[1]) < 0.7
    for a, b in zip(one, masks(1, 2), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[0], masks(2, 1)[0])


def test_a_resumed_run_gives_the_same_bits(tmp_path: pathlib.Path) -> None:
    def start() -> tuple[MLP, tf_keras.optimizers.Optimizer, tf.train.Checkpoint]:
        mlp = MLP((16, 4), dropout=0.5, seed=5)
        adam = tf_keras.optimizers.Adam(0.01)
        mlp(X)
        adam.build(mlp.trainable_weights)
        return mlp, adam, tf.train.Checkpoint(mlp=mlp, adam=adam)

    def train(mlp: MLP, adam: tf_keras.optimizers.Optimizer, steps: int) -> None:
        @tf.function
        def step() -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(mlp(X, training=True) - 1))
            gradients = tape.gradient(loss, mlp.trainable_weights)
            adam.apply_gradients(zip(gradients, mlp.trainable_weights, strict=True))

        for _ in range(steps):
            step()

    whole, adam, _ = start()
    train(whole, adam, 6)

    killed, adam, checkpoint = start()
    train(killed, adam, 3)
    path = checkpoint.write(str(tmp_path / "checkpoint"))
    resumed, adam, checkpoint = start()
    checkpoint.read(path).assert_consumed()
    train(resumed, adam, 3)

    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(whole.get_weights()[0], killed.get_weights()[0])


def test_dtype_policy_of_the_layer_reaches_its_parts() -> None:
    mlp = MLP((7, 3), dropout=0.5, dtype="mixed_bfloat16")
    assert mlp(X, training=True).dtype == tf.bfloat16
    assert MLP.from_config(mlp.get_config())(X).dtype == tf.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"units": (4, 0)}, r"`units` should be widths >= 1. Received: \(4, 0\)"),
        ({"units": (4,), "dropout": 1.0}, r"`dropout` should be in \[0, 1\). Received: 1.0"),
        ({"units": (4,), "l2": -1.0}, "`l2` should be >= 0. Received: -1.0"),
        ({"units": (4,), "seed": -1}, "`seed` should be >= 0. Received: -1"),
        ({"units": (4,), "activation": "rellu"}, "rellu"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(**arguments)


def test_drawn_seeds_follow_the_global_seed() -> None:
    tf_keras.utils.set_random_seed(4)
    first = pick_seed(None)
    tf_keras.utils.set_random_seed(4)
    assert pick_seed(None) == first
    assert pick_seed(7) == 7


def test_derived_seeds_are_apart() -> None:
    seeds = {derive_seed(s, i, j) for s in range(10) for i in range(10) for j in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
