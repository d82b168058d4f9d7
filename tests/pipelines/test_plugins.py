"""A package outside of this one registers a model and an interaction; every program uses them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import program_world
import pytest
import zygote

from qianmo.models import zoo
from qianmo.pipelines import program

MODULE = '''"""A model of this team's own, and an interaction."""

import tensorflow as tf
import tf_keras

from qianmo.layers.bottom import Bottom
from qianmo.layers.mlp import MLP
from qianmo.layers.tower import Tower
from qianmo.models import zoo
from qianmo.models.road import Road


@zoo.register_interaction("sums")
@tf_keras.utils.register_keras_serializable(package="our_team")
class Sums(tf_keras.layers.Layer):
    def __init__(self, scale=1.0, **kwargs):
        super().__init__(**kwargs)
        self.scale = scale

    def call(self, v):
        return self.scale * tf.reduce_sum(v, 2)

    def get_config(self):
        return {**super().get_config(), "scale": self.scale}


@zoo.register("our_net")
def our_net(schema, *, units: tuple[int, ...] = (4,), **ranker):
    if sum(units) > 99:
        raise ValueError(f"`units` should be at most 99 in all. Received: {units}")
    bottom = Bottom([Sums()], [MLP(units)], name="bottom")
    return Road(schema, bottom, Tower(len(schema.labels), (4,), name="tower"), **ranker)
