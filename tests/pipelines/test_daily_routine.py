"""Ten days of KuaiRand as a user scripts them, with the accidents that such days have.

Each day's file is measured by yesterday's model, trained on from it, exported, published, and
followed by online steps on the rows that come next. One day's file is replaced, one is late, one
is empty, one has its columns and the recipe its labels in another order. Everything ends right, or
is refused with one line.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zygote

from qianmo.export.saved_model import session
from qianmo.ops.library import library
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.datasets.kuairand import kuairand

pytestmark = pytest.mark.slow

ROWS = 4000  # of a day
REPLACED, LATE, EMPTY, REORDERED = 2, 4, 6, 8  # days with an accident, from 1 on
RECIPE = """
from qianmo.configs.base import base_config


def get_config(labels="is_click,long_view"):
    config = base_config()
    config.schema = {
        "features": [
            {"name": "video_id", "min_count": 3, "dim": 8, "side": "item"},
            {"name": "tab", "dim": 8},
            {"name": "watched", "max_length": 10, "table": "video_id", "min_count": 3, "dim": 8},
            {"kind": "dense", "name": "user_click_rate"},
            {"kind": "dense", "name": "log_duration"},
        ],
        "labels": tuple(labels.split(",")),
        "task_id": "user_id",
        "timestamp": "time_ms",
    }
    config.model = {
        "name": "dual_dnn",
        "interactions": {"fm": {}},
        "teacher_units": (16,),
        "student_units": (8,),
        "embedding_l2": 1e-2,
    }
    config.train.batch_size, config.train.epochs, config.train.steps_per_call = 128, 2, 1
    return config
"""


class World:
    """A folder with a file for each day, and the programs that a user runs in it."""

    def __init__(self, folder: pathlib.Path, programs: zygote.Zygote) -> None:
        self.folder = folder
        self._programs = programs
        kuairand(None, folder / "rows")
        parts = [
            pq.read_table(folder / "rows" / f"{p}.parquet") for p in ("train", "valid", "test")
        ]
        table = pa.concat_tables(parts)
        dates = table["date"].to_numpy()
        self.dates = np.unique(dates)
        self.tables = [table.filter(dates == date).slice(0, ROWS + 1000) for date in self.dates]
        (folder / "days").mkdir()
        (folder / "recipe.py").write_text(RECIPE)

    def day(self, number: int) -> pathlib.Path:
        """The path of a day's file."""
        return self.folder / "days" / f"{self.dates[number]}.parquet"

    def write(self, number: int, table: pa.Table | None = None) -> pathlib.Path:
        """A day's file arrives."""
        path = self.day(number)
        rows = self.tables[number].slice(0, ROWS) if table is None else table
        pq.write_table(rows, path.with_suffix(".writing"))
        path.with_suffix(".writing").replace(path)
        return path

    def model(self, number: int) -> pathlib.Path:
        """The model directory of a day."""
        return self.folder / "models" / str(self.dates[number])

    def run(self, program: str, *arguments: str) -> zygote.Ended:
        """Runs a program; its errors are one line."""
        ended = self._programs.run(program, *arguments, cwd=self.folder)
        if ended.code:
            errors = [x for x in ended.stderr.splitlines() if x.startswith("error: ")]
            assert len(errors) == 1, ended.stderr
            assert "Traceback" not in ended.stderr
        return ended

    def train(self, number: int, *more: str, recipe: str = "recipe.py") -> zygote.Ended:
        """Trains on a day's file, from yesterday's model."""
        start = [f"--config.train.start_from={self.model(number - 1)}"] if number else []
        return self.run(
            "train",
            f"--config={recipe}",
            f"--model_dir={self.model(number)}",
            f"--config.data.train={self.day(number)}",
            *start,
            *more,
        )

    def evaluate(self, number: int, day: int) -> dict[str, object]:
        """Measures a day's model on another day's file."""
        output = self.folder / "metrics.json"
        done = self.run(
            "evaluate",
            f"--model_dir={self.model(number)}",
            f"--data={self.day(day)}",
            f"--output={output}",
        )
        assert done.code == 0, done.stderr
        return json.loads(output.read_text())

    def versions(self) -> list[int]:
        """The versions that are published."""
        return sorted(int(p.name) for p in (self.folder / "served" / "ranker").glob("[0-9]*"))


def sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish(world: World, number: int) -> None:
    """Exports a day's model, and lets its student follow the rows that come next."""
    base = f"--model_base_path={world.folder / 'served' / 'ranker'}"
    before = world.versions()
    model, data = f"--model_dir={world.model(number)}", f"--data={world.day(number)}"
    done = world.run("export", model, base, data, "--form=store", "--rows=200")
    assert done.code == 0, done.stderr
    (exported,) = set(world.versions()) - set(before)
    assert exported > max(before, default=0)
    stream = world.folder / "stream" / str(world.dates[number])
    stream.mkdir(parents=True)
    rest = world.tables[number].slice(ROWS)
    for hour in range(2):
        pq.write_table(rest.slice(500 * hour, 500), stream / f"{hour}.parquet")
    done = world.run("online", model, base, f"--folder={stream}", "--stop_at_end")
    assert done.code == 0, done.stderr
    (online,) = set(world.versions()) - set(before) - {exported}
    report = json.loads((world.model(number) / "online" / "report.json").read_text())
    assert [entry["version"] for entry in report["published"]] == [online]
    assert report["rows"] == len(rest) // 128 * 128
    assert report["trained_on"]["train"]["sha256"] == sha256(world.day(number))


def check_served(world: World, number: int) -> None:
    """The export of a day gives the model's scores, by name of the label."""
    loaded, recipe = run_dir.load(world.model(number))
    features, _ = next(iter(readers.dataset(recipe.schema, world.day(number), batch_size=50)))
    expected = loaded.probabilities(features)["student"].numpy()
    library()  # the op that reads the store
    exported = world.versions()[-2]  # the newest is that of the online steps
    with session(world.folder / "served" / "ranker" / str(exported)) as run:
        served = run("serving_default", {k: v.numpy() for k, v in features.items()})
    for k, label in enumerate(recipe.schema.labels):
        np.testing.assert_allclose(served[label], expected[:, k], atol=1e-6)


def test_ten_days(programs: zygote.Zygote, tmp_path: pathlib.Path) -> None:
    world = World(tmp_path, programs)
    assert len(world.dates) == 11
    world.write(0)
    assert world.train(0).code == 0
    clicks = []
    for number in range(1, 11):
        if number == LATE:
            done = world.train(number)
            assert done.code == 1
            assert str(world.day(number)) in done.stderr
            assert not world.model(number).exists()
        if number == EMPTY:
            world.write(number, world.tables[number].slice(0, 0))
            done = world.train(number)
            assert done.code == 1
            assert "no rows" in done.stderr
            assert not world.model(number).exists()
        table = world.tables[number].slice(0, ROWS)
        if number == REORDERED:
            table = table.select(table.column_names[::-1])
        path = world.write(number, table)

        told = world.evaluate(number - 1, number)
        assert told["data"]["sha256"] == sha256(path)
        assert told["trained_on"]["sha256"] == sha256(world.day(number - 1))
        labels = told["metrics"]["student"]
        clicks.append(labels["is_click"]["all"]["auc"])
        assert labels["is_click"]["all"]["rate"] == pytest.approx(
            table["is_click"].to_numpy().mean(), abs=1e-9
        )

        recipe = "recipe.py:long_view,is_click" if number == REORDERED else "recipe.py"
        done = world.train(number, recipe=recipe)
        assert done.code == 0, done.stderr
        assert re.search(r"Weights from .*: embed \([\d,]+\), ", done.stdout)
        assert "starts new" not in done.stdout
        report = json.loads((world.model(number) / "report.json").read_text())
        assert report["data"]["train"]["sha256"] == sha256(path)
        assert report["rows"]["train"] == ROWS
        assert run_dir.read_recipe(world.model(number)).schema.labels == ("is_click", "long_view")

        if number == REPLACED:  # by rows with other labels, under the same name
            inverted = pa.array(1 - table["is_click"].to_numpy())
            place = table.schema.get_field_index("is_click")
            world.write(number, table.set_column(place, "is_click", inverted))
            done = world.train(number, recipe=recipe)
            assert done.code == 1
            assert "is finished; the data changed since" in done.stderr
            assert json.loads((world.model(number) / "report.json").read_text()) == report
            world.write(number, table)
            again = world.train(number, recipe=recipe)  # the old rows: nothing is left to do
            assert again.code == 0
            assert "Finished before" in again.stdout

        publish(world, number)
        if number in (1, REORDERED):
            check_served(world, number)

    assert world.versions() == sorted(set(world.versions()))
    assert len(world.versions()) == 20
    # A model that landed under other labels, or trained on nothing, would be at .5 or below.
    assert min(clicks[3:]) > 0.6
