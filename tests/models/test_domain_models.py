"""Models of several domains: who teaches and who scores whom, and what they export."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from qianmo.export import saved_model
from qianmo.layers.domain_experts import DomainExperts
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.domain_towers import DomainTowers
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.partitioned_norm import PartitionedNorm
from qianmo.layers.schema import Schema
from qianmo.layers.star import StarLeaves
from qianmo.layers.tower import Tower, TowerOutput
from qianmo.models import zoo
from qianmo.models.road import Road

SCENES = (7, 1, 4)
SCHEMA = Schema(
    features=(
        Categorical(name="scene", vocabulary=SCENES, dim=4),
        Categorical(name="user", num_ids=9, dim=4, side="user"),
        Categorical(name="topic", num_ids=9, dim=4, domains=(1,)),
        Dense(name="age", mean=0.0, variance=1.0, side="user"),
        Dense(name="price", mean=0.0, variance=1.0, domains=(4, 7)),
    ),
    labels=("click", "like"),
    domain="scene",
    label_domains={"like": (1, 4)},
)
MODELS: dict[str, dict[str, Any]] = {
    "star": {"name": "star", "units": (6, 4), "norm": True, "auxiliary_units": (3,)},
    "cross_domain": {"name": "cross_domain", "expert_units": (6, 4), "tower_units": (4,)},
    "shared_bottom": {"name": "shared_bottom", "tasks": "domains", "units": (6,)},
    "mmoe": {"name": "mmoe", "tasks": "domains", "expert_units": (6,), "num_experts": 2},
    "ple": {"name": "ple", "tasks": "domains", "expert_units": ((6,), (4,))},
}
every_model = pytest.mark.parametrize("name", MODELS)


def rows(*scenes: int) -> dict[str, tf.Tensor]:
    count = len(scenes)
    random = np.random.default_rng(1)
    found = {
        "scene": np.array(scenes),
        "user": random.integers(0, 9, count),
        "topic": random.integers(0, 9, count),
        "age": random.normal(size=count).astype(np.float32),
        "price": random.normal(size=count).astype(np.float32),
    }
    return {name: tf.constant(values) for name, values in found.items()}


def build(name: str) -> Any:
    tf_keras.utils.set_random_seed(3)
    # Gradients should be there for all weights, which takes vectors and biases away from zero.
    model = zoo.build(SCHEMA, {"embedding_stddev": 1.0, **MODELS[name]})
    model.build()
    random = np.random.default_rng(2)
    for weight in model.trainable_variables:
        weight.assign_add(0.3 * random.normal(size=weight.shape))
    return model


def owned(model: Any) -> list[tuple[int, tf.Variable, int | None]]:
    """(place of the owner, variable, its row there or None for the whole) of owned weights."""
    found: list[tuple[int, tf.Variable, int | None]] = []
    for layer in model.submodules:
        if isinstance(layer, DomainExperts):
            for p, expert in enumerate(layer.experts, 1):
                found += [(p, v, None) for v in expert.trainable_variables]
        elif isinstance(layer, DomainTowers):
            for place, tower in enumerate(layer.towers):
                found += [(place, v, None) for v in tower.trainable_variables]
        elif isinstance(layer, StarLeaves | DomainMLP):
            found += [(p + 1, v, p) for v in layer.trainable_variables for p in range(3)]
        elif isinstance(layer, PartitionedNorm):
            both = (layer.domain_gammas, layer.domain_betas)
            found += [(p + 1, v, p) for v in both for p in range(3)]
    return found


@every_model
def test_a_domains_gradients_touch_no_other_domains_weights(name: str) -> None:
    model = build(name)
    parts = owned(model)
    for place, scene in enumerate(SCENES, 1):
        variables = [variable for _, variable, _ in parts]
        with tf.GradientTape() as tape:
            # Not in training mode, in which some rows teach the tower of unknown domains, too.
            embedded = model.embed(model.encode(rows(scene, scene, scene, scene)))
            heads = model.heads(embedded, ("model",))
            labels = tf.constant([[0.0, 1], [1, 0], [1, 1], [0, 0]])
            loss = tf.reduce_sum(model.loss_terms(heads, {"labels": labels})["label_loss"])
        moved = set()
        for (owner, _, row), gradient in zip(parts, tape.gradient(loss, variables), strict=True):
            if gradient is None:
                continue
            values = tf.convert_to_tensor(gradient).numpy()
            if (values if row is None else values[row]).any():
                moved.add(owner)
        assert moved == {place}, f"rows of place {place} moved weights of places {moved}"


@every_model
def test_a_row_is_scored_by_no_other_domains_weights(name: str) -> None:
    model = build(name)
    batch = rows(7, 1, 4, 99, 7, 1, 4, 99)
    before = model(batch)["model"].numpy()
    assert np.isfinite(before).all()
    for owner in range(4):
        saved = []
        for place, variable, row in owned(model):
            if place == owner:
                saved.append((variable, variable.numpy()))
                values = variable.numpy()
                values[... if row is None else row] += 1.0
                variable.assign(values)
        after = model(batch)["model"].numpy()
        changed = (after != before).any(1)
        own = np.array([(*SCENES, 99).index(s) + 1 for s in (7, 1, 4, 99)] * 2) % 4 == owner
        # Only towers of domains as tasks have weights for the unknown.
        assert (changed == own).all() if saved else not changed.any()
        for variable, values in reversed(saved):
            variable.assign(values)


@every_model
def test_it_trains_on_batches_without_some_domains(name: str) -> None:
    model = build(name)
    model.compile(tf_keras.optimizers.SGD(0.01), tf_keras.optimizers.SGD(0.01))
    for scenes in ((1, 1), (7, 99), (99, 99)):
        labels = np.array([[1.0, np.nan], [0, np.nan]], np.float32)
        targets = {"labels": tf.constant(labels), "weight": tf.ones([2])}
        loss = model.train_step((rows(*scenes), targets))["loss"]
        assert np.isfinite(loss)
    assert int(model.first_bad_step) == -1


def test_hidden_rows_teach_the_tower_of_unknown_domains() -> None:
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, {**MODELS["shared_bottom"], "hide_rate": 0.5})
    model.build()
    model.compile(tf_keras.optimizers.SGD(0.1), tf_keras.optimizers.SGD(0.1))
    before = [w.numpy() for w in model.tower.towers[0].trainable_weights]
    targets = {"labels": tf.ones([40, 2]), "weight": tf.ones([40])}
    model.train_step((rows(*[1] * 40), targets))
    after = [w.numpy() for w in model.tower.towers[0].trainable_weights]
    assert any((b != a).any() for b, a in zip(before, after, strict=True))
    scenes = model.embed(model.encode(rows(7, 1, 4))).domain
    assert scenes.numpy().tolist() == [1, 2, 3]  # scoring hides none


def test_a_label_that_a_row_lacks_teaches_nothing() -> None:
    model = build("cross_domain")
    z = model(rows(7, 1))["model"]
    labels = tf.constant([[1.0, np.nan], [1.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(z)
        found = model.loss_terms({"model": TowerOutput(z, [], z)}, {"labels": labels})["label_loss"]
    gradient = tape.gradient(found, z).numpy()
    expected = 1 / (1 + np.exp(-z.numpy())) - np.array([[1, np.nan], [1, 0]])
    expected[0, 1] = 0
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[0], np.log1p(np.exp(-z[0, 0])), rtol=1e-5)


def test_a_star_model_starts_as_the_plain_one_bit_for_bit() -> None:
    tf_keras.utils.set_random_seed(3)
    star = zoo.build(SCHEMA, {"name": "star", "units": (6, 4), "embedding_seed": 1})
    tower = Tower(2, (6, 4), seed=star.tower.seed)
    batch = rows(7, 1, 4, 99)
    star(batch)
    h = star.bottom(star.embed(star.encode(batch)))
    expected = tower(h[:, :-1]).logits
    np.testing.assert_array_equal(star(batch)["model"], expected)


def test_star_towers_for_one_objective_are_warned_of() -> None:
    config = {"name": "cross_domain", "expert_units": (4,)}
    one = Schema(features=SCHEMA.features, labels=("click",), domain="scene")
    with pytest.warns(UserWarning, match="3 domains share the one objective `click`"):
        zoo.build(one, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoo.build(one, {**config, "star_tower": False})
        zoo.build(SCHEMA, config)


def test_a_model_by_domain_needs_the_domain_among_its_features() -> None:
    plain = Schema(features=SCHEMA.features[1:2], labels=("click",), domain="scene")
    with pytest.raises(ValueError, match="among the features"):
        zoo.build(plain, {"name": "star"})


def numpy_rows(*scenes: int) -> dict[str, np.ndarray]:
    return {name: values.numpy() for name, values in rows(*scenes).items()}


@pytest.mark.parametrize("name", ["star", "cross_domain"])
def test_exports_answer_as_keras(name: str, tmp_path: pathlib.Path) -> None:
    model: Road = build(name)
    batch = numpy_rows(7, 1, 4, 99, 1, 1)
    probabilities = tf.sigmoid(model(batch)["model"]).numpy()
    whole, worst = saved_model.export_in_graph(model, tmp_path / "whole", batch)
    assert worst <= saved_model.TOLERANCE
    fed, worst = saved_model.export_fed(model, tmp_path / "fed", batch)
    assert worst <= saved_model.TOLERANCE
    assert "scene_id" in saved_model.vector_specs(model)
    with saved_model.session(whole) as run:
        for places in ([0], [3], [1, 4, 5], [2, 0]):  # any batch gives a row's own score
            some = {k: v[places] for k, v in batch.items()}
            if name == "star":  # garbage in what the domain does not own is not read
                some["topic"] = np.where(some["scene"] == 1, some["topic"], -5)
            answer = run("serving_default", some)
            for k, label in enumerate(SCHEMA.labels):
                np.testing.assert_allclose(answer[label], probabilities[places, k], atol=1e-6)
    foreign = saved_model.op_types(whole) | saved_model.op_types(fed)
    assert not [op for op in foreign if ">" in op]


def test_a_model_that_does_not_read_the_domain_gets_no_input_for_it() -> None:
    plain = Schema(
        features=(*SCHEMA.features[:2], Dense(name="age", mean=0.0, variance=1.0)),
        labels=("click",),
        domain="scene",
    )
    model = zoo.build(plain, {"name": "mlp", "units": (4,)})
    model.build()
    assert "scene_id" not in saved_model.vector_specs(model)


@pytest.mark.parametrize(
    "config",
    [MODELS["cross_domain"], {"name": "mmoe", "tasks": "labels", "expert_units": (6,)}],
    ids=["star tower", "towers of labels"],
)
def test_towers_by_domain_and_by_label_can_be_meta_towers(config: dict[str, Any]) -> None:
    schema = dataclasses.replace(SCHEMA, task_id="user")
    tf_keras.utils.set_random_seed(3)
    meta = {"inner": {"steps": 1}, "split": "random", "weight": 1.0}
    model = zoo.build(schema, {**config, "embedding_stddev": 1.0, "meta": meta})
    model.build()
    model.compile(*(tf_keras.optimizers.SGD(0.1) for _ in range(3)))
    batch = rows(*[7, 1, 4, 99] * 5)
    labels = np.random.default_rng(0).integers(0, 2, (20, 2)).astype(np.float32)
    labels[::4, 1] = np.nan  # scene 7 has no `like`
    targets = {"labels": tf.constant(labels), "weight": tf.ones([20]), "task_id": batch["user"]}
    found = {name: float(value) for name, value in model.train_step((batch, targets)).items()}
    assert np.isfinite(found["loss"])
    assert found["loss"] == pytest.approx(found["label_loss"] + found["meta"])


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple"])
def test_towers_of_domains_cannot_be_meta_towers(name: str) -> None:
    schema = dataclasses.replace(SCHEMA, task_id="user")
    meta = {"inner": {}, "split": "random"}
    with pytest.raises(
        ValueError, match="DomainTowers cannot: the rows of a task may be of several"
    ):
        zoo.build(schema, {**MODELS[name], "meta": meta}).build()
    student = {**MODELS[name], "hide_rate": 0.0}
    whole = {"name": "distilled", "teacher": MODELS["star"], "student": student, "meta": meta}
    with pytest.raises(ValueError, match="DomainTowers cannot"):
        zoo.build(schema, whole).build()


@pytest.mark.parametrize(
    "config",
    [
        {"name": "poso", "units": (4,), "gate_features": ("age",)},
        {"name": "epnet", "units": (4,)},
        {"name": "shared_bottom", "units": (4,), "tower_units": (3,)},
        {"name": "ple", "expert_units": ((4,),)},
    ],
    ids=lambda config: config["name"],
)
def test_a_row_has_its_own_score_in_any_batch(config: dict[str, Any]) -> None:
    tf_keras.utils.set_random_seed(3)
    model = zoo.build(SCHEMA, {**config, "embedding_stddev": 1.0})
    batch = rows(7, 1, 4, 99)
    whole = model(batch)["model"].numpy()
    assert len(np.unique(whole)) == 8
    for place in range(4):
        alone = model({name: values[place : place + 1] for name, values in batch.items()})
        np.testing.assert_allclose(alone["model"][0], whole[place], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [(MODELS["cross_domain"], "mlp"), ({"name": "deepfm", "units": (6,)}, "wdl")],
    ids=["cross_domain", "deepfm"],
)
def test_a_distilled_teacher_moves_as_if_alone_bit_for_bit(
    teacher: dict[str, Any], student: str
) -> None:
    """Whatever its student is: here one with a meta tower, which reads the teacher's columns."""
    schema = dataclasses.replace(SCHEMA, task_id="user")
    whole = {"embedding_stddev": 1.0, "embedding_l2": 0.01}
    meta = {"inner": {"steps": 1}, "split": "random", "gradient_to": "embeddings"}
    found = []
    for config in (
        teacher,
        {
            "name": "distilled",
            "teacher": teacher,
            "student": {"name": student, "units": (4,), "seam_dim": 3, "tower_units": (3,)},
            "hint_weight": 0.0 if student == "wdl" else 0.1,
            "meta": meta,
        },
    ):
        tf_keras.utils.set_random_seed(3)
        model = zoo.build(schema, {**whole, **config})
        model.build()
        model.compile(*(tf_keras.optimizers.SGD(0.1) for _ in range(3)))
        for _ in range(2):
            batch = rows(*[7, 1, 4, 99] * 5)
            targets = {"labels": tf.ones([20, 2]), "weight": tf.ones([20])}
            model.train_step((batch, {**targets, "task_id": batch["user"]}))
        parts = (model.embed, model.bottom, model.tower)
        found.append([v.numpy() for part in parts for v in part.variables])
    for alone, distilled in zip(*found, strict=True):
        np.testing.assert_array_equal(alone, distilled)


