"""Meta-Embedding: its loss against NumPy, what it leaves alone, and that it helps new items."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical
from qianmo.layers.meta_embedding import MetaEmbedding, warm_up_loss
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.models import zoo
from qianmo.models.cold_items import ColdItems
from qianmo.models.ranker import Ranker

ITEMS, KINDS = 60, 6
SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=10, dim=4, side="user"),
        Categorical(name="item", num_ids=ITEMS, dim=4, side="item"),
        Categorical(name="kind", num_ids=KINDS, dim=4, side="item"),
    ),
    labels=("click",),
    task_id="item",
    timestamp="time",
)


def rows(items: Any, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """An item is liked as its kind is, and a little by itself."""
    rng = np.random.default_rng(seed)
    kind = items % KINDS
    rate = np.where(kind % 2 == 0, 0.8, 0.2)
    features = {"user": rng.integers(0, 10, len(items)), "item": items, "kind": kind}
    targets = {
        "labels": (rng.random(len(items)) < rate).astype(np.float32)[:, None],
        "weight": np.ones(len(items), np.float32),
        "task_id": items,
        "timestamp": rng.permutation(len(items)),
    }
    return tf.nest.map_structure(tf.constant, (features, targets))


def base() -> Ranker:
    tf_keras.utils.set_random_seed(2)
    model = zoo.build(SCHEMA, {"name": "wdl", "units": (8,), "embedding_stddev": 0.3})
    model.build()
    return model


def test_the_loss_is_that_of_the_equation() -> None:
    rng = np.random.default_rng(1)
    phi, centres = rng.normal(size=(2, 5, 3))
    other = rng.normal(size=(5, 3))

    def squares(centre: Any) -> Any:
        return lambda v: tf.reduce_sum(tf.square(v - centre), 1)

    found = warm_up_loss(
        tf.constant(phi), squares(centres), squares(other), step_size=0.2, cold_share=0.3
    )
    stepped = phi - 0.2 * 2 * (phi - centres)
    before, after = ((phi - centres) ** 2).sum(1), ((stepped - other) ** 2).sum(1)
    np.testing.assert_allclose(found, 0.3 * before + 0.7 * after, rtol=1e-12)


def test_first_vectors_and_losses_of_a_batch() -> None:
    model = base()
    cold = ColdItems(model, "item", rows=3, step_size=0.5, cold_share=0.25, seed=4)
    items = np.repeat(np.arange(12, 20), [1, 2, 3, 4, 5, 6, 9, 10])
    features, targets = rows(np.random.default_rng(3).permutation(items))
    found = cold.losses_of(features, targets).numpy()

    kernel, bias = (v.numpy() for v in cold.generator.dense.weights)
    kinds, first, _ = model.embed.rows("kind")
    content = kinds.numpy()[first + 1 + features["kind"].numpy()][:, :4]
    phi = 0.2 * np.tanh(content @ kernel + bias)
    assert phi.shape == (len(items), 4 + model.embed.linear_dim)
    np.testing.assert_allclose(cold.first_vectors(features), phi, rtol=1e-5)

    encoded = model.encode(features)
    label, time = targets["labels"].numpy()[:, 0], targets["timestamp"].numpy()
    expected = {}
    for item in range(13, 20):
        own = np.flatnonzero(features["item"].numpy() == item)
        own = own[np.argsort(time[own])]
        cut = min(3, len(own) // 2)

        def loss(vector: Any, chosen: Any) -> Any:
            part = tf.nest.map_structure(lambda c: tf.gather(c, chosen), encoded)
            z = cold.logits(part, tf.repeat(vector[None], len(chosen), 0))[:, 0]
            return tf.reduce_mean(tf.nn.softplus(z) - z * label[chosen])

        start = tf.Variable(phi[own[0]])
        with tf.GradientTape() as tape:
            before = loss(start, own[:cut])
        after = loss(start - 0.5 * tape.gradient(before, start), own[cut : cut + 3])
        expected[item] = 0.25 * before.numpy() + 0.75 * after.numpy()
    in_order = [i for i in dict.fromkeys(features["item"].numpy().tolist()) if i in expected]
    np.testing.assert_allclose(found, [expected[i] for i in in_order], rtol=1e-4)


def test_rows_of_weight_0_teach_the_generator_nothing() -> None:
    cold = ColdItems(base(), "item", rows=2, seed=4)
    features, targets = rows(np.repeat(np.arange(5), 4))
    time = np.tile(np.arange(4), 5)
    weight = np.where(time % 2, 3.0, 0.0).astype(np.float32)  # a row of each batch of two

    def losses(rows_of: Any, label: Any, weight: Any) -> Any:
        part = {k: tf.gather(v, rows_of) for k, v in features.items()}
        own = {**targets, "labels": label, "timestamp": time, "weight": weight}
        return cold.losses_of(part, {k: tf.gather(v, rows_of) for k, v in own.items()}).numpy()

    label = targets["labels"].numpy()
    every, weighted = np.arange(20), np.flatnonzero(weight)
    found = losses(every, label, weight)
    np.testing.assert_allclose(
        found, losses(every, np.where(weight[:, None], label, 1 - label), weight)
    )
    cold.rows = 1
    np.testing.assert_allclose(found, losses(weighted, label, np.ones(20, "f4")), rtol=1e-5)


def test_logits_of_its_own_vectors_are_those_of_the_base() -> None:
    model = base()
    cold = ColdItems(model, "item")
    features, _ = rows(np.arange(20))
    encoded = model.encode(features)
    own = model.embed.vectors(encoded)["item"]
    np.testing.assert_allclose(cold.logits(encoded, own), model(features)["model"], rtol=1e-5)


def test_new_items_start_better_and_nothing_else_moves() -> None:
    model = base()
    model.compile(tf_keras.optimizers.Adam(0.01), SparseAdam(0.01))
    known = np.random.default_rng(7).integers(0, 48, 4000)  # the last 12 are new
    data = tf.data.Dataset.from_tensor_slices(rows(known)).batch(200).repeat(10)
    model.fit(data, epochs=1, verbose=0)
    before = [v.numpy() for v in model.trainable_variables]
    cold = ColdItems(model, "item", rows=10, learning_rate=0.02, scale=1.0, seed=4)
    for seed in range(60):
        features, targets = rows(np.random.default_rng(seed).integers(0, 48, 400), seed)
        cold.step(features, targets)
    for a, v in zip(before, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(a, v.numpy())

    def loss() -> float:
        features, targets = rows(np.repeat(np.arange(48, 60), 50), 99)
        z = model(features)["model"].numpy()
        return float(np.mean(np.logaddexp(0, z) - z * targets["labels"].numpy()))

    plain = loss()
    features, _ = rows(np.arange(48, 60))
    cold.fill(features)
    assert loss() < plain
    moved = [
        np.flatnonzero((a != v.numpy()).reshape(len(a), -1).any(1))
        for a, v in zip(before, model.trainable_variables, strict=True)
    ]
    _, first, _ = model.embed.rows("item")
    assert [len(m) for m in moved if len(m)] == [12]
    np.testing.assert_array_equal(np.concatenate(moved), first + 1 + np.arange(48, 60))


def test_refusals() -> None:
    model = base()
    with pytest.raises(ValueError, match=r'of the side "item"'):
        ColdItems(model, "user")
    with pytest.raises(ValueError, match="`cold_share` should be in"):
        ColdItems(model, "item", cold_share=1.5)
    with pytest.raises(ValueError, match="`rows` should be >= 1"):
        ColdItems(model, "item", rows=0)
    with pytest.raises(ValueError, match="`step_size` should be > 0"):
        ColdItems(model, "item", step_size=-1)
    with pytest.raises(ValueError, match="`scale` should be > 0"):
        MetaEmbedding(3, scale=0.0)
    with pytest.raises(ValueError, match="`dim` should be >= 1"):
        MetaEmbedding(0)
    features, _ = rows(np.array([3, ITEMS + 4]))
    with pytest.raises(ValueError, match="`item` 64 has no row of its own"):
        ColdItems(model, "item").fill(features)
    alone = zoo.build(SCHEMA.with_features(SCHEMA.features[:2]), {"name": "mlp", "units": (4,)})
    with pytest.raises(ValueError, match="nothing tells of a new item"):
        ColdItems(alone, "item")
