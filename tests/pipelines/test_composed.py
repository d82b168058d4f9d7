"""Domains, meta towers and distillation in one recipe: trained, exported, replayed."""

from __future__ import annotations

import pathlib
import shutil
import warnings
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from qianmo.configs import base, kuairand_composed, kuairand_fused
from qianmo.export.adapted import ADAPT, adapted_specs, export_adapted
from qianmo.export.saved_model import cast, export_in_graph, session
from qianmo.layers.expert_mixture import ExpertMixture
from qianmo.layers.star_tower import StarTower
from qianmo.pipelines.data.replay import columns, first_rows
from qianmo.pipelines.datasets import kuairand
from qianmo.pipelines.evaluation import adapted
from qianmo.pipelines.evaluation.task_rows import support_rows
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

ROWS = 200
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The shipped sample's rows of every twentieth user."""
    folder = tmp_path_factory.mktemp("kuairand")
    shutil.copytree(kuairand.SAMPLE, folder / "sample")
    log = pq.read_table(folder / "sample" / "interactions.parquet")
    user = log["user_id"].to_numpy()
    pq.write_table(log.filter(user % 20 == 0), folder / "sample" / "interactions.parquet")
    kuairand.kuairand(folder / "sample", folder / "rows")
    return folder / "rows"


def pointed(config: ConfigDict, data: pathlib.Path) -> ConfigDict:
    config.data.valid = config.data.valid_support = ""
    return base.point(config, data)


@pytest.fixture(scope="module")
def trained(data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The recipe's model after some steps, and what it was before."""
    config = pointed(kuairand_composed.get_config(), data)
    config.data.chunk_tasks = 10
    run = Run(Recipe.from_config(config.to_dict()), tmp_path_factory.mktemp("run") / "model")
    before = {v.ref(): v.numpy() for v in run.model.variables}
    losses = [run.model.train_step(batch) for batch in run._dataset(0, 0).take(STEPS)]
    return run.model, before, losses


def test_all_parts_learn_and_the_meta_tower_is_the_students(trained: Any) -> None:
    model, before, losses = trained
    assert any(isinstance(layer, ExpertMixture) for layer in model.teacher_bottom.submodules)
    assert isinstance(model.teacher_tower, StarTower)
    assert model.tower_of(model.serving_head) is model.student_tower
    assert {"teacher_loss", "student_loss", "kd", "meta"} <= set(losses[0])
    for part in ("teacher_bottom", "teacher_tower", "student_bottom", "student_tower", "meta"):
        for variable in getattr(model, part).trainable_variables:
            assert (variable.numpy() != before[variable.ref()]).any(), f"{part}, {variable.name}"


def test_it_is_served_as_keras_scores_it(
    trained: Any, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, _, _ = trained
    rows = first_rows(model.schema, str(data / "test.parquet"), ROWS)
    logits = model({name: tf.constant(column) for name, column in rows.items()})
    expected = {head: tf.sigmoid(z).numpy() for head, z in logits.items()}
    student, _ = export_in_graph(model, tmp_path / "student", rows)
    both, _ = export_in_graph(model, tmp_path / "both", rows, heads=("student", "teacher"))
    for folder, heads in ((student, ("student",)), (both, ("student", "teacher"))):
        with session(folder) as run:
            for head in heads:
                answer = run(head, rows)
                served = np.stack([answer[label] for label in model.schema.labels], 1)
                np.testing.assert_allclose(served, expected[head], atol=1e-6)
    sizes = [sum(p.stat().st_size for p in f.rglob("variables*")) for f in (student, both)]
    own = sum(v.shape.num_elements() for v in model.teacher_bottom.variables)
    assert sizes[1] - sizes[0] > 4 * own  # the student ships without the experts


def test_its_tower_adapts_in_the_served_graph(
    trained: Any, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, _, _ = trained
    path, support_path = (str(data / f"{name}.parquet") for name in ("test", "test_support"))
    rows, support = columns(model.schema, path, ROWS), columns(model.schema, support_path)
    folder, worst = export_adapted(model, tmp_path / "adapted", rows, support)
    assert worst <= 1e-6
    most = model.meta.inner.max_support
    held = support_rows(model, support_path, most)
    scored = adapted.score(model, path, held, [most], batch_size=ROWS)
    inputs = cast({**rows, ADAPT: np.ones(ROWS, bool)}, adapted_specs(model.schema))
    with session(folder) as run:
        answer = run("adapted", inputs)
    served = np.stack([answer[label] for label in model.schema.labels], 1)
    keras = scored.probabilities[str(most)][:ROWS]
    pairs = np.stack([support["user_id"], support["time_ms"]], 1)
    _, times = np.unique(pairs, axis=0, return_counts=True)
    assert (times > 1).any()  # rows of one user and one time are two rows all the same
    np.testing.assert_allclose(served, keras, atol=1e-5)
    assert np.abs(keras - scored.probabilities["plain"][:ROWS]).max() > 1e-3


@pytest.mark.parametrize("variant", kuairand_fused.VARIANTS)
def test_ways_of_fusing_models_train_without_a_warning(
    variant: str, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = pointed(kuairand_fused.get_config(variant), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run = Run(Recipe.from_config(config.to_dict()), tmp_path / "model")
    batch = next(iter(run._dataset(0, 0)))
    losses = [float(run.model.train_step(batch)["loss"]) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    if variant == "scenes":
        config.model.star_tower = True
        with pytest.warns(UserWarning, match="5 domains share the one objective `is_click`"):
            Run(Recipe.from_config(config.to_dict()), tmp_path / "starred")
