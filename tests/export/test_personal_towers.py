"""Towers of adgroups: fine-tuned together as if alone, joined to one trunk, changed in place."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from served import close

from qianmo.export.personal_towers import (
    BAD_TOWER,
    SHARED_TOWER,
    WEIGHTS,
    export_personal,
    fine_tune,
)
from qianmo.export.saved_model import STATUS, op_types, session
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import InnerLoop
from qianmo.layers.schema import Schema
from qianmo.models import zoo

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=30, dim=4),
        Dense(name="bid", mean=0.0, variance=1.0),
    ),
    labels=("click",),
    task_id="adgroup",
)
INNER = {"steps": 4, "step_size": 0.5, "shrinkage": 2.0, "max_support": 16}


def columns(size, seed, adgroups):
    random = np.random.default_rng(seed)
    return {
        "user": random.integers(0, 30, size),
        "bid": random.normal(size=size).astype(np.float32),
        "adgroup": random.choice(adgroups, size),
        "click": random.integers(0, 2, size).astype(np.float32),
    }


ROWS = columns(400, 1, np.array([3, 5, 2**40, 9]))
ASKED = columns(50, 2, np.array([3, 5, 2**40, 9, 77]))  # 77 has no rows
del ASKED["click"]


@pytest.fixture(scope="module")
def model():
    tf_keras.utils.set_random_seed(1)
    made = zoo.build(
        SCHEMA, {"name": "mlp", "units": (8,), "tower_units": (5,), "embedding_stddev": 0.5}
    )
    made.build()
    return made


@pytest.fixture(scope="module")
def towers(model):
    return fine_tune(model, InnerLoop(**INNER), ROWS, tasks_per_batch=3)


@pytest.fixture(scope="module")
def served(model, towers, tmp_path_factory):
    folder, worst = export_personal(
        model, tmp_path_factory.mktemp("served") / "ads", ASKED, *towers
    )
    assert worst <= 1e-6
    return folder


def by_hand(model, adgroup):
    """The click probabilities of ASKED by one adgroup's tower, by gradient descent on copies."""
    rows = np.flatnonzero(ROWS["adgroup"] == adgroup)[-INNER["max_support"] :]
    names = SCHEMA.input_names
    weights = [tf.identity(v) for v in model.tower.trainable_variables]

    def logits(h):
        return (tf.nn.relu(h @ weights[0] + weights[1]) @ weights[2] + weights[3])[:, 0]

    h = model.tower_input({k: tf.constant(ROWS[k][rows]) for k in names}, "model")
    for _ in range(INNER["steps"]):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            bce = tf.nn.sigmoid_cross_entropy_with_logits(ROWS["click"][rows], logits(h))
            loss = tf.reduce_sum(bce) / (len(rows) + INNER["shrinkage"])
        gradients = tape.gradient(loss, weights)
        weights = [w - INNER["step_size"] * g for w, g in zip(weights, gradients, strict=True)]
    asked = model.tower_input({k: tf.constant(ASKED[k]) for k in names}, "model")
    return tf.sigmoid(logits(asked)).numpy()


def test_each_adgroup_is_scored_by_its_own_tower(model, towers, served):
    assert towers[0].tolist() == [3, 5, 9, 2**40]
    with session(served) as run:
        answer = run("serving_default", ASKED)
        plain = run("plain", {k: ASKED[k] for k in SCHEMA.input_names})
    for adgroup in towers[0]:
        mine = ASKED["adgroup"] == adgroup
        expected = by_hand(model, adgroup)[mine]
        np.testing.assert_allclose(answer["click"][mine], expected, atol=1e-5)
        assert np.abs(answer["click"][mine] - plain["click"][mine]).max() > 1e-3
    new = ASKED["adgroup"] == 77
    close(answer["click"][new], plain["click"][new])
    np.testing.assert_array_equal(answer[STATUS], np.where(new, SHARED_TOWER, 0))


def test_towers_come_and_go_without_a_new_trunk(towers, served):
    ids, weights = towers
    with session(served) as run:
        before = run("serving_default", ASKED)
        assert run("stats", {"adgroup": np.array([1, 2])})["towers"].tolist() == [4, 4]
        put = {"adgroup": np.array([77, 3]), WEIGHTS: weights[[1, 1]]}
        assert run("put_towers", put)[STATUS].tolist() == [0, 0]
        assert run("stats", {"adgroup": np.array([1])})["towers"].tolist() == [5]
        after = run("serving_default", ASKED)
        same = {
            k: np.where(ASKED["adgroup"] == 77, 5, v) if k == "adgroup" else v
            for k, v in ASKED.items()
        }
        new = ASKED["adgroup"] == 77
        np.testing.assert_array_equal(
            after["click"][new], run("serving_default", same)["click"][new]
        )
        others = ~np.isin(ASKED["adgroup"], [3, 77])
        np.testing.assert_array_equal(after["click"][others], before["click"][others])
        gone = run("expire_towers", {"adgroup": np.array([77, 1000])})
        assert gone[STATUS].tolist() == [0, SHARED_TOWER]
        again = run("serving_default", ASKED)
        np.testing.assert_array_equal(again["click"][new], before["click"][new])
        bad = {"adgroup": np.array([5, 9]), WEIGHTS: weights[[1, 2]].copy()}
        bad[WEIGHTS][0, 3] = np.nan
        assert run("put_towers", bad)[STATUS].tolist() == [BAD_TOWER, 0]
        np.testing.assert_array_equal(
            run("serving_default", ASKED)["click"][others], before["click"][others]
        )
    assert ids.dtype == np.int64


def test_labels_that_are_not_there_teach_nothing(model, towers):
    """Rows before and between an adgroup's own, all without a label that can be read."""
    size = len(ROWS["click"])
    without = {name: np.repeat(column, 2) for name, column in ROWS.items()}
    without["click"][::2] = np.resize(np.float32([-1.0, np.nan, 7.0]), size)
    without["click"][1::2] = ROWS["click"]
    inner = InnerLoop(**{**INNER, "max_support": 2 * INNER["max_support"]})
    ids, found = fine_tune(model, inner, without)
    np.testing.assert_array_equal(ids, towers[0])
    np.testing.assert_allclose(found, towers[1], atol=1e-6)
    none = {**ROWS, "click": np.full(size, np.nan, np.float32)}
    assert not fine_tune(model, inner, none)[1].any()


def test_a_tower_that_is_not_finite_leaves_its_adgroup_the_shared_one(
    model, towers, tmp_path, caplog
):
    ids, weights = towers
    broken = weights.copy()
    broken[0, 2], broken[2, 0] = np.nan, np.inf
    folder, _ = export_personal(model, tmp_path / "ads", ASKED, ids, broken)
    assert "2 of 4 towers are not finite" in caplog.text
    with session(folder) as run:
        answer = run("serving_default", ASKED)
        assert run("stats", {"adgroup": np.array([1])})["towers"].tolist() == [2]
    shared = ~np.isin(ASKED["adgroup"], ids[[1, 3]])
    np.testing.assert_array_equal(answer[STATUS], np.where(shared, SHARED_TOWER, 0))


def test_it_is_made_of_stock_ops(served):
    assert not [op for op in op_types(served) if ">" in op]
