"""How a trained tower adapts can be tried on later rows, and served so, without training anew."""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import close

from qianmo.configs.base import base_config
from qianmo.export.adapted import ADAPT, adapted_specs
from qianmo.export.saved_model import STATUS, cast, session
from qianmo.layers.meta import NO_SUPPORT
from qianmo.ops.library import library
from qianmo.pipelines import run_dir
from qianmo.pipelines.data.replay import columns
from qianmo.pipelines.evaluation import adapted
from qianmo.pipelines.evaluation.task_rows import support_rows
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

USERS = 30


def write(path: pathlib.Path, per_user: np.ndarray, seed: int) -> None:
    """Rows of users who like even or odd items."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(USERS), per_user)
    item = random.integers(0, 40, len(user))
    time = seed * 1_000_000 + np.arange(len(user)) + 1
    likes = (item % 2 == user % 2) ^ (random.random(len(user)) < 0.1)
    table = {"user": user, "item": item, "like": likes.astype(np.float32), "time": time}
    pq.write_table(pa.table(table), path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("adapted")
    write(folder / "train.parquet", np.full(USERS, 40), 1)
    write(folder / "support.parquet", np.arange(USERS) % 7, 2)
    write(folder / "test.parquet", np.full(USERS, 8), 3)
    config = base_config()
    config.schema = {
        "features": [{"name": "item", "dim": 8, "side": "item"}],
        "labels": ("like",),
        "task_id": "user",
        "timestamp": "time",
    }
    config.model = {
        "name": "mlp",
        "units": (16,),
        "seam_dim": 8,
        "tower_units": (8,),
        "meta": {"inner": {"steps": 1, "step_size": 0.5}},
    }
    config.data.train = str(folder / "train.parquet")
    config.data.chunk_rows, config.data.chunk_tasks = 10, 20
    config.train.epochs = 2
    Run(Recipe.from_config(config.to_dict()), folder / "model").train()
    return folder


def program(name: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"qianmo.pipelines.{name}", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if not done.returncode else done.stderr.splitlines()[-1]


def test_steps_and_least_support_are_tried_and_then_served(
    trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model_dir, test, support = (
        str(trained / n) for n in ("model", "test.parquet", "support.parquet")
    )
    assert "give --data, --support" in program("adapted", f"--model_dir={model_dir}")
    words = [
        f"--model_dir={model_dir}",
        f"--data={test}",
        f"--support={support}",
        "--inner_steps=3",
        "--min_support=3",
    ]
    text = program("adapted", *words, f"--output={tmp_path / 'found.json'}")
    assert "newest 5" in text
    last = text.splitlines()[-1]
    # With --min_support=3 nobody with fewer rows adapted, so nothing is known of these.
    assert "loses on the plain score" in last or re.search("--min_support=[3-6]$", last)
    found = json.loads((tmp_path / "found.json").read_text())["test"]
    plain, changed = (found[head]["like"]["group"] for head in ("plain", "adapted"))
    assert changed["support 01-02"] == plain["support 01-02"]
    assert changed["support 03-05"]["auc"] != plain["support 03-05"]["auc"]

    model, _ = run_dir.load(model_dir)
    held = support_rows(model, support, model.meta.inner.max_support)
    before = adapted.score(model, test, held, [20]).probabilities["20"]
    model.meta.inner.steps, model.meta.min_support = 3, 3
    expected = adapted.score(model, test, held, [20])
    assert np.abs(before - expected.probabilities["20"]).max() > 1e-3

    base = tmp_path / "served"
    program("export", *words, "--form=adapted", f"--model_base_path={base}")
    rows = columns(model.schema, test)
    inputs = cast({**rows, ADAPT: np.ones(len(rows["user"]), bool)}, adapted_specs(model.schema))
    with session(base / "1") as run:
        answer = run("adapted", inputs)
    np.testing.assert_allclose(answer["like"], expected.probabilities["20"][:, 0], atol=1e-6)
    few = rows["user"] % 7 < 3
    np.testing.assert_array_equal(answer[STATUS] == NO_SUPPORT, few)


def test_what_one_version_puts_into_the_store_the_next_one_finds(
    trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    library()  # as a server has the op linked in
    # The base path names the store, and other tests of this process have stores called `served`.
    words = [
        f"--model_dir={trained / 'model'}",
        f"--model_base_path={tmp_path / 'likes'}",
        f"--data={trained / 'test.parquet'}",
        f"--support={trained / 'support.parquet'}",
        "--form=adapted",
        f"--support_store={tmp_path / 'store'}",
        "--support_ttl_seconds=3600",
    ]
    asked = {"user": np.zeros(4, np.int64), "item": np.arange(4), ADAPT: np.ones(4, bool)}
    put = {
        "user": np.zeros(4, np.int64),  # who has no support yet
        "item": np.arange(4),
        "like": np.float32([1, 0, 1, 0]),
        "time": np.ones(4, np.int64),
        "event_id": np.arange(4),  # of one time
    }
    assert "largest difference" in program("export", *words)
    with session(tmp_path / "likes" / "1") as run:
        assert (run("adapted", asked)[STATUS] == NO_SUPPORT).all()
        assert not run("put_support", put)[STATUS].any()
        first = run("adapted", asked)
        assert not first[STATUS].any()
        # A folder is one process's.
        assert "error: --support_store" in program("export", *words)
    assert "largest difference" in program("export", *words)
    with session(tmp_path / "likes" / "2") as run:
        close(run("adapted", asked)["like"], first["like"])


@pytest.mark.parametrize(
    ("gains", "least"),
    [([0.1, 0.1, 0.1], 1), ([0.1, -0.1, 0.0], 5), ([-0.1, -0.1, 0.1], 5), ([0.1, 0.1, -0.1], None)],
)
def test_the_least_support_is_that_from_which_on_nothing_is_lost(
    gains: list[float], least: int | None
) -> None:
    curve = {
        k: {"plain": {"like": {"auc": 0.5}}, "adapted": {"like": {"auc": 0.5 + gain}}}
        for k, gain in zip(("1", "2", "5"), gains, strict=True)
    }
    assert adapted.least_support(curve) == least
