"""SparseAdam and RowwiseAdagrad: values, cost on the rows of the batch alone, resumption."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers import sparse_adam
from qianmo.layers.rowwise_adagrad import RowwiseAdagrad
from qianmo.layers.sparse_adam import SparseAdam

ROWS, DIM, STEPS = 23, 4, 6
BOTH = pytest.mark.parametrize("optimizer_class", [SparseAdam, RowwiseAdagrad])

Numpy = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids with duplicates, and a gradient for each; no step reads all rows."""
    random = np.random.default_rng(0)
    for _ in range(STEPS):
        ids = random.integers(0, 9, 12)
        yield ids, random.normal(size=(12, DIM))


def table() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)


def numpy_adam() -> Numpy:
    m, v, t = np.zeros([ROWS, DIM]), np.zeros([ROWS, DIM]), 0

    def step(w: np.ndarray, ids: np.ndarray, gradients: np.ndarray) -> None:
        nonlocal t
        t += 1
        for row in set(ids.tolist()):
            g = gradients[ids == row].sum(0)
            m[row] = 0.9 * m[row] + 0.1 * g
            v[row] = 0.999 * v[row] + 0.001 * g**2
            rate = 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            w[row] -= rate * m[row] / (np.sqrt(v[row]) + 1e-7)

    return step


def numpy_rowwise() -> Numpy:
    a = np.zeros(ROWS)

    def step(w: np.ndarray, ids: np.ndarray, gradients: np.ndarray) -> None:
        for row in set(ids.tolist()):
            g = gradients[ids == row].sum(0)
            a[row] += np.mean(g**2)
            w[row] -= 0.01 * g / (np.sqrt(a[row]) + 1e-7)

    return step


def apply(
    optimizer: tf_keras.optimizers.Optimizer, w: tf.Variable, in_graph: bool = True
) -> Callable[[np.ndarray, np.ndarray], None]:
    """A training step whose gradient on the rows `ids` of `w` is `gradients`."""

    def step(ids: tf.Tensor, gradients: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(w, ids) * tf.cast(gradients, tf.float32))
        optimizer.apply_gradients([(tape.gradient(loss, w), w)])

    return tf.function(step) if in_graph else step


@pytest.mark.parametrize("in_graph", [True, False])
@pytest.mark.parametrize(
    ("optimizer_class", "transcription"),
    [(SparseAdam, numpy_adam), (RowwiseAdagrad, numpy_rowwise)],
)
def test_sparse_values(
    optimizer_class: type, transcription: Callable[[], Numpy], in_graph: bool
) -> None:
    w, expected = tf.Variable(table()), table().astype(np.float64)
    step, numpy_step = apply(optimizer_class(0.01), w, in_graph), transcription()
    for ids, gradients in batches():
        step(ids, gradients)
        numpy_step(expected, ids, gradients)
    np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(w[9:], table()[9:])


def test_sparse_adam_of_other_types_needs_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_adam, "library", None)
    w, expected = tf.Variable(table().astype(np.float64)), table().astype(np.float64)
    optimizer, numpy_step = SparseAdam(0.01), numpy_adam()
    for ids, gradients in batches():
        slices = tf.IndexedSlices(tf.constant(gradients), tf.constant(ids), [ROWS, DIM])
        optimizer.apply_gradients([(slices, w)])
        numpy_step(expected, ids, gradients)
    # The rate is a float32 variable.
    np.testing.assert_allclose(w, expected, rtol=1e-7, atol=1e-8)
    np.testing.assert_array_equal(w[9:], table()[9:])


def test_sparse_adam_needs_its_library_when_a_sparse_gradient_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise RuntimeError("compile them")

    monkeypatch.setattr(sparse_adam, "library", missing)
    optimizer, w = SparseAdam(0.01), tf.Variable(table())
    optimizer.apply_gradients([(tf.ones([ROWS, DIM]), w)])
    with pytest.raises(RuntimeError, match="compile them"):
        apply(optimizer, w)(np.array([1]), np.ones([1, DIM]))


