"""The op against NumPy, over files that the writer made."""

from __future__ import annotations

import pathlib
import threading
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import cancellation

from qianmo.export import embedding_shards as shards
from qianmo.export.saved_model import session
from qianmo.layers.embed import pool
from qianmo.ops.embedding_lookup import EmbeddingStore, Read

DTYPES = ("float32", "float16", "bfloat16", "int8")
RNG = np.random.default_rng(0)
DENSE = RNG.normal(size=(1000, 7)).astype(np.float32)
DENSE[3] = [0, 1e-7, -3e-5, 6e-8, 60000, -1, 2**-24]  # what float16 has besides normal numbers
IDS = np.unique(RNG.integers(-(2**63), 2**63 - 1, 700, dtype=np.int64))
IDS[:4] = [0, -1, -(2**63), 2**63 - 1]
HASHED = RNG.normal(size=(len(IDS), 7)).astype(np.float32)


def as_stored(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """What a dtype keeps of float32, written anew from its definition."""
    if dtype == "bfloat16":
        return tf.cast(tf.cast(vectors, tf.bfloat16), tf.float32).numpy()
    if dtype == "int8":
        scale = np.abs(vectors).max(1, keepdims=True) / np.float32(127)
        return np.rint(vectors / np.maximum(scale, 1e-30)).astype(np.int8) * scale
    return vectors.astype(dtype).astype(np.float32)


def store(folder: pathlib.Path, version: int = 1, add: float = 0.0) -> pathlib.Path:
    """A published version with a dense and a hashed table of each dtype."""
    tables = []
    for dtype in DTYPES:
        dense = shards.Table(name=f"dense_{dtype}", dim=7, num_rows=1000, dtype=dtype)
        hashed = shards.Table(
            name=f"hash_{dtype}", dim=7, num_rows=len(IDS), dtype=dtype, hashed=True, default_id=-1
        )
        tables += [
            (dense, iter([DENSE[:300] + add, DENSE[300:] + add])),
            (hashed, iter([(IDS[:99], HASHED[:99] + add), (IDS[99:], HASHED[99:] + add)])),
        ]
    shards.write(folder, version, tables, shard_rows=256)
    shards.publish(folder, version)
    return folder


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return EmbeddingStore(str(store(tmp_path_factory.mktemp("store"))), verify=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_of_ids_of_any_shape(opened: EmbeddingStore, dtype: str) -> None:
    expected = {"dense": as_stored(DENSE, dtype), "hash": as_stored(HASHED, dtype)}
    for shape in ((), (0,), (1,), (63,), (500,), (4, 50), (2, 3, 4), (2, 0, 3), (3, 20000)):
        rows = RNG.integers(0, len(IDS), shape)
        found = opened.lookup(
            [
                Read(f"dense_{dtype}", 7, tf.constant(rows, tf.int64)),
                Read(f"hash_{dtype}", 7, tf.constant(IDS[rows], tf.int64)),
            ]
        )
        for (_, table), vectors in zip(expected.items(), found, strict=True):
            np.testing.assert_array_equal(vectors, table[rows])


@pytest.mark.parametrize("how", ["mean", "sum", "sqrtn", "max"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pooled_as_the_model_pools(opened: EmbeddingStore, dtype: str, how: str) -> None:
    for batch, width in ((0, 3), (5, 0), (50, 1), (300, 70)):
        rows = RNG.integers(0, len(IDS), (batch, width))
        lengths = RNG.integers(-1, width + 2, batch)
        lengths[: batch // 5] = 0
        dense, hashed = opened.lookup(
            [
                Read(f"dense_{dtype}", 7, tf.constant(rows), tf.constant(lengths), how),
                Read(f"hash_{dtype}", 7, tf.constant(IDS[rows]), tf.constant(lengths), how),
            ]
        )
        clipped = np.clip(lengths, 0, width)
        # Sums of up to 70 numbers below 5, or of one below 60001, in another order.
        for vectors, table in ((dense, DENSE), (hashed, HASHED)):
            expected = pool(tf.constant(as_stored(table, dtype)[rows]), tf.constant(clipped), how)
            np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("how", ["mean", "sum", "sqrtn"])
def test_weights(opened: EmbeddingStore, how: str) -> None:
    rows = RNG.integers(4, 1000, (200, 9))
    lengths = RNG.integers(0, 10, 200)
    weights = RNG.uniform(0.5, 2, (200, 9)).astype(np.float32)
    read = Read("dense_float32", 7, tf.constant(rows), tf.constant(lengths), how, weights)
    used = weights * (np.arange(9) < lengths[:, None])
    total = (used[:, :, None] * DENSE[rows]).sum(1)
    over = {"mean": used.sum(1), "sum": np.ones(200), "sqrtn": np.sqrt((used**2).sum(1))}[how]
    expected = total / np.where(lengths > 0, over, 1)[:, None]
    np.testing.assert_allclose(opened.lookup([read])[0], expected, rtol=1e-5, atol=1e-5)


def test_wrong_weights(opened: EmbeddingStore) -> None:
    ids, lengths = tf.constant([[1, 2], [3, 4]]), tf.constant([1, 2])
    read = Read("dense_float32", 7, ids, lengths, "max", tf.ones([2, 2]))
    with pytest.raises(ValueError, match="Weights should stand where `pooling` is mean"):
        tf.function(lambda: opened.lookup([read]))()
    with pytest.raises(tf.errors.InvalidArgumentError, match="Weights should stand where"):
        opened.lookup([read])
    read = read._replace(pooling="mean", weights=tf.ones([2, 3]))
    with pytest.raises(ValueError, match="must be equal"):
        tf.function(lambda: opened.lookup([read]))()
    with pytest.raises(tf.errors.InvalidArgumentError, match="`weights` should have the shape"):
        opened.lookup([read])


def test_ids_without_a_row(opened: EmbeddingStore) -> None:
    stray = tf.constant([5, 1000, -1, 2**62, -(2**63), 5])
    unknown = tf.constant([int(IDS[9]), 123456789, int(IDS[9])])
    reads = [Read("dense_float32", 7, stray), Read("hash_float32", 7, unknown)]
    default = opened.lookup(reads)
    np.testing.assert_array_equal(default[0], DENSE[[5, 0, 0, 0, 0, 5]])
    np.testing.assert_array_equal(default[1], HASHED[[9, 1, 9]])  # the row of id -1
    zero = opened.lookup(reads, missing="zero")
    np.testing.assert_array_equal(
        zero[0], DENSE[[5, 0, 0, 0, 0, 5]] * [[1], [0], [0], [0], [0], [1]]
    )
    np.testing.assert_array_equal(zero[1], HASHED[[9, 1, 9]] * [[1], [0], [1]])
    for read, named in zip(reads, (1000, 123456789), strict=True):
        with pytest.raises(tf.errors.NotFoundError, match=f"has no row of id {named} at row 1"):
            opened.lookup([read], missing="error")
    pooled = Read("dense_float32", 7, stray[None], tf.constant([2]), "sum")
    np.testing.assert_allclose(opened.lookup([pooled])[0], DENSE[[5]] + DENSE[[0]], rtol=1e-6)
    with pytest.raises(tf.errors.NotFoundError, match="has no row of an id at row 0"):
        opened.lookup([pooled], missing="error")
    # What lies right of the length is not looked at.
    opened.lookup([pooled._replace(lengths=tf.constant([1]))], missing="error")


def test_shapes_are_known_before_running(opened: EmbeddingStore) -> None:
    shapes: list[list[int | None]] = []

    @tf.function
    def trace(ids: tf.Tensor, matrix: tf.Tensor, lengths: tf.Tensor) -> None:
        reads = [
            Read("dense_float32", 7, ids),
            Read("dense_float32", 7, matrix, lengths, "max"),
            Read("dense_float32", 7, matrix),
        ]
        shapes.extend(v.shape.as_list() for v in opened.lookup(reads))
        unknown = tf.raw_ops.PlaceholderWithDefault(input=ids, shape=None)
        assert opened.lookup([Read("dense_float32", 7, unknown)])[0].shape.rank is None

    trace.get_concrete_function(
        tf.TensorSpec([None, 3, 2], tf.int64),
        tf.TensorSpec([None, 9], tf.int64),
        tf.TensorSpec([8], tf.int64),
    )
    assert shapes == [[None, 3, 2, 7], [8, 7], [None, 9, 7]]


@pytest.mark.parametrize(
    ("ids", "lengths", "pooling", "message"),
    [
        ([1, 2], [1], "mean", "must be rank 2"),
        ([[1, 2]], [[1]], "mean", "must be rank 1"),
        ([[1, 2]], [1, 1], "mean", "must be equal"),
        ([[1, 2]], None, "mean", "`lengths` one for each that is pooled"),
        ([[1, 2]], [1], "none", "one for each that is pooled"),
    ],
)
def test_wrong_shapes(opened: EmbeddingStore, ids, lengths, pooling, message) -> None:
    def find() -> list[tf.Tensor]:
        return opened.lookup(
            [
                Read(
                    "dense_float32",
                    7,
                    tf.constant(ids, tf.int64),
                    None if lengths is None else tf.constant(lengths, tf.int64),
                    pooling,
                )
            ]
        )

    with pytest.raises(ValueError, match=message):
        tf.function(find).get_concrete_function()
    with pytest.raises(tf.errors.InvalidArgumentError):
        find()


@pytest.mark.parametrize(
    ("table", "dim", "message"),
    [
        ("none_such", 7, "should have a table `none_such`.*none of that name"),
        ("dense_int8", 8, "dim 8. It has one of dim 7"),
    ],
)
def test_a_table_that_the_version_has_not(opened: EmbeddingStore, table, dim, message) -> None:
    with pytest.raises(tf.errors.FailedPreconditionError, match=message):
        opened.lookup([Read(table, dim, tf.constant([1]))])


def whole_takes(opened: EmbeddingStore, read: Read) -> float:
    start = time.monotonic()
    opened.lookup([read], timeout_ms=60_000)
    return time.monotonic() - start


def test_time_limit_and_cancellation(opened: EmbeddingStore) -> None:
    many = tf.random.uniform([300, 100_000], 0, 1000, tf.int64)
    read = Read("hash_int8", 7, many, tf.fill([300], tf.constant(100_000, tf.int64)), "mean")
    with pytest.raises(tf.errors.DeadlineExceededError, match="longer than 1 ms"):
        opened.lookup([read], timeout_ms=1)
    manager = cancellation.CancellationManager()
    find = tf.function(lambda: opened.lookup([read])).get_concrete_function()
    timer = threading.Timer(0.05, manager.start_cancel)
    timer.start()
    start = time.monotonic()
    with pytest.raises(tf.errors.CancelledError):
        manager.get_cancelable_function(find)()
    cancelled_after = time.monotonic() - start
    assert cancelled_after < whole_takes(opened, read) / 2


def test_sixteen_threads_read_while_versions_change(tmp_path: pathlib.Path) -> None:
    folder = store(tmp_path / "s")
    following = EmbeddingStore(str(folder))
    rows = np.arange(1000)
    faults: list[str] = []
    seen: set[float] = set()
    stop = threading.Event()
    reads = [
        Read("dense_float32", 7, tf.constant(rows)),
        Read("hash_float32", 7, tf.constant(IDS)),
    ]

    def ask() -> None:
        try:
            while not stop.is_set():
                dense, hashed = (v.numpy() for v in following.lookup(reads))
                steps = np.unique(np.rint(np.concatenate([dense - DENSE, hashed - HASHED])))
                seen.update(steps.tolist())
                time.sleep(0.005)
                if len(steps) > 1:
                    faults.append(f"one answer of several versions: {steps}")
        except Exception as error:
            faults.append(repr(error))

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(16)]
    for thread in threads:
        thread.start()
    for version in range(2, 6):
        store(folder, version, add=100.0 * (version - 1))
        time.sleep(0.25)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults, faults[:3]
    assert seen == {100.0 * k for k in range(5)}


def publish(folder: pathlib.Path, version: int, space: int = 1) -> None:
    if not (folder / str(version)).exists():
        table = shards.Table(name="t", dim=2, num_rows=4)
        shards.write(folder, version, [(table, [np.full((4, 2), version)])], space=space)
    shards.publish(folder, version)


def reads_soon(following: EmbeddingStore, expected: int | str) -> bool:
    """Whether lookups come to give a version's rows, or an error that says `expected`."""
    for _ in range(100):
        try:
            found = int(following.lookup([Read("t", 2, tf.constant([1]))])[0][0, 0])
        except tf.errors.FailedPreconditionError as error:
            if isinstance(expected, str) and expected in str(error):
                return True
        else:
            if found == expected:
                return True
        time.sleep(0.05)
    return False


def test_which_versions_a_graph_accepts(tmp_path: pathlib.Path) -> None:
    for version, space in ((1, 1), (2, 2), (3, 2), (5, 5)):
        publish(tmp_path, version, space)
    publish(tmp_path, 2)
    newest = EmbeddingStore(str(tmp_path))
    falls_back = EmbeddingStore(str(tmp_path), space=2)
    refuses = EmbeddingStore(str(tmp_path), space=2, on_mismatch="refuse")
    for each in (newest, falls_back, refuses):
        assert reads_soon(each, 2)
    publish(tmp_path, 5)
    assert reads_soon(newest, 5)
    assert reads_soon(falls_back, 3)
    assert reads_soon(
        refuses, "accepts embedding versions of space 2, and CURRENT names 5 of space 5"
    )
    publish(tmp_path, 2)
    for each in (newest, falls_back, refuses):
        assert reads_soon(each, 2)
    with pytest.raises(
        tf.errors.FailedPreconditionError, match="no version there is of that space"
    ):
        EmbeddingStore(str(tmp_path), space=4)


def test_a_version_that_cannot_be_opened_leaves_the_one_before(tmp_path: pathlib.Path) -> None:
    publish(tmp_path, 1)
    following = EmbeddingStore(str(tmp_path), verify=True)
    publish(tmp_path, 2)
    assert reads_soon(following, 2)
    publish(tmp_path, 3)
    publish(tmp_path, 2)
    assert reads_soon(following, 2)
    (rows,) = (tmp_path / "3").glob("*.rows")
    data = bytearray(rows.read_bytes())
    data[4100] ^= 1
    rows.write_bytes(data)
    (tmp_path / "CURRENT").write_text("3\n")
    time.sleep(0.4)
    assert reads_soon(following, 2)
    with pytest.raises(tf.errors.FailedPreconditionError, match="checksum of its rows differs"):
        EmbeddingStore(str(tmp_path), on_mismatch="refuse", verify=True)


def test_in_a_saved_model(tmp_path: pathlib.Path) -> None:
    for version in (1, 2):
        publish(tmp_path / "s", version)
    (tmp_path / "embeddings").write_text("s\n")
    module = tf.Module()
    module.store = EmbeddingStore(tf.saved_model.Asset(str(tmp_path / "embeddings")))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, "ids")])
    def find(ids: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"vectors": module.store.lookup([Read("t", 2, ids)])[0]}

    folder = tmp_path / "graph" / "1"
    tf.saved_model.save(module, str(folder), signatures=find)
    del module.store
    (folder / "assets" / "embeddings").write_text("../../../s\n")
    (tmp_path / "embeddings").unlink()
    tf.io.gfile.rename(str(tmp_path), str(tmp_path) + "_moved")
    folder = pathlib.Path(str(tmp_path) + "_moved") / "graph" / "1"
    with session(folder) as run:
        assert run("serving_default", {"ids": np.array([1, 3])})["vectors"].tolist() == [[2, 2]] * 2
        publish(folder.parents[1] / "s", 3)
        for _ in range(100):
            found = run("serving_default", {"ids": np.array([1])})["vectors"].tolist()
            if found == [[3, 3]]:
                break
            time.sleep(0.05)
        assert found == [[3, 3]]
    loaded = tf.saved_model.load(str(folder))
    found = loaded.signatures["serving_default"](ids=tf.constant([1], tf.int64))
    assert found["vectors"].numpy().tolist() == [[3, 3]]
    (folder / "assets" / "embeddings").write_text("../../../other\n")
    refused = pytest.raises(tf.errors.FailedPreconditionError, match="no such folder of embeddings")
    with refused, session(folder):
        pass
    (folder.parents[1] / "other").mkdir()
    refused = pytest.raises(
        tf.errors.FailedPreconditionError, match="CURRENT: there is no such file"
    )
    with refused, session(folder):
        pass