@pytest.mark.parametrize(
    ("teacher", "student", "what"),
    [
        ("mlp", "wdl", "first-order terms"),
        ("cross_domain", "deepfm", "first-order terms"),
        ("lr", "mlp", "the vectors of `scene`"),
    ],
)
def test_a_student_reads_no_columns_that_nothing_teaches(
    teacher: str, student: str, what: str
) -> None:
    config = {"name": "distilled", "teacher": {"name": teacher}, "student": {"name": student}}
    for change in ({}, {"embeddings_from": "both", "teacher_frozen": True}):
        model = zoo.build(SCHEMA, {**config, **change})
        with pytest.raises(ValueError, match=f"The student reads {what}, which the teacher does n"):
            model.compile(tf_keras.optimizers.SGD(0.1), tf_keras.optimizers.SGD(0.1))


def test_a_student_may_teach_columns_of_its_own_where_tables_take_both_gradients() -> None:
    parts = {"teacher": {"name": "mlp"}, "student": {"name": "wdl"}}
    model = zoo.build(SCHEMA, {"name": "distilled", **parts, "embeddings_from": "both"})
    model.build()
    model.compile(*(tf_keras.optimizers.SGD(0.1) for _ in range(3)))
    targets = {"labels": tf.ones([8, 2]), "weight": tf.ones([8])}
    for _ in range(2):
        model.train_step((rows(*[7, 1, 4, 99] * 2), targets))
    assert np.abs(model.embed.tables["4"][:, 4:]).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": {"name": "dual_dnn"}}, r"`teacher` should be a model of one bottom.*dual_dnn"),
        ({"student": {"name": "mlp", "meta": {}}}, "`student`: `meta` belongs to the whole model"),
        ({"student": {"name": "lr"}}, "`student`: model `lr` changes the schema"),
        ({"student": {"name": "mlpp"}}, "`model.name` should be one of"),
    ],
)
def test_parts_that_do_not_compose_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"name": "distilled", "teacher": MODELS["star"], "student": {"name": "mlp"}}
    with pytest.raises(ValueError, match=message):
        zoo.build(SCHEMA, {**config, **change})


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`tasks` should be one of .*Received: 'scenes'"):
        zoo.build(SCHEMA, {"name": "mmoe", "tasks": "scenes"})