'''


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Data, the package, and recipes that ask for its model."""
    folder = tmp_path_factory.mktemp("team")
    program_world.write_data(folder / "data")
    (folder / "site" / "our_team").mkdir(parents=True)
    (folder / "site" / "our_team" / "__init__.py").touch()
    (folder / "site" / "our_team" / "models.py").write_text(MODULE)
    recipe = program_world.RECIPE.replace('"name": "mlp"', '"name": "our_net"')
    recipe = recipe.replace('{"fm": {}}', '{"fm": {}, "sums": {"scale": 0.5}}')
    recipe = recipe.replace('"seam_dim": 4,\n        "tower_units": (4,),\n', "")
    recipe = recipe.replace(
        "    return config", '    config.plugins = ("our_team.models",)\n    return config'
    )
    (folder / "recipe.py").write_text(recipe)
    return folder


@pytest.fixture(scope="module")
def run(programs: zygote.Zygote, team: pathlib.Path) -> Callable[..., zygote.Ended]:
    """Runs a program in the team's folder, its package on the path."""
    path = f"import sys; sys.path.insert(0, {str(team / 'site')!r})"

    def of(name: str, *words: str) -> zygote.Ended:
        return programs.run(name, *words, cwd=team, before=path)

    return of


def test_every_program_knows_the_model(
    run: Callable[..., zygote.Ended], team: pathlib.Path, programs: zygote.Zygote
) -> None:
    def done(name: str, *words: str) -> str:
        ended = run(name, *words)
        assert ended.code == 0, ended.stderr
        return str(ended.stdout)

    # The first as a user runs it, with the package on PYTHONPATH.
    path = f"{team / 'site'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    train = ["--config=recipe.py", "--model_dir=plain", "--config.train.epochs=1"]
    first = subprocess.run(
        [sys.executable, "-m", "qianmo.pipelines.train", *train],
        cwd=team, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert json.loads((team / "plain/recipe.json").read_text())["plugins"] == ["our_team.models"]
    for variant in ("single_1", "single_2", "meta", "dual"):
        done("train", f"--config=recipe.py:{variant}", f"--model_dir={variant}",
             "--config.train.epochs=1")  # fmt: skip
    assert "Report: plain/report.html" in done("train", *train)  # as it was
    assert "model" in done("evaluate", "--model_dir=plain")
    assert "support rows used" in done("adapted", "--model_dir=meta")
    done("compare", "--model_dir=plain", "--single=single_1,single_2")
    done("cold_items", "--model_dir=plain", "--item_id=item", "--items=data/items.parquet",
         "--output=filled")  # fmt: skip
    for form in ("in_graph", "fed", "store"):
        done("export", "--model_dir=plain", f"--model_base_path=served/{form}", f"--form={form}")
    done("export", "--model_dir=meta", "--model_base_path=served/adapted", "--form=adapted")
    done("export", "--model_dir=dual", "--model_base_path=served/dual", "--form=store")
    done("online", "--model_dir=dual", "--model_base_path=served/dual", "--folder=data",
         "--start_after=support.parquet", "--stop_at_end")  # fmt: skip

    server = programs.start(
        "serve", "--embedded", "--port=0", "--rest_api_port=0", "--model_base_path=served/in_graph",
        cwd=team,
    )  # fmt: skip
    server.until(lambda: "\n" in server.read("stdout"), "its ready line")
    address = server.read("stdout").split()[2].rstrip(",")
    lines = done("predict", f"--server={address}", "--data=data/test.parquet", "--rows=5",
                 "--schema=plain/recipe.json")  # fmt: skip
    server.signal(15)
    assert server.wait().code == 0
    scores = [json.loads(line)["click"] for line in lines.splitlines()]
    assert len(scores) == 5
    assert np.all((np.asarray(scores) > 0) & (np.asarray(scores) < 1))


def test_arguments_of_the_model_are_checked_as_others_are(
    run: Callable[..., zygote.Ended], team: pathlib.Path
) -> None:
    for change, message in (
        ("--config.model.units=(50,50)", "model `our_net`: `units` should be at most 99 in all"),
        ("--config.model.name=our_nett", "did you mean `our_net`? Received: 'our_nett'"),
    ):
        ended = run("train", "--config=recipe.py", "--model_dir=refused", change)
        assert ended.code == program.REFUSED
        assert ended.stderr.count("\n") == 1
        assert message in ended.stderr


def test_a_plugin_that_cannot_be_imported_is_said_in_a_line(
    programs: zygote.Zygote,
    run,
    team: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "model").mkdir()
    recipe = {"plugins": ["our_team.models"], "data": {}, "schema": {}, "model": {}, "train": {}}
    (tmp_path / "model" / "recipe.json").write_text(json.dumps(recipe))
    ended = programs.run("evaluate", "--model_dir=model", cwd=tmp_path)
    assert ended.code == program.REFUSED
    assert ended.stderr == (
        "error: model/recipe.json is no recipe: `plugins`: our_team.models cannot be imported: "
        "ModuleNotFoundError: No module named 'our_team'. Install it, or put its folder on "
        "PYTHONPATH.\n"
    )
    for text, message in (
        ("x = (\n", "our_team/broken.py, line 1: SyntaxError: '(' was never closed."),
        (
            "\nundefined\n",
            "our_team/broken.py, line 2: NameError: name 'undefined' is not defined.",
        ),
    ):
        (team / "site" / "our_team" / "broken.py").write_text(text)
        ended = run("train", "--config=recipe.py", "--model_dir=refused",
                    "--config.plugins=('our_team.broken',)")  # fmt: skip
        assert ended.code == program.REFUSED
        assert ended.stderr.startswith("error: `plugins`: our_team.broken cannot be imported: ")
        assert message in ended.stderr
        assert ended.stderr.count("\n") == 1
    assert not (team / "refused").exists()


def test_a_fault_of_a_plugin_is_told_from_one_of_the_package(
    programs: zygote.Zygote, team: pathlib.Path
) -> None:
    faulty = MODULE.replace("bottom = Bottom(", "{}['no']\n    bottom = Bottom(")
    (team / "site" / "our_team" / "faulty.py").write_text(faulty)
    path = f"import sys; sys.path.insert(0, {str(team / 'site')!r})"
    words = ["--config=recipe.py", "--model_dir=x", "--config.plugins=('our_team.faulty',)"]
    ended = programs.run("train", *words, cwd=team, before=path)
    assert ended.code == program.INTERNAL
    assert "error: KeyError: 'no'. This is an error of the plug-in our_team.faulty" in ended.stderr


def test_a_name_is_registered_once() -> None:
    def mlp() -> None: ...

    with pytest.raises(ValueError, match=r"`mlp` is registered already, by qianmo\.models\.ctr"):
        zoo.register("mlp")(mlp)
    with pytest.raises(ValueError, match=r"`fm` is registered already, by qianmo\.layers\.fm"):
        zoo.register_interaction("fm")(type("Other", (), {}))
    assert zoo.register("mlp", passes_to=zoo.MODELS["mlp"][1])(zoo.MODELS["mlp"][0])