def test_sparse_adam_in_a_strategy() -> None:
    w, expected = table(), table().astype(np.float64)
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        w = tf.Variable(table())
        optimizer = SparseAdam(0.01)
    step, numpy_step = apply(optimizer, w, in_graph=False), numpy_adam()
    in_replicas = tf.function(lambda *batch: strategy.run(step, batch))
    for ids, gradients in batches():
        in_replicas(ids, gradients)
        numpy_step(expected, ids, gradients)
    np.testing.assert_allclose(w.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_saved_model_holds_no_op_of_its_optimizer(tmp_path: pathlib.Path) -> None:
    model = tf_keras.Sequential([tf_keras.layers.Embedding(9, 2, input_length=1)])
    model.compile(SparseAdam(0.1), "mse")
    model.fit(np.arange(8)[:, None], np.ones([8, 1, 2]), verbose=0)
    model.save(tmp_path / "model", save_format="tf")
    assert b"Qianmo" not in (tmp_path / "model" / "saved_model.pb").read_bytes()


def test_dense_adam_is_that_of_keras() -> None:
    ours, theirs = tf.Variable(table()), tf.Variable(table())
    random = np.random.default_rng(2)
    a, b = SparseAdam(0.01), tf_keras.optimizers.Adam(0.01)
    for _ in range(STEPS):
        gradient = tf.constant(random.normal(size=(ROWS, DIM)), tf.float32)
        a.apply_gradients([(gradient, ours)])
        b.apply_gradients([(gradient, theirs)])
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert not np.allclose(ours, table())


@BOTH
def test_a_dense_gradient_is_one_that_names_all_rows(optimizer_class: type) -> None:
    dense, sparse = tf.Variable(table()), tf.Variable(table())
    a, b = optimizer_class(0.01), optimizer_class(0.01)
    random = np.random.default_rng(2)
    for _ in range(STEPS):
        gradient = tf.constant(random.normal(size=(ROWS, DIM)), tf.float32)
        a.apply_gradients([(gradient, dense)])
        b.apply_gradients([(tf.IndexedSlices(gradient, tf.range(ROWS), [ROWS, DIM]), sparse)])
    np.testing.assert_allclose(dense, sparse, rtol=1e-6, atol=1e-6)


def test_rowwise_values_of_dense_variables_of_any_rank() -> None:
    random = np.random.default_rng(3)
    for shape in ((), (5,), (5, 3), (2, 3, 4)):
        w, expected = tf.Variable(tf.ones(shape)), np.ones(shape)
        optimizer, a = RowwiseAdagrad(0.01), 0.0
        for _ in range(3):
            g = random.normal(size=shape)
            optimizer.apply_gradients([(tf.constant(g, tf.float32), w)])
            a = a + np.mean(g**2, tuple(range(1, len(shape))), keepdims=True)
            expected = expected - 0.01 * g / (np.sqrt(a) + 1e-7)
        np.testing.assert_allclose(w, expected, rtol=1e-6, atol=1e-6)


@BOTH
def test_first_step_moves_by_the_learning_rate(optimizer_class: type) -> None:
    w = tf.Variable(tf.zeros([3, 2]))
    apply(optimizer_class(0.5), w)(np.array([1, 1]), np.array([[3.0, -3.0], [1.0, -1.0]]))
    np.testing.assert_allclose(w, [[0, 0], [-0.5, 0.5], [0, 0]], rtol=1e-5)


def lengths_in_a_step(optimizer: tf_keras.optimizers.Optimizer, rows: int) -> set[int | None]:
    """First axes of all tensors that a training step on a table of so many rows makes."""
    signature = [tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, DIM], tf.float64)]
    step = apply(optimizer, tf.Variable(tf.zeros([rows, DIM])))
    operations = step.get_concrete_function(*signature).graph.get_operations()
    assert {operation.type for operation in operations} >= {"ResourceGather", "AssignAddVariableOp"}
    tensors = [tensor for operation in operations for tensor in operation.outputs]
    return {tensor.shape[0] for tensor in tensors if tensor.shape.rank}


