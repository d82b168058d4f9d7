"""The dual DNN: who moves whom, and that its relatives are configs of it."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.losses import distillation
from qianmo.layers.schema import Schema
from qianmo.layers.sparse_adam import SparseAdam
from qianmo.models import zoo
from qianmo.pipelines.training import runtime

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=50, dim=8),
        Categorical(name="item", num_ids=40, dim=8),
        Categorical(name="seen", num_ids=40, dim=8, table="item", max_length=3),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click", "like"),
)
TEACHER = {"interactions": {"cin": {"units": (6, 6)}, "cross": {"num_layers": 1}}}
UNITS = {"teacher_units": (16, 8), "student_units": (8,)}


def batches(count=12, size=64):
    rng = np.random.default_rng(5)
    for _ in range(count):
        features = {
            "user": rng.integers(0, 50, size),
            "item": rng.integers(0, 40, size),
            "seen": rng.integers(0, 40, (size, 3)),
            "seen_length": rng.integers(0, 4, size),
            "price": rng.normal(size=size).astype(np.float32),
        }
        labels = (rng.random((size, 2)) < 0.4).astype(np.float32)
        yield features, {"labels": labels, "weight": np.ones(size, np.float32)}


def trained(steps=12, adam=None, tables=None, **config):
    """A model after some steps of Keras fit, as the trainer does them.

    `adam` has arguments of the dense weights' optimiser, `tables` the tables' optimiser.
    """
    runtime.settle()
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, config)
    features, _ = next(batches(1))
    model({k: tf.constant(v) for k, v in features.items()})
    start = [(v, v.numpy()) for v in model.variables]
    adam = {"learning_rate": 0.01, **(adam or {})}
    model.compile(tf_keras.optimizers.Adam(**adam), tables or SparseAdam(0.01))
    data = tf.data.Dataset.from_generator(
        lambda: batches(steps),
        output_signature=tf.nest.map_structure(
            lambda x: tf.TensorSpec(x.shape, x.dtype), next(batches(1))
        ),
    )
    history = model.fit(data, epochs=1, verbose=0).history
    return model, start, history


def dual(*how, **changes):
    return trained(*how, name="dual_dnn", **{**TEACHER, **UNITS, **changes})


def teacher_weights(model):
    parts = (
        (model.embed, model.teacher_bottom, model.teacher_tower)
        if hasattr(model, "teacher_tower")
        else (model.embed, model.bottom, model.tower)
    )
    return [v.numpy() for part in parts for v in part.variables]


def moved(start):
    return {v.ref() for v, before in start if not np.array_equal(v.numpy(), before)}


def test_the_teacher_moves_as_if_alone_bit_for_bit():
    alone, _, _ = trained(
        name="teacher_alone", **TEACHER, teacher_units=(16, 8), dropout=0.2, embedding_l2=0.01
    )
    both, start, _ = dual(kd_weight=3.0, hint_weight=0.5, dropout=0.2, embedding_l2=0.01)
    first, second = teacher_weights(alone), teacher_weights(both)
    assert len(first) == len(second) > 6
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    student = {v.ref() for v in both.student_tower.trainable_variables}
    assert student < moved(start)  # the student learns too


@pytest.mark.parametrize(
    "adam",
    [
        {"global_clipnorm": 0.05},
        {"clipnorm": 0.02},
        {"clipvalue": 0.001},
        {"weight_decay": 0.5},
        {"learning_rate": tf_keras.optimizers.schedules.CosineDecay(0.01, 4)},
    ],
    ids=lambda adam: next(iter(adam)),
)
def test_the_teacher_moves_as_if_alone_under_any_optimiser(adam):
    def tables():
        return tf_keras.optimizers.Adam(0.01, global_clipnorm=0.01)

    both, _, _ = dual(4, adam, tables(), kd_weight=3.0, hint_weight=0.5)
    of_teacher = {"name": "teacher_alone", **TEACHER, "teacher_units": (16, 8)}
    alone, _, _ = trained(4, adam, tables(), **of_teacher)
    plain, _, _ = trained(4, None, tables(), **of_teacher)
    for a, b in zip(teacher_weights(alone), teacher_weights(both), strict=True):
        np.testing.assert_array_equal(a, b)
    differs = zip(teacher_weights(alone), teacher_weights(plain), strict=True)
    assert any(not np.array_equal(a, b) for a, b in differs)  # the argument does something


def test_teacher_and_student_are_clipped_by_a_norm_each():
    model, _, _ = dual(1, {"global_clipnorm": 1e-3}, kd_weight=3.0, hint_weight=0.5)
    # The first step of Adam moves by the rate whatever the norm: the moments tell it.
    adam = model.optimizer
    for parts in ((model.bottom, model.tower), (model.student_tower, *model.hint_projections)):
        variables = [v for part in parts if part for v in part.trainable_variables]
        moments = [adam._momentums[adam._index_dict[adam._var_key(v)]] for v in variables]
        norm = np.sqrt(sum(np.square(m.numpy() / 0.1).sum() for m in moments))
        assert norm == pytest.approx(1e-3, rel=1e-4)
    assert model.optimizer.global_clipnorm == 1e-3  # as it was


def test_a_student_starts_the_same_with_any_teacher_and_alone():
    starts = []
    for teacher in ({}, {"interactions": {"fm": {}}}, TEACHER):
        tf_keras.utils.set_random_seed(3)
        model = zoo.build(SCHEMA, {"name": "dual_dnn", **UNITS, **teacher})
        model({k: tf.constant(v) for k, v in next(batches(1))[0].items()})
        starts.append([v.numpy() for p in (model.embed, model.student_tower) for v in p.variables])
    for other in starts[1:]:
        for a, b in zip(starts[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_rocket_launching_lets_the_student_move_the_tables():
    first, _, _ = dual(kd_weight=0.0)
    second, _, _ = dual(kd_weight=0.0, embeddings_from="both")
    assert not np.array_equal(first.embed.tables["8"], second.embed.tables["8"])


def test_two_stage_moves_the_student_alone():
    model, start, history = dual(teacher_frozen=True)
    assert moved(start) == {v.ref() for v in model.student_tower.trainable_variables}
    assert "teacher_loss" not in history


def test_two_stage_starts_from_a_teacher_trained_alone(tmp_path):
    alone, _, _ = trained(name="teacher_alone", **TEACHER, teacher_units=(16, 8))
    path = tf.train.Checkpoint(model=alone).write(str(tmp_path / "teacher"))
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, {"name": "dual_dnn", **TEACHER, **UNITS, "teacher_frozen": True})
    features, _ = next(batches(1))
    features = {k: tf.constant(v) for k, v in features.items()}
    model(features)
    student = model.student_tower.get_weights()
    tf.train.Checkpoint(model=model).restore(path).expect_partial()
    for a, b in zip(teacher_weights(alone), teacher_weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model(features)["teacher"], alone(features)["model"])
    for a, b in zip(student, model.student_tower.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_student_alone_learns_its_own_tables():
    model, start, _ = trained(name="dual_dnn", student_units=(8,))
    assert model.head_names == ("student",)
    assert set(model(next(iter(batches(1)))[0])) == {"student"}
    assert model.embed.tables["8"].ref() in moved(start)


def test_loss_terms_are_those_of_the_equation():
    model, _, history = dual(
        steps=1, kd_weight=2.0, hint_weight=0.25, distance="soft_labels", temperature=2.0
    )
    assert set(history) == {"loss", "student_loss", "teacher_loss", "kd", "hint"}
    features, targets = next(batches(1))
    embedded = model.embed(model.encode({k: tf.constant(v) for k, v in features.items()}))
    heads = model.heads(embedded, model.head_names)
    terms = model.loss_terms(heads, {"labels": tf.constant(targets["labels"])})
    y = targets["labels"].astype(np.float64)
    z = {name: head.logits.numpy().astype(np.float64) for name, head in heads.items()}

    def bce(label, logit):
        return (np.log1p(np.exp(logit)) - label * logit).sum(1)

    soft = 1 / (1 + np.exp(-z["teacher"] / 2))
    np.testing.assert_allclose(terms["student_loss"], bce(y, z["student"]), rtol=1e-5)
    np.testing.assert_allclose(terms["teacher_loss"], bce(y, z["teacher"]), rtol=1e-5)
    np.testing.assert_allclose(terms["kd"], 2.0 * 4 * bce(soft, z["student"] / 2), rtol=1e-5)
    # Last layers pair up: both 8 wide, so R is the identity.
    last = heads["teacher"].hidden[-1] - heads["student"].hidden[-1]
    np.testing.assert_allclose(terms["hint"], 0.25 * (last.numpy() ** 2).sum(1), rtol=1e-5)


def test_distillation_grows_over_the_warm_up():
    model, _, _ = dual(steps=1, kd_weight=2.0, kd_warmup_steps=4)
    features, targets = next(batches(1))
    embedded = model.embed(model.encode({k: tf.constant(v) for k, v in features.items()}))
    heads = model.heads(embedded, model.head_names)
    logits = (heads[name].logits for name in ("teacher", "student"))
    whole = 2.0 * tf.reduce_sum(distillation(*logits, model.distance), 1)
    for step, factor in ((0, 0.0), (1, 0.25), (4, 1.0), (9, 1.0)):
        model.optimizer.iterations.assign(step)
        found = model.loss_terms(heads, {"labels": tf.constant(targets["labels"])})["kd"]
        np.testing.assert_allclose(found, factor * whole, rtol=1e-6)


def test_hints_project_where_widths_differ():
    model, _, history = dual(hint_weight=1.0, student_units=(5,))
    assert [p.kernel.shape.as_list() for p in model.hint_projections] == [[5, 8]]
    assert history["hint"][0] > 0


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("soft_labels", lambda p, q, t, s: -(p * np.log(q) + (1 - p) * np.log(1 - q)) * 9),
        ("logit_mse", lambda p, q, t, s: ((t - s) / 3) ** 2),
        ("probability_mse", lambda p, q, t, s: 9 * (p - q) ** 2),
    ],
)
def test_distances(distance, expected):
    rng = np.random.default_rng(0)
    t, s = rng.normal(size=(2, 5, 3))
    p, q = 1 / (1 + np.exp(-t / 3)), 1 / (1 + np.exp(-s / 3))
    teacher = tf.Variable(t)
    with tf.GradientTape() as tape:
        found = distillation(teacher, tf.constant(s), distance, temperature=3.0)
    np.testing.assert_allclose(found, expected(p, q, t, s), rtol=1e-9)
    assert tape.gradient(found, teacher) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "dual_dn"}, "`model.name` should be one of .*Received: 'dual_dn'"),
        (
            {"name": "dual_dnn", "kd_wieght": 1.0},
            "unknown argument `kd_wieght`; did you mean `kd_weight`",
        ),
        ({"name": "dual_dnn", "interactions": {"fmm": {}}}, "should be one of .*Received: 'fmm'"),
        ({"name": "dual_dnn", "distance": "l1"}, "`distance` should be one of"),
        ({"name": "dual_dnn", "kd_warmup_steps": -1}, "`kd_warmup_steps` should be >= 0"),
        ({"name": "dual_dnn", "kd_weight": -0.5}, "`kd_weight` should be >= 0. Received: -0.5"),
        ({"name": "dual_dnn", "hint_weight": float("nan")}, "`hint_weight` should be >= 0"),
        ({"name": "dual_dnn", "embeddings_from": "nobody"}, "`embeddings_from` should be one of"),
        ({"name": "deepfm", "linear_dim": 3}, "unknown argument `linear_dim`"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message):
        zoo.build(SCHEMA, config)
    with pytest.raises(ValueError, match="`temperature` should be > 0"):
        distillation(tf.zeros([1, 1]), tf.zeros([1, 1]), "logit_mse", 0.0)


def test_an_optimiser_that_averages_weights_is_refused():
    model = zoo.build(SCHEMA, {"name": "lr"})
    for place in range(2):
        optimizers = [tf_keras.optimizers.Adam(use_ema=place == i) for i in range(2)]
        with pytest.raises(ValueError, match="`use_ema` should be False"):
            model.compile(*optimizers)


def test_a_frozen_teacher_is_steady():
    model, _, _ = dual(teacher_frozen=True, dropout=0.5)
    features, _ = next(batches(1))
    embedded = model.embed(model.encode({k: tf.constant(v) for k, v in features.items()}))
    twice = [model.heads(embedded, ("teacher",), training=True)["teacher"] for _ in range(2)]
    np.testing.assert_array_equal(twice[0].logits, twice[1].logits)


def test_lr_reads_dense_features():
    model, _, _ = trained(name="lr")
    features, _ = next(batches(1))
    dearer = {**features, "price": features["price"] + 1}
    low, high = (
        model({k: tf.constant(v) for k, v in f.items()})["model"] for f in (features, dearer)
    )
    steps = high.numpy() - low.numpy()
    assert np.abs(steps).min() > 0
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:1], steps.shape), rtol=1e-3)
