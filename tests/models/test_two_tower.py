"""Two-tower retrieval: its losses against NumPy, its queue, and towers that adapt to a user."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import InnerLoop, Support
from qianmo.layers.item_queue import ItemQueue
from qianmo.layers.product_tower import ProductTower
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.layers.tower import Tower
from qianmo.models import zoo
from qianmo.models.two_tower import TwoTower

ITEMS, DIM, TAU = 30, 4, 0.2
SEEN = Categorical(name="seen", num_ids=ITEMS, dim=6, max_length=5, side="user", table="item")
SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=12, dim=6, side="user"),
        Categorical(name="item", num_ids=ITEMS, dim=6, side="item"),
        Dense(name="hour", mean=0.0, variance=1.0),
        Categorical(name="genre", num_ids=5, dim=6, side="item"),
    ),
    labels=("watched",),
    task_id="user",
    timestamp="time",
)
LISTED = Schema(
    features=(SEEN, SCHEMA.features[1]), labels=("watched",), task_id="user", timestamp="time"
)
# The domain is the item's, so that each item belongs to one.
OF_DOMAINS = Schema(
    features=(*SCHEMA.features, Categorical(name="scene", num_ids=2, dim=6, side="item")),
    labels=("watched",),
    task_id="user",
    domain="scene",
)
SCORED = SCHEMA.with_features(
    Categorical(name="score", num_ids=ITEMS, dim=6, side="item") if f.name == "item" else f
    for f in SCHEMA.features
)
META = {"inner": {"steps": 2, "step_size": 0.3}}
CONFIG = {
    "name": "two_tower",
    "item_id": "item",
    "dim": DIM,
    "units": (8,),
    "seam_dim": 5,
    "item_units": (7,),
    "temperature": TAU,
    "queue_size": 16,
    "embedding_stddev": 0.5,
}


def rows(count: int = 24, seed: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(seed)
    features = {
        "user": rng.integers(0, 12, count),
        "item": rng.integers(0, ITEMS, count),
        "hour": rng.normal(size=count).astype(np.float32),
        "genre": rng.integers(0, 5, count),
        "seen": rng.integers(0, ITEMS, (count, 5)),
        "seen_length": rng.integers(0, 6, count),
    }
    targets = {
        "labels": np.ones((count, 1), np.float32),
        "weight": rng.uniform(0.5, 2.0, count).astype(np.float32),
        "task_id": features["user"],
        "timestamp": rng.permutation(count),
    }
    return tf.nest.map_structure(tf.constant, (features, targets))


def built(schema: Schema = SCHEMA, **changes: Any) -> TwoTower:
    tf_keras.utils.set_random_seed(2)
    model = zoo.build(schema, {**CONFIG, **changes})
    assert isinstance(model, TwoTower)
    model.build()
    model.compile(tf_keras.optimizers.Adam(0.01), SparseAdam(0.01), tf_keras.optimizers.Adam(0.01))
    return model


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def logsumexp(x: Any, axis: int = -1) -> Any:
    return np.log(np.exp(x).sum(axis))


def test_the_queue_holds_the_newest_and_counts_all() -> None:
    queue = ItemQueue(4, 2, 10)
    q = np.array([[0.3, -1.0]], np.float32)
    np.testing.assert_allclose(queue(q), np.zeros((1, 4)), atol=1e-6)
    pushed = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32)
    ids = np.array([5, 1, 5, 2, 5, 3, 2])
    queue.push(tf.constant(ids[:3]), tf.constant(pushed[:3]))
    queue.push(tf.constant(ids[3:]), tf.constant(pushed[3:]))
    p = (np.bincount(ids, minlength=10) + 1) / (7 + 10)
    np.testing.assert_allclose(queue.log_correction(tf.range(10)), -np.log(p), rtol=1e-6)
    weights = (1 / p[ids[3:]]) / np.mean(1 / p[ids[3:]])
    expected = q @ pushed[3:].T + np.log(weights)
    np.testing.assert_allclose(queue(q), expected, rtol=1e-5)


def test_what_is_not_filled_is_no_candidate() -> None:
    queue = ItemQueue(6, 2, 10)
    q = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    pushed = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    ids, domains = np.array([5, 1, 5, 2, 5, 3, 2, 0, 0]), np.array([1, 2, 1, 2, 1, 1, 1, 1, 1])
    asked = tf.constant([1, 2, 0], tf.int64)
    queue(q)
    for count in range(1, 10):
        new = slice(count - 1, count)
        queue.push(*(tf.constant(column[new]) for column in (ids, pushed, domains)))
        held = slice(max(0, count - 6), count)
        p = np.bincount(ids[:count], minlength=10)[ids[held]] + 1

        def expected(row: int, own: Any, p: Any = p, held: Any = held) -> Any:
            """log sum_j exp s_j over the items that are there."""
            scores = q[row] @ pushed[held][own].T
            return logsumexp(scores + np.log(6 / p[own] / (1 / p[own]).sum()))

        every = np.full(len(p), True)
        found = tf.reduce_logsumexp(queue(q), -1)
        np.testing.assert_allclose(found, [expected(i, every) for i in range(3)], rtol=1e-5)
        found = tf.reduce_logsumexp(queue(q, asked), -1)
        own = [domains[held] == 1, domains[held] == 2, every]
        expecteds = [expected(i, o if o.any() else every) for i, o in enumerate(own)]
        np.testing.assert_allclose(found, expecteds, rtol=1e-5)


def test_the_logit_and_what_its_cross_entropy_is() -> None:
    tower = ProductTower(Tower(DIM, (6,), seed=1), ItemQueue(8, DIM, 10), TAU)
    rng = np.random.default_rng(4)
    h = np.concatenate([rng.normal(size=(3, 5)), unit(rng.normal(size=(3, DIM)))], 1).astype("f4")
    tower(h)
    stored = unit(rng.normal(size=(8, DIM))).astype(np.float32)
    ids = np.array([1, 1, 2, 3, 4, 1, 5, 9])
    tower.queue.push(tf.constant(ids), tf.constant(stored))
    output = tower(h)
    (w1, b1), (w2, b2) = (
        (layer.kernel.numpy(), layer.bias.numpy())
        for layer in (*tower.tower.mlp._layers, tower.tower.head)
    )
    u = unit(np.maximum(h[:, :5] @ w1 + b1, 0) @ w2 + b2)
    inverse = 1 / ((np.bincount(ids, minlength=10) + 1)[ids])
    positive = (u * h[:, 5:]).sum(1) / TAU
    negatives = u @ stored.T / TAU + np.log(inverse / inverse.mean())
    z = output.logits.numpy()[:, 0]
    np.testing.assert_allclose(z, positive - logsumexp(negatives), rtol=1e-4)
    np.testing.assert_allclose(output.hidden[-1], u, rtol=1e-4, atol=1e-6)
    softmax = -(positive - logsumexp(np.concatenate([positive[:, None], negatives], 1)))
    np.testing.assert_allclose(np.logaddexp(0, -z), softmax, rtol=1e-4)


def test_negatives_are_of_the_row_s_own_domain() -> None:
    model = built(OF_DOMAINS, num_shared=1)
    features, targets = rows()
    features["scene"] = features["item"] % 3  # 2 is unknown, and meets the items of all
    scene = features["scene"].numpy()
    weight = targets["weight"].numpy()

    def output() -> Any:
        encoded = model.encode({k: features[k] for k in OF_DOMAINS.input_names})
        return model.heads(model.embed(encoded), ("model",))["model"], encoded

    first, encoded = output()
    u, v, item = first.hidden[-1].numpy(), first.h[:, -DIM:].numpy(), features["item"].numpy()
    scores = u @ v.T / TAU
    other = (scene[:, None] != scene[None]) & (scene[:, None] < 2)
    scores[((item[:, None] == item[None]) & ~np.eye(24, dtype=bool)) | other] = -np.inf
    losses = logsumexp(scores) - np.diag(scores)
    found = model.mean_terms({"model": first}, model.targets_of(encoded, targets))
    np.testing.assert_allclose(found["softmax"], np.average(losses, weights=weight), rtol=1e-4)

    # The last 16 rows are in the queue: z is against those of the row's domain.
    z = output()[0].logits.numpy()[:, 0]
    inverse = 1 / (np.bincount(item, minlength=ITEMS) + 1)[item[8:]]
    for i in range(24):
        own = (scene[8:] == scene[i]) | (scene[i] == 2)
        weights = 16 * inverse[own] / inverse[own].sum()
        against = np.log((weights * np.exp(u[i] @ v[8:][own].T / TAU)).sum())
        assert z[i] == pytest.approx(u[i] @ v[i] / TAU - against, rel=1e-4, abs=1e-4)


def test_a_row_moves_no_expert_of_another_domain() -> None:
    model = built(OF_DOMAINS, num_shared=1)
    features, targets = rows()
    features["scene"] = tf.zeros_like(features["item"])
    own = [
        weight
        for side in (model.user_bottom.bottom, model.item_bottom)
        for weight in side.own.trainable_variables
    ]
    shared = model.item_bottom.shared[0].trainable_variables
    before = [v.numpy() for v in (*own, *shared)]
    model.fit(tf.data.Dataset.from_tensors((features, targets)), verbose=0)
    after = [v.numpy() for v in (*own, *shared)]
    for a, b in zip(before[: len(own)], after, strict=False):
        np.testing.assert_array_equal(a[1], b[1])
        assert not np.array_equal(a[0], b[0])
    assert not np.array_equal(before[-2], after[-2])


@pytest.mark.parametrize("form", ["dual", "materialised"])
def test_a_step_is_gradient_descent_on_the_sampled_softmax(form: str) -> None:
    tower = ProductTower(Tower(DIM, (6,), seed=1), ItemQueue(8, DIM, 10), TAU)
    rng = np.random.default_rng(4)
    support = np.concatenate([rng.normal(size=(1, 3, 5)), unit(rng.normal(size=(1, 3, DIM)))], 2)
    support = support.astype(np.float32)
    tower(support)
    tower.queue.push(
        tf.range(8, dtype=tf.int64), tf.constant(unit(rng.normal(size=(8, DIM))), tf.float32)
    )
    query = rng.normal(size=(1, 2, 5 + DIM)).astype(np.float32)
    ones = tf.ones([1, 3, 1])
    inner = InnerLoop(steps=1, step_size=0.5, form=form)
    adaptation = inner.adapt(tower, Support(tf.constant(support), ones, ones))
    adapted = tower(query, correction=adaptation).hidden[-1]
    with tf.GradientTape() as tape:
        z = tower(support).logits
        loss = tf.reduce_mean(tf.nn.softplus(-z))
    for variable, gradient in zip(
        tower.trainable_variables, tape.gradient(loss, tower.trainable_variables), strict=True
    ):
        variable.assign_sub(0.5 * gradient)
    np.testing.assert_allclose(adapted, tower(query).hidden[-1], rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_in_batch_softmax_with_its_correction() -> None:
    model = built()
    features, targets = rows()
    targets["labels"] = tf.constant((np.arange(24) % 4 > 0).astype(np.float32)[:, None])
    model.tower.queue.push(features["item"] + 1, tf.zeros([24, DIM]))  # so that p is not even
    encoded = model.encode({k: features[k] for k in SCHEMA.input_names})
    output = model.heads(model.embed(encoded), ("model",))["model"]
    u, v = output.hidden[-1].numpy(), output.h[:, -DIM:].numpy()
    item = features["item"].numpy()
    counts = np.bincount(item, minlength=ITEMS)
    p = (counts[item] + 1) / (24 + ITEMS + 1)
    scores = u @ v.T / TAU - np.log(p)
    scores[(item[:, None] == item[None]) & ~np.eye(24, dtype=bool)] = -np.inf
    losses = logsumexp(scores) - np.diag(scores)
    weight = targets["weight"].numpy() * targets["labels"].numpy()[:, 0]
    found = model.mean_terms({"model": output}, model.targets_of(encoded, targets))
    np.testing.assert_allclose(found["softmax"], np.average(losses, weights=weight), rtol=1e-4)
    # The batch is in the queue now.
    np.testing.assert_allclose(model.tower.queue._vectors, v[-16:], rtol=1e-6)


def test_rare_items_of_a_large_catalogue_keep_their_correction() -> None:
    """Two million pushes, of which the popular items have nearly all."""
    items = 1_500_000
    schema = SCHEMA.with_features(
        Categorical(name="item", num_ids=items, dim=2, side="item") if f.name == "item" else f
        for f in SCHEMA.features
    )
    model = built(schema, item_id="item")
    features, targets = rows()
    rare = np.arange(24) % 2 == 0
    item = np.where(rare, items - 1 - np.arange(24), np.arange(24))
    features["item"] = tf.constant(item)
    pushes = np.repeat(item[~rare] + 1, [1_999_989, *[1] * 11])
    for first in range(0, len(pushes), 500_000):
        part = tf.constant(pushes[first : first + 500_000])
        model.tower.queue.push(part, tf.zeros([len(part), DIM]))
    counts = np.bincount(pushes, minlength=items + 1)
    p = (counts[item + 1] + 1) / (2_000_000 + items + 1)
    assert p.min() < 3e-7

    encoded = model.encode({k: features[k] for k in SCHEMA.input_names})
    output = model.heads(model.embed(encoded), ("model",))["model"]
    u, v = output.hidden[-1].numpy(), output.h[:, -DIM:].numpy()
    scores = u @ v.T / TAU - np.log(p)
    losses = logsumexp(scores) - np.diag(scores)
    found = model.mean_terms({"model": output}, model.targets_of(encoded, targets))
    expected = np.average(losses, weights=targets["weight"].numpy())
    np.testing.assert_allclose(found["softmax"], expected, rtol=1e-4)


def trained(model: TwoTower, steps: int = 60, **changes: Any) -> list[float]:
    """Losses of training on one batch in which each user watches items of one genre."""
    features, targets = rows(200)
    features["genre"] = features["item"] % 5
    features["user"] = tf.cast(features["item"] % 5, tf.int64) + 5 * (features["user"] % 2)
    targets["task_id"] = features["user"]
    data = tf.data.Dataset.from_tensors((features, {**targets, **changes})).repeat(steps)
    history = model.fit(data, epochs=1, steps_per_epoch=steps, verbose=0)
    assert int(model.first_bad_step) == -1
    losses: list[float] = history.history["loss"]
    return losses


@pytest.mark.parametrize(
    ("schema", "changes"),
    [(SCHEMA, {}), (LISTED, {"support_feature": "seen"})],
    ids=["tasks", "lists"],
)
def test_meta_off_is_the_plain_model_and_on_it_moves(schema: Schema, changes: Any) -> None:
    def weights(weight: float) -> list[Any]:
        model = built(schema, **changes, meta={**META, "weight": weight})
        trained(model, 3)
        rates = {id(v) for v in model.meta.variables} if model.meta else set()
        return [v.numpy() for v in model.variables if id(v) not in rates]

    plain = built(schema)
    trained(plain, 3)
    off, on = weights(0.0), weights(1.0)
    expected = [v.numpy() for v in plain.variables]
    assert all(np.array_equal(a, b) for a, b in zip(expected, off, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(off, on, strict=True))


def test_it_learns_to_find_what_users_watch() -> None:
    model = built(meta=META)
    trained(model, 100)
    user = np.arange(10)
    features, _ = rows(ITEMS)
    features = {**features, "item": tf.range(ITEMS, dtype=tf.int64)}
    features["genre"] = features["item"] % 5
    v = model.item_vectors({k: features[k] for k in ("item", "genre")})[0].numpy()
    asked = {"user": tf.constant(user), "hour": features["hour"][:10]}
    u = model.user_vectors(asked)[0].numpy()
    best = np.argmax(u @ v.T, 1)
    assert np.mean(best % 5 == user % 5) >= 0.9


def test_a_list_is_the_support_of_its_row() -> None:
    model = built(LISTED, support_feature="seen", meta=META)
    features, targets = rows()
    encoded = model.encode({k: features[k] for k in LISTED.input_names})
    output = model.heads(model.embed(encoded), ("model",))["model"]
    added = model.targets_of(encoded, targets)
    support = model._support(
        output.h[:, :-DIM], *model._listed(added["support"], added["support_length"])
    )
    length = features["seen_length"].numpy()
    assert support.h.shape == (24, 5, 5 + DIM)
    np.testing.assert_array_equal(support.weights.numpy()[:, :, 0].sum(1), length)
    # An item in the list has the vector that it has as a row's item.
    v = model.item_vectors({"item": features["seen"][:, 0]})[0].numpy()
    np.testing.assert_allclose(support.h.numpy()[length > 0, 0, 5:], v[length > 0], rtol=1e-5)
    np.testing.assert_array_equal(support.h.numpy()[:, 0, :5], output.h.numpy()[:, :5])

    correction = model.meta.inner.adapt(model.tower, support)  # type: ignore[union-attr]
    z = model.tower(output.h[:, None], correction=correction).logits.numpy()
    loss = model.meta_loss(output.h, added, tf.constant(0))
    expected = np.average(np.logaddexp(0, -z)[:, 0, 0], weights=targets["weight"])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("schema", "changes"),
    [(SCHEMA, {}), (LISTED, {"support_feature": "seen"})],
    ids=["tasks", "lists"],
)
def test_the_meta_loss_moves_no_item(schema: Schema, changes: Any) -> None:
    model = built(schema, **changes, meta=META)
    features, targets = rows()
    with tf.GradientTape(persistent=True) as tape:
        encoded = model.encode({k: features[k] for k in schema.input_names})
        output = model.heads(model.embed(encoded), ("model",))["model"]
        loss = model.meta_loss(output.h, model.targets_of(encoded, targets), tf.constant(0))
    items = [*model.item_bottom.trainable_variables, *model.item_tower.trainable_variables]
    gradients = [tape.gradient(loss, weight) for weight in items]
    assert len(items) == 4
    assert all(found is None or not np.any(found) for found in gradients)
    kernel = tape.gradient(loss, model.user_bottom.trainable_variables[0])
    assert np.abs(kernel).max() > 0


@pytest.mark.parametrize(
    ("schema", "changes", "message"),
    [
        (SCHEMA, {"item_id": "user"}, 'of the side "item"'),
        (SCORED, {"item_id": "score"}, "the answer holds scores by the name `score`"),
        (SCHEMA, {"support_feature": "item", "meta": META}, "a user's list in the table"),
        (LISTED, {"support_feature": "seen"}, "needs `meta`"),
        (SCHEMA, {"temperature": 0.0}, "`temperature` should be > 0"),
        (SCHEMA, {"queue_size": 0}, "`size` should be >= 1"),
    ],
)
def test_refusals(schema: Schema, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(schema, **changes)
