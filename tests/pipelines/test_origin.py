"""Every export tells what it comes from, and calibrations come from the rows named."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from typing import Any

import program_world
import pyarrow.parquet as pq
import pytest
import zygote
from served import close

import qianmo
from qianmo.export.saved_model import session
from qianmo.pipelines import origin, run_dir
from qianmo.pipelines.data import identity
from qianmo.pipelines.data.replay import first_rows
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.evaluation.calibration import logits
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.serving.clients import Client
from qianmo.pipelines.serving.server import ModelServer
from qianmo.pipelines.training.preparing import completed


@pytest.fixture(scope="module")
def runs(world: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Copies of the world's models that know their data, and a two-tower model."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = run_dir.read_recipe(world / "plain")
    known = {"train": identity.of(recipe.schema, recipe.data.train)}
    for name in ("plain", "meta"):
        shutil.copytree(world / name, folder / name)
        run_dir.write_identities(folder / name, known)
    config = recipe.to_config()
    config["model"] = {"name": "two_tower", "item_id": "item", "dim": 4, "units": (4,)}
    config["train"]["monitor"] = "ndcg_10"
    config["data"]["catalogue"] = str(world / "data/items.parquet")
    features = [f for f in config["schema"]["features"] if f["name"] in ("user", "item", "kind")]
    config["schema"] = {**config["schema"], "features": features, "domain": ""}
    of_items = completed(Recipe.from_config(config))
    run_dir.write(folder / "two_tower", run_dir.build(of_items), of_items, like=folder / "plain")
    return folder


def exported(
    programs: zygote.Zygote, model: pathlib.Path, base: pathlib.Path, *words: str
) -> zygote.Ended:
    done = programs.run("export", f"--model_dir={model}", f"--model_base_path={base}", *words)
    assert done.code == 0, done.stderr
    return done


def told(version: pathlib.Path) -> dict[str, Any]:
    folder = version if (version / "MANIFEST").exists() else version / "assets.extra"
    return json.loads((folder / "origin.json").read_text())


FORMS = {
    "in_graph": ("plain", ["m"], []),
    "fed": ("plain", ["m", "m_lookup"], []),
    "store": ("plain", ["m", "m_embeddings"], []),
    "fed --embedding_store": ("plain", ["m", "m_lookup", "e"], ["--embedding_store={base}/../e"]),
    "adapted": ("meta", ["m"], []),
    "retrieval": ("two_tower", ["m"], []),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_version_of_a_form_tells_its_weights_and_data(
    form: str, programs: zygote.Zygote, runs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    name, folders, words = FORMS[form]
    base = tmp_path / "m"
    words = [word.format(base=base) for word in words]
    exported(programs, runs / name, base, f"--form={form.split()[0]}", "--rows=50", *words)
    expected = {
        "qianmo": qianmo.__version__,
        "weights": run_dir.fingerprint(runs / name),
        "data": json.loads((runs / name / "data.json").read_text()),
    }
    recipe = run_dir.read_recipe(runs / name)
    if name == "meta":
        support = identity.of(recipe.schema, recipe.data.test_support)
        expected["support"] = support.to_config()
    if name == "two_tower":
        schema = retrieval.item_schema(recipe.schema)
        catalogue = identity.of(schema, recipe.data.catalogue, targets=False)
        expected["catalogue"] = catalogue.to_config()
    for folder in folders:
        assert told(tmp_path / folder / "1") == run_dir.plain(expected)


def test_other_support_is_told_and_rows_that_are_only_replayed_are_not(
    programs: zygote.Zygote, runs: pathlib.Path, world: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    base = tmp_path / "m"
    other = tmp_path / "other.parquet"
    pq.write_table(pq.read_table(world / "data/support.parquet").slice(0, 200), other)
    words = ("--form=adapted", "--rows=50")
    exported(programs, runs / "meta", base, *words)
    exported(programs, runs / "meta", base, *words, f"--data={world / 'data/train.parquet'}")
    exported(programs, runs / "meta", base, *words, f"--support={other}")
    first, second, third = (told(base / version) for version in "123")
    assert first == second
    assert first != third
    assert (
        third["support"]["sha256"]
        == identity.of(run_dir.read_recipe(runs / "meta").schema, other).sha256
    )
    assert {k: v for k, v in first.items() if k != "support"} == {
        k: v for k, v in third.items() if k != "support"
    }
    rows = first_rows(run_dir.read_recipe(runs / "meta").schema, str(other), 5)
    with ModelServer({"m": str(base)}, port=0, rest_api_port=0) as server:
        answer = Client(f"127.0.0.1:{server.port}", "m").predict(rows)
    assert answer["status"].tolist() == [0] * 5


def test_weights_that_change_while_they_are_read_are_refused(
    runs: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = iter(["before", "after"])
    monkeypatch.setattr(run_dir, "fingerprint", lambda _: next(fingerprints))
    with pytest.raises(ValueError, match="its training wrote other weights while they were read"):
        origin.load(runs / "plain")


@pytest.mark.parametrize("form", ["in_graph", "adapted"])
def test_a_calibration_is_fitted_printed_told_and_served(
    form: str,
    programs: zygote.Zygote,
    runs: pathlib.Path,
    world: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    run = runs / ("meta" if form == "adapted" else "plain")
    fitted_on, other = tmp_path / "valid.parquet", world / "data/test.parquet"
    program_world.write_rows(fitted_on, 3000, 9)
    words = (f"--form={form}", f"--calibrate={fitted_on}", f"--data={other}", "--rows=50")
    out = exported(programs, run, tmp_path / "m", *words).stdout
    model, _ = run_dir.load(run)
    rows = logits(model, str(fitted_on))
    scaling = rows.fitted()["model"]
    pcoc = {
        name: scored[own, 0].sum() / rows.labels[own, 0].sum()
        for when, scored in (
            ("before", rows.probabilities("model")),
            ("after", rows.probabilities("model", scaling)),
        )
        for name, own in (
            (f"all {when}", rows.index >= 0),
            (f"domain 1 {when}", rows.index == 1),
            (f"domain 2 {when}", rows.index == 2),
        )
    }
    parts = re.findall(
        r"^model +click +(all|domain .) +([0-9,]+) +([0-9.]+) +([0-9.]+)$", out, re.M
    )
    assert [part[0] for part in parts] == ["all", "domain 1", "domain 2"] * 2
    assert parts[0][1] == "3,000"
    assert parts[3][1] == "256"
    for name, _, before, after in parts[:3]:
        assert float(before) == pytest.approx(pcoc[f"{name} before"], abs=6e-4)
        assert float(after) == pytest.approx(pcoc[f"{name} after"], abs=6e-4)
    found = told(tmp_path / "m" / "1")["calibration"]
    schema = model.schema
    assert found.pop("scalings") == {"model": scaling.to_config(schema)}
    assert found == run_dir.plain(identity.of(schema, fitted_on).to_config())
    assert found["rows"] == 3000
    assert [*scaling.to_config(schema)["click"]] == ["all", "domain 1", "domain 2"]
    # The first 256 rows are served as they were fitted.
    first = first_rows(schema, str(fitted_on), 256)
    with session(tmp_path / "m" / "1") as run_graph:
        served = run_graph("serving_default", first)["click"]
    close(served, rows.probabilities("model", scaling)[:256, 0])


def test_a_calibration_says_what_it_leaves_and_where_it_should_not_be_fitted(
    programs: zygote.Zygote, runs: pathlib.Path, world: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    recipe = run_dir.read_recipe(runs / "plain")
    config = recipe.to_config()
    config["schema"]["features"] = [f for f in config["schema"]["features"] if f["name"] != "scene"]
    made = completed(Recipe.from_config(config))
    run_dir.write(tmp_path / "model", run_dir.build(made), made, like=runs / "plain")
    out = exported(
        programs, tmp_path / "model", tmp_path / "m", f"--calibrate={recipe.data.train}"
    ).stdout
    assert "These are the training rows" in out
    assert "`scene` is no feature with a vocabulary: one scaling for all domains." in out
    scalings = told(tmp_path / "m" / "1")["calibration"]["scalings"]
    assert [*scalings["model"]["click"]] == ["all"]
    refused = programs.run(
        "export",
        f"--model_dir={runs / 'two_tower'}",
        f"--model_base_path={tmp_path / 'r'}",
        "--form=retrieval",
        f"--calibrate={recipe.data.train}",
    )
    assert refused.code == 2
    assert "--calibrate is for scores" in refused.stderr
