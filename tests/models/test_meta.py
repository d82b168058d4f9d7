"""Meta towers of any model: what the objective is, and whom its gradient reaches."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import Support
from qianmo.layers.meta import DIVERGED, NO_SUPPORT, Meta
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.layers.tower import Tower
from qianmo.models import zoo
from qianmo.pipelines.evaluation.task_rows import TaskRows
from qianmo.pipelines.training import runtime

SCHEMA = Schema(
    features=(
        Categorical(name="item", num_ids=40, dim=8),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click", "like"),
    task_id="user",
    timestamp="time",
)
INNER = {"steps": 2, "step_size": 0.3}
MLP = {"name": "mlp", "units": (16,), "seam_dim": 8, "tower_units": (6,)}
DUAL = {
    "name": "dual_dnn",
    "interactions": {"fm": {}},
    "teacher_units": (8,),
    "student_units": (6,),
}


def batches(count=10, size=64):
    rng = np.random.default_rng(5)
    for _ in range(count):
        features = {
            "item": rng.integers(0, 40, size),
            "price": rng.normal(size=size).astype(np.float32),
        }
        user = rng.integers(0, 9, size)
        rate = 0.2 + 0.6 * (user % 2)[:, None]  # tasks differ
        targets = {
            "labels": (rng.random((size, 2)) < rate).astype(np.float32),
            "weight": np.ones(size, np.float32),
            "task_id": user,
            "timestamp": rng.permutation(size),
        }
        yield features, targets


def trained(config, steps=10, meta_optimizer=None, change=None):
    """A model, its first weights, and the history after some steps."""
    runtime.settle()
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, config)
    model.build()
    start = {id(v): v.numpy() for v in model.variables}
    model.compile(tf_keras.optimizers.Adam(0.01), SparseAdam(0.01), meta_optimizer)
    found = [(f, change(t) if change else t) for f, t in batches(steps)]
    data = tf.data.Dataset.from_generator(
        lambda: found,
        output_signature=tf.nest.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), found[0]),
    )
    return model, start, model.fit(data, epochs=1, verbose=0).history


def weights(model, part=None):
    return [v.numpy() for v in (part or model).trainable_variables]


def equal(ours, theirs):
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def roads(model):
    """Everything but what belongs to meta-learning alone."""
    rates = {id(v) for v in model.meta.variables} if model.meta else set()
    return [v.numpy() for v in model.trainable_variables if id(v) not in rates]


@pytest.mark.parametrize("config", [MLP, DUAL], ids=["mlp", "dual_dnn"])
def test_weight_0_trains_the_plain_model_bit_for_bit(config):
    plain, _, _ = trained(config)
    off, _, _ = trained({**config, "meta": {"inner": INNER, "weight": 0.0}})
    on, _, history = trained({**config, "meta": {"inner": INNER}})
    assert equal(roads(plain), roads(off))
    assert not equal(roads(plain), roads(on))
    assert history["meta"][0] > 0


def test_the_objective_is_that_of_the_equation():
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, {**MLP, "meta": {"inner": INNER, "weight": 0.7}})
    model.build()
    features, targets = next(batches(1))
    embedded = model.embed(model.encode({k: tf.constant(v) for k, v in features.items()}))
    h = model.heads(embedded, ("model",))["model"].h
    found = model.meta_loss(h, {k: tf.constant(v) for k, v in targets.items()}, tf.constant(0))
    losses = []
    for user in np.unique(targets["task_id"]):
        rows = np.flatnonzero(targets["task_id"] == user)
        rows = rows[np.argsort(targets["timestamp"][rows])]
        if len(rows) < 2:
            continue
        cut = max(1, len(rows) // 2)
        support, query = rows[:cut], rows[cut:]
        y = targets["labels"]
        correction = model.meta.inner.adapt(
            model.tower,
            Support(
                tf.gather(h, support)[None],
                tf.constant(y[support])[None],
                tf.ones([1, cut, 2]),
            ),
        )
        z = model.tower(tf.gather(h, query)[None], correction=correction).logits[0].numpy()
        losses += (np.logaddexp(0, z) - z * y[query]).sum(1).tolist()
    np.testing.assert_allclose(found, 0.7 * np.mean(losses), rtol=1e-5)


WEIGHTED = dataclasses.replace(SCHEMA, weight="seen", label_weights={"like": "seconds"})


def meta_loss(config, targets, schema=WEIGHTED, rows=None):
    """L_meta of a batch, or of some of its rows."""
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(schema, config)
    model.build()
    features, whole = next(batches(1))
    batch = {**whole, "label_weights": np.ones((64, 2), np.float32), **targets}
    rows = np.arange(64) if rows is None else rows
    embedded = model.embed(model.encode({k: tf.constant(v[rows]) for k, v in features.items()}))
    h = model.heads(embedded, ("model",))["model"].h
    return model.meta_loss(h, {k: tf.constant(v[rows]) for k, v in batch.items()}, tf.constant(0))


def test_query_losses_are_weighted_by_row_and_label_and_support_is_not():
    rng = np.random.default_rng(8)
    weight = rng.uniform(0.2, 3, 64).astype(np.float32)
    label_weights = rng.uniform(0.2, 3, (64, 2)).astype(np.float32)
    label_weights[::4, 1] = 0  # these rows are no support for that label
    meta = {"inner": {**INNER, "shrinkage": 1.0}, "weight": 0.7}
    config = {"name": "mlp", "units": (), "meta": meta}
    found = meta_loss(config, {"weight": weight, "label_weights": label_weights})

    tf_keras.utils.set_random_seed(3)
    model = zoo.build(WEIGHTED, config)
    model.build()
    features, targets = next(batches(1))
    embedded = model.embed(model.encode({k: tf.constant(v) for k, v in features.items()}))
    h = model.heads(embedded, ("model",))["model"].h.numpy()
    kernel, bias = (v.numpy() for v in model.tower.trainable_variables)
    y, total, rows_weight = targets["labels"], 0.0, 0.0
    for user in np.unique(targets["task_id"]):
        rows = np.flatnonzero(targets["task_id"] == user)
        rows = rows[np.argsort(targets["timestamp"][rows])]
        if len(rows) < 2:
            continue
        support, query = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        w, b = kernel.copy(), bias.copy()
        has = (label_weights[support] > 0).astype(float)
        for _ in range(2):
            p = 1 / (1 + np.exp(-(h[support] @ w + b)))
            d = has * (p - y[support]) / (has.sum(0) + 1.0)
            w, b = w - 0.3 * h[support].T @ d, b - 0.3 * d.sum(0)
        z = h[query] @ w + b
        losses = (label_weights[query] * (np.logaddexp(0, z) - z * y[query])).sum(1)
        total += (weight[query] * losses).sum()
        rows_weight += weight[query].sum()
    np.testing.assert_allclose(found, 0.7 * total / rows_weight, rtol=1e-4)


@pytest.mark.parametrize("reptile", [False, True])
def test_rows_and_labels_of_weight_0_take_no_part(reptile):
    inner = {**INNER, "first_order": reptile}
    config = {**MLP, "meta": {"inner": inner, "reptile": reptile}}
    off = np.arange(64) % 2 == 0
    weight = np.where(off, 0, 1).astype(np.float32)
    without = meta_loss(config, {"weight": weight})
    labels = next(batches(1))[1]["labels"]
    changed = meta_loss(config, {"weight": weight, "labels": np.where(off[:, None], 0, labels)})
    assert float(without) == float(changed)
    np.testing.assert_allclose(without, meta_loss(config, {}, rows=np.flatnonzero(~off)), rtol=1e-5)
    assert abs(float(without) - float(meta_loss(config, {}))) > 1e-3

    label_weights = np.ones((64, 2), np.float32)
    label_weights[off, 1] = 0
    missing = labels.copy()
    missing[off, 1] = np.nan
    ones = np.ones((64, 2), np.float32)
    of_weight_0 = meta_loss(config, {"label_weights": label_weights})
    np.testing.assert_allclose(
        of_weight_0, meta_loss(config, {"labels": missing, "label_weights": ones}), rtol=1e-6
    )


def test_domain_weights_are_row_weights():
    scene = Categorical(name="scene", num_ids=2, dim=8)
    schema = dataclasses.replace(
        SCHEMA,
        features=(*SCHEMA.features, scene),
        domain="scene",
        domain_weights=((0, 0.0),),
    )
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(schema, {**MLP, "meta": {"inner": INNER}})
    model.build()
    features, targets = next(batches(1))
    scenes = np.arange(64) % 2
    rows = {k: tf.constant(v) for k, v in {**features, "scene": scenes}.items()}
    h = model.one_head(rows, "model")[0].h
    targets["weight"] = scenes.astype(np.float32)  # as the reader makes of `domain_weights`
    own = np.flatnonzero(scenes == 1)
    found, alone = (
        model.meta_loss(
            tf.gather(h, index),
            {k: tf.constant(v[index]) for k, v in targets.items()},
            tf.constant(0),
        )
        for index in (np.arange(64), own)
    )
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_the_adapted_tower_runs_without_dropout():
    tower = Tower(1, (16,), dropout=0.5, seed=1)
    meta = Meta({"steps": 1, "step_size": 0.1}, split="time", seed=1)
    random = np.random.default_rng(1)
    h = random.normal(size=(12, 4)).astype(np.float32)
    labels, ones = (h[:, :1] > 0).astype(np.float32), np.ones((12, 1), np.float32)
    order = np.arange(12)
    twice = [meta.loss(tower, h, labels, ones[:, 0], ones, order % 3, order, 0) for _ in range(2)]
    plain = Tower(1, (16,), seed=1)
    without = meta.loss(plain, h, labels, ones[:, 0], ones, order % 3, order, 0)
    assert float(twice[0]) == float(twice[1]) == float(without)


def test_each_label_s_tower_has_support_of_its_own():
    tf_keras.utils.set_random_seed(3)
    config = {"name": "mmoe", "num_experts": 2, "expert_units": (8,), "tower_units": (6,)}
    model = zoo.build(SCHEMA, {**config, "meta": {"inner": INNER}})
    model.build()
    features, targets = next(batches(1))
    plain, _ = model.one_head({k: tf.constant(v) for k, v in features.items()}, "model")
    users, h = np.arange(2), plain.h.numpy()

    def score(labels):
        """Of 2 users with 10 support rows each; NaN is a label that a row does not have."""
        held = TaskRows(users, h[:20].reshape(2, 10, -1), labels, np.array([10, 10]))
        place, support = held.of(np.repeat(users, len(h) // 2))
        return [x.numpy() for x in model.meta.score(model.tower, plain, place, support)]

    both = targets["labels"][:20].reshape(2, 10, 2)
    few = both.copy()
    few[0, :, 1], few[1, ::2, 1] = np.nan, np.nan
    full, _ = score(both)
    found, status = score(few)
    first = np.arange(len(h)) < len(h) // 2
    assert (status == 0).all()
    # The other label's support is none of a tower's business.
    np.testing.assert_allclose(found[:, 0], full[:, 0], atol=1e-6)
    np.testing.assert_array_equal(found[first, 1], plain.logits.numpy()[first, 1])
    # A tower adapts on the rows that have its label as if there were no others.
    held = TaskRows(users[1:], h[10:20][1::2][None], both[1:, 1::2], np.array([5]))
    place, support = held.of(np.repeat(users[1:], len(h)))
    alone, _ = model.meta.score(model.tower, plain, place, support)
    np.testing.assert_allclose(found[~first, 1], alone.numpy()[~first, 1], atol=1e-6)
    assert np.abs(found[~first] - plain.logits.numpy()[~first]).max(0).min() > 1e-3

    # Five rows are too few for that label, and enough for none of the other's ten.
    model.meta.min_support = 6
    gated, status = score(few)
    assert (status == 0).all()
    np.testing.assert_array_equal(gated[:, 0], found[:, 0])
    np.testing.assert_array_equal(gated[:, 1], plain.logits.numpy()[:, 1])
    model.meta.min_support = 11
    gated, status = score(few)
    assert (status == NO_SUPPORT).all()
    np.testing.assert_array_equal(gated, plain.logits)


# What each needs beside a name; two_tower, which has no scores of labels, has tests of its own.
ZOO = {
    **{name: {} for name in ("lr", "mlp", "wdl", "deepfm", "dcn", "xdeepfm", "star")},
    **{name: {"tower_units": (4,)} for name in ("cross_domain", "shared_bottom", "mmoe", "ple")},
    **{name: {"gate_features": ("scene",)} for name in ("ppnet", "poso", "epnet")},
    "dual_dnn": {"interactions": {"fm": {}}, "student_units": (4,)},
    "teacher_alone": {"interactions": {"fm": {}}},
    "distilled": {"teacher": {"name": "mlp"}, "student": {"name": "mlp", "tower_units": (4,)}},
}


@pytest.mark.parametrize("name", sorted(zoo.MODELS.keys() - {"two_tower"}))
def test_any_model_s_tower_learns_to_adapt_and_does(name):
    scene = Categorical(name="scene", num_ids=2, dim=8)
    schema = dataclasses.replace(SCHEMA, features=(*SCHEMA.features, scene), domain="scene")
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(schema, {"name": name, **ZOO[name], "meta": {"inner": INNER}})
    model.build()
    features, targets = next(batches(1))
    rows = {k: tf.constant(v) for k, v in {**features, "scene": targets["task_id"] % 2}.items()}
    head = model.serving_head
    tower = model.tower_of(head)
    with tf.GradientTape() as tape:
        plain, _ = model.one_head(rows, head)
        loss = model.meta_loss(
            plain.h, {k: tf.constant(v) for k, v in targets.items()}, tf.constant(0)
        )
    moved = [g for g in tape.gradient(loss, tower.trainable_variables) if g is not None]
    assert any(np.abs(tf.convert_to_tensor(g)).max() > 0 for g in moved)
    users = np.unique(targets["task_id"])
    order = np.argsort(targets["task_id"], kind="stable")
    own = [order[targets["task_id"][order] == user][:3] for user in users]
    held = TaskRows(
        users,
        np.stack([plain.h.numpy()[rows] for rows in own]),
        np.stack([targets["labels"][rows] for rows in own]),
        np.full(len(users), 3),
    )
    place, support = held.of(targets["task_id"])
    found, status = model.meta.score(tower, plain, place, support)
    assert (status.numpy() == 0).all()
    assert (found != plain.logits).numpy().all()
    before, *_, after = model.meta.inner.adapt(tower, support).losses
    assert (after < before).numpy().all()


@pytest.mark.parametrize("step_size", [10.0, 100.0])
def test_a_task_that_steps_too_far_gets_the_plain_score(step_size):
    tf_keras.utils.set_random_seed(3)
    tower = Tower(1, (8,), seed=1)
    h = np.random.default_rng(2).normal(size=(3, 10, 4)).astype(np.float32)
    h[[0, 2]] = 0  # as many of either label: the gradient is zero, however long the step
    labels = np.tile([[1.0], [0.0]], (3, 5, 1)).astype(np.float32)
    support = Support(*(tf.constant(x) for x in (h, labels, np.ones_like(labels))))
    plain = tower(tf.constant(h[:, 0]))
    meta = Meta({"steps": 3, "step_size": step_size}, seed=1)
    adapted = tower(h[:, :1], correction=meta.inner.adapt(tower, support)).logits[:, 0]
    assert np.isfinite(adapted).all()
    found, status = meta.score(tower, plain, tf.range(3), support)
    assert status.numpy().tolist() == [0, DIVERGED, 0]
    np.testing.assert_array_equal(found[1], plain.logits[1])
    np.testing.assert_allclose(found[::2], adapted[::2], atol=1e-6)


def original_off(targets):
    """So that only the meta loss moves anything."""
    return {**targets, "original": np.zeros(len(targets["weight"]), np.float32)}


@pytest.mark.parametrize(
    ("gradient_to", "parts"),
    [
        ("tower", {"tower"}),
        ("bottom", {"tower", "bottom"}),
        ("embeddings", {"tower", "bottom", "embed"}),
    ],
)
def test_how_far_the_gradient_flows(gradient_to, parts):
    config = {**MLP, "meta": {"inner": INNER, "gradient_to": gradient_to}}
    model, start, _ = trained(config, change=original_off)
    moved = {
        part
        for part in ("embed", "bottom", "tower")
        for v in getattr(model, part).variables
        if not np.array_equal(v.numpy(), start[id(v)])
    }
    assert moved == parts


@pytest.mark.parametrize("reptile", [False, True])
def test_first_order_keeps_the_shrinkage_as_it_is(reptile):
    inner = {**INNER, "shrinkage": 2.0, "first_order": True}
    config = {**MLP, "meta": {"inner": inner, "reptile": reptile}}
    model, start, _ = trained(config)
    assert [v.numpy() for v in model.meta.variables] == pytest.approx([np.log(np.expm1(2.0))])
    assert not model.meta.trainable_variables
    assert not equal(weights(model, model.tower), [start[id(v)] for v in model.tower.variables])


def test_episodes_take_only_the_rows_marked():
    half = np.arange(64) < 32
    config = {**MLP, "meta": {"inner": INNER}}

    def marked(targets):
        return {**original_off(targets), "episode": half.astype(np.float32)}

    def changed(targets):
        labels = np.where(half[:, None], targets["labels"], 1 - targets["labels"])
        return {**marked(targets), "labels": labels}

    def changed_inside(targets):
        return {**marked(targets), "labels": 1 - targets["labels"]}

    first, _, _ = trained(config, change=marked)
    second, _, _ = trained(config, change=changed)
    third, _, _ = trained(config, change=changed_inside)
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(third))


def test_step_sizes_learn_by_their_own_optimiser():
    config = {**MLP, "meta": {"inner": {**INNER, "rates": "rank_one", "shrinkage": 3.0}}}
    still, start, _ = trained(config, meta_optimizer=tf_keras.optimizers.SGD(0.0))
    assert all(np.array_equal(v.numpy(), start[id(v)]) for v in still.meta.variables)
    learned, start, _ = trained(config, meta_optimizer=tf_keras.optimizers.Adam(0.02))
    assert not any(np.array_equal(v.numpy(), start[id(v)]) for v in learned.meta.variables)
    assert float(learned.meta.inner.c) > 0


def test_the_teacher_of_a_meta_student_moves_as_if_alone():
    plain, _, _ = trained(DUAL)
    meta, _, _ = trained({**DUAL, "meta": {"inner": INNER}})
    for part in ("embed", "teacher_bottom", "teacher_tower"):
        assert equal(weights(plain, getattr(plain, part)), weights(meta, getattr(meta, part)))
    assert not equal(weights(plain, plain.student_tower), weights(meta, meta.student_tower))


def test_reptile_moves_towards_the_mean_of_the_adapted_towers():
    inner = {"steps": 3, "step_size": 0.3, "first_order": True}
    config = {**MLP, "meta": {"inner": inner, "reptile": True, "gradient_to": "tower"}}
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, config)
    model.build()
    features, targets = next(batches(1))
    embedded = model.embed(model.encode({k: tf.constant(v) for k, v in features.items()}))
    h = model.heads(embedded, ("model",))["model"].h
    phi = model.tower.trainable_variables
    with tf.GradientTape() as tape:
        loss = model.meta_loss(h, {k: tf.constant(v) for k, v in targets.items()}, tf.constant(0))
    gradients = tape.gradient(loss, phi)
    users = np.unique(targets["task_id"])
    before = [v.numpy() for v in phi]
    total = [np.zeros_like(v) for v in before]
    for user in users:
        rows = np.flatnonzero(targets["task_id"] == user)
        for v, value in zip(phi, before, strict=True):
            v.assign(value)
        for _ in range(3):
            with tf.GradientTape() as tape:
                z = model.tower(tf.gather(h, rows)).logits
                bce = tf.nn.sigmoid_cross_entropy_with_logits(targets["labels"][rows], z)
                inner_loss = tf.reduce_sum(bce) / len(rows)
            for v, g in zip(phi, tape.gradient(inner_loss, phi), strict=True):
                v.assign_sub(0.3 * g)
        for part, v, value in zip(total, phi, before, strict=True):
            part += (value - v.numpy()) / len(users)
    for g, expected in zip(gradients, total, strict=True):
        np.testing.assert_allclose(g, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("schema", "meta", "message"),
    [
        ({"task_id": ""}, {}, "`meta` needs `schema.task_id`"),
        ({"timestamp": ""}, {}, "`meta` needs `schema.timestamp`"),
        ({}, {"weight": -1.0}, "`weight` should be >= 0"),
        ({}, {"gradient_to": "user"}, "`gradient_to` should be one of"),
        ({}, {"reptile": True}, "`reptile` needs"),
        ({}, {"min_support": 0}, "`min_support`"),
        ({}, {"serving_steps": 0}, "`serving_steps`"),
        ({}, {"max_query": 0}, "`max_query` should be >= 1"),
        ({}, {"support_share": 1.0}, r"`support_share` should be in \(0, 1\)"),
        ({}, {"support_sizes": (2, 0)}, r"`support_sizes` should be >= 1. Received: \(2, 0\)"),
        ({}, {"speed": 2}, "speed"),
        ({}, {"inner": {"stops": 2}}, "stops"),
    ],
)
def test_refusals(schema, meta, message):
    changed = Schema.from_config({**SCHEMA.to_config(), **schema})
    with pytest.raises(ValueError, match=message):
        zoo.build(changed, {**MLP, "meta": {"inner": INNER, **meta}})