def test_no_tensor_of_a_step_is_as_long_as_the_table() -> None:
    rows = 7919
    assert rows not in lengths_in_a_step(SparseAdam(), rows)
    assert rows not in lengths_in_a_step(RowwiseAdagrad(), rows)
    # What the test looks for, where it is known to be.
    assert rows in lengths_in_a_step(tf_keras.optimizers.Adam(), rows)


@BOTH
def test_state_is_as_small_as_promised(optimizer_class: type) -> None:
    optimizer = optimizer_class()
    optimizer.build([tf.Variable(table())])
    numbers = sum(int(tf.size(v)) for v in optimizer.variables if v.shape.rank)
    assert numbers == (2 * ROWS * DIM if optimizer_class is SparseAdam else ROWS)


@BOTH
def test_a_resumed_run_gives_the_same_bits(optimizer_class: type, tmp_path: pathlib.Path) -> None:
    data = list(batches())

    def start() -> tuple[tf.Variable, Callable[..., None], tf.train.Checkpoint]:
        w, optimizer = tf.Variable(table()), optimizer_class(0.01)
        return w, apply(optimizer, w), tf.train.Checkpoint(w=w, optimizer=optimizer)

    whole, step, _ = start()
    for batch in data:
        step(*batch)

    _, step, checkpoint = start()
    for batch in data[:3]:
        step(*batch)
    path = checkpoint.write(str(tmp_path / "checkpoint"))

    # Restored before its slots exist, as a fresh process does.
    resumed, step, checkpoint = start()
    status = checkpoint.read(path)
    for batch in data[3:]:
        step(*batch)
    status.assert_consumed()
    np.testing.assert_array_equal(resumed, whole)


@BOTH
def test_config_through_json(optimizer_class: type) -> None:
    optimizer = optimizer_class(0.25, epsilon=1e-3, name="mine")
    described = json.loads(json.dumps(tf_keras.optimizers.serialize(optimizer)))
    again = tf_keras.optimizers.deserialize(described)
    assert type(again) is optimizer_class
    assert again.get_config() == optimizer.get_config()
    assert optimizer.get_config()["learning_rate"] == 0.25


@BOTH
def test_learning_rate_schedule(optimizer_class: type) -> None:
    schedule = tf_keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.0])
    optimizer = optimizer_class(schedule)
    again = optimizer_class.from_config(json.loads(json.dumps(optimizer.get_config())))
    for each in (optimizer, again):
        w = tf.Variable(tf.zeros([3, 1]))
        step = apply(each, w)
        for _ in range(4):
            step(np.array([0]), np.array([[1.0]]))
        # Two steps at 0.5 and two at 0.
        moved = -1.0 if optimizer_class is SparseAdam else -0.5 - 0.5 / np.sqrt(2)
        np.testing.assert_allclose(w[0, 0], moved, rtol=1e-4)


@BOTH
def test_one_optimizer_trains_a_model_of_table_and_kernel(optimizer_class: type) -> None:
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Embedding(50, 8, input_length=2),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(16, activation="relu"),
            tf_keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer_class(0.05), tf_keras.losses.BinaryCrossentropy(from_logits=True))
    ids = np.random.default_rng(0).integers(0, 50, (512, 2))
    labels = (ids[:, 0] < ids[:, 1]).astype(np.float32)
    history = model.fit(ids, labels, epochs=15, batch_size=64, verbose=0).history["loss"]
    assert history[0] > 0.5
    assert history[-1] < 0.3


@pytest.mark.parametrize("key", ["beta_1", "beta_2"])
def test_refusals(key: str) -> None:
    with pytest.raises(ValueError, match=rf"`{key}` should be in \[0, 1\). Received: 1.0"):
        SparseAdam(**{key: 1.0})
