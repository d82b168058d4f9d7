"""Proposed recipes: what each kind of column becomes, and that they train as they are."""

from __future__ import annotations

import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zygote
from row_files import WRITERS

from qianmo.export import publishing
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import recipe_text, sample
from qianmo.pipelines.data.errors import DataError
from qianmo.pipelines.data.propose import Proposal, propose
from qianmo.pipelines.datasets import kuairand
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import train


def proposed(columns: dict[str, Any], **arguments: Any) -> Proposal:
    return propose(pa.table(columns), **arguments)


def entries(proposal: Proposal) -> dict[str, dict[str, Any]]:
    return {
        line.name: {k: v for k, v in line.entry.items() if k != "name"}
        for line in proposal.features
    }


def trained(file: pathlib.Path, folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
    """Trains a recipe's file as it is, but for a smaller batch."""
    config = runpy.run_path(str(file))["get_config"]()
    config.train.batch_size = 128
    config.train.optimizer.learning_rate = config.train.table_optimizer.learning_rate = 5e-3
    config.train.update(changes)
    found: dict[str, Any] = train(Recipe.from_config(config.to_dict()), folder)
    return found


def write(proposal: Proposal, path: pathlib.Path, output: pathlib.Path) -> pathlib.Path:
    publishing.write_text(output, recipe_text.text(proposal, str(path)))
    return output


@pytest.fixture(scope="module")
def kuairand_rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("kuairand")
    kuairand.kuairand(None, folder / "made")
    path: pathlib.Path = folder / "rows.parquet"
    whole = pq.read_table(folder / "made" / "train.parquet")
    pq.write_table(whole.slice(50_000, 40_000), path, row_group_size=5000)
    return path


def test_kuairand(kuairand_rows: pathlib.Path, tmp_path: pathlib.Path) -> None:
    proposal = propose(sample.read(kuairand_rows, 30_000))
    assert proposal.rows == 30_000
    found = entries(proposal)
    assert found["video_id"]["side"] == "item"
    for name in ("watched", "long_watched"):
        assert found[name]["table"] == "video_id"
        assert found[name]["max_length"] == 20
    assert found["tags"]["table"] == "tag"
    assert found["user_active_degree"] == {"dtype": "string", "side": "user"}
    assert found["log_duration"] == {"kind": "dense"}
    assert found["tab"] == {}
    assert [line.name for line in proposal.labels] == ["is_click"]
    roles = {"timestamp": "time_ms", "timestamp_unit": "ms", "task_id": "user_id"}
    assert proposal.roles == roles
    outcomes = {"long_view", "is_like", "is_follow", "is_profile_enter"}
    assert set(proposal.left_out) == outcomes | {"user_id", "time_ms", "date"}
    for name in outcomes:
        assert "named like an outcome, known only after the row" in proposal.left_out[name]
    assert "would learn the training rows by heart" in proposal.left_out["user_id"]
    assert "a day: rows to come have later ones" in proposal.left_out["date"]
    assert proposal.notes == ["`tab` may be the `domain`: metrics are then given by it."]

    report = trained(write(proposal, kuairand_rows, tmp_path / "recipe.py"), tmp_path / "run")
    assert report["rows"]["train"] == 40_000
    assert report["history"][0]["train"]["loss"] < 0.62  # 0.69 without features


def movielens_rows(count: int = 4000) -> dict[str, Any]:
    """Columns as of MovieLens, whose label follows from users and films."""
    random = np.random.default_rng(0)
    user, film = random.integers(1, 100, count), random.integers(1, 300, count)
    taste, quality = random.normal(size=(2, 400))
    rating = np.clip(np.round(3.3 + taste[user] + quality[film]), 1, 5).astype(np.int64)
    return {
        "user_id": user,
        "movie_id": film,
        "gender": np.where(user % 3 > 0, "M", "F"),
        "age": np.array([1, 18, 25, 35])[user % 4],
        "zip_code": [f"{value:05d}" for value in user * 131],
        "genres": [["Drama", "Crime", "War"][: value % 4] for value in film],
        "year": 1950 + film % 50,
        "rating": rating,
        "liked": (rating >= 4).astype(np.int8),
        "timestamp": 956_703_932 + np.arange(count) * 60,
    }


def test_movielens(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(movielens_rows()), path)
    proposal = propose(sample.read(path, 10_000))
    found = entries(proposal)
    assert found == {
        "user_id": {"side": "user"},
        "movie_id": {"side": "item"},
        "gender": {"dtype": "string"},
        "age": {},
        "zip_code": {"dtype": "string"},
        "genres": {"dtype": "string", "max_length": 3},
        "year": {},
    }
    assert list(proposal.left_out) == ["rating", "timestamp"]
    assert [line.name for line in proposal.labels] == ["liked"]
    assert proposal.roles["timestamp_unit"] == "s"
    report = trained(write(proposal, path, tmp_path / "recipe.py"), tmp_path / "run", epochs=3)
    losses = [epoch["train"]["loss"] for epoch in report["history"]]
    assert losses[-1] < 0.3 < losses[0]
    # The ratings as the label, where they are asked for; then the likes tell too much.
    proposal = propose(sample.read(path, 10_000), labels=["rating"])
    assert proposal.schema()["label_kinds"] == {"rating": "rating"}
    assert proposal.labels[0].why == "1 to 5."
    assert "named like an outcome" in proposal.left_out["liked"]


CSV_ROWS = 600


def csv_rows() -> list[dict[str, Any]]:
    random = np.random.default_rng(1)
    rows = []
    for i in range(CSV_ROWS):
        bought = random.integers(2)
        rows.append(
            {
                "row": 10_000 + i,
                "customer": f"c{random.integers(12)}",
                "sku": random.integers(40),
                "seen": [int(v) for v in random.integers(40, size=random.integers(5))],
                "code": f"0{random.integers(100):03d}",
                "big": 2**64 + int(random.integers(3)),
                "price": None if i % 7 == 0 else round(float(random.normal() + bought), 3),
                "stock": None if i % 9 == 0 else int(random.integers(4)),
                "source": None if i % 50 == 0 else ["web", "app"][random.integers(2)],
                "country": "FR",
                "nothing": None,
                "first name": "x",
                "at": f"2024-05-{1 + i // 30:02d}T12:30:{i % 60:02d}+02:00",
                "bought": None if i % 11 == 0 else bought,
                "watch_time": float(random.random()),
                "note": f"a long text that no one has written twice, number {i}",
            }
        )
    return rows


def test_a_csv(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.csv"
    WRITERS["csv"](path, csv_rows())
    proposal = propose(sample.read(path, 10_000))
    assert entries(proposal) == {
        "customer": {"dtype": "string", "side": "user"},
        "sku": {"side": "item"},
        "seen": {"max_length": 4, "table": "sku", "default": ()},
        "code": {"dtype": "string"},
        "big": {"dtype": "string"},
        "price": {"kind": "dense", "indicator": True, "side": "item"},
        "stock": {"default": -1},
        "source": {"dtype": "string", "default": ""},
    }
    left_out = proposal.left_out
    assert left_out["row"] == "it differs in every row, so no value of it is met again."
    assert left_out["country"] == "it is 'FR' in all rows."
    assert left_out["nothing"] == "it holds nothing."
    assert left_out["first name"].startswith("its name can be no input of a served model")
    assert left_out["at"].startswith("a time")
    assert left_out["watch_time"].startswith("named like an outcome")
    assert left_out["note"] == left_out["row"]
    roles = {"timestamp": "at", "task_id": "customer", "task_dtype": "string"}
    assert proposal.roles == roles
    schema = proposal.schema()
    assert schema["optional_labels"] == ("bought",)
    assert "`row` may be the `event_id`, which tells a task's rows apart." in proposal.notes
    report = trained(write(proposal, path, tmp_path / "recipe.py"), tmp_path / "run", epochs=3)
    assert report["rows"]["train"] == CSV_ROWS
    losses = [epoch["train"]["loss"] for epoch in report["history"]]
    assert losses[-1] < losses[0]
    # A time and an event that tell rows apart can be declared as the notes say.
    Schema.from_config({**schema, "event_id": "row"})


def test_a_tfrecord_says_the_same_as_parquet(tmp_path: pathlib.Path) -> None:
    columns = movielens_rows(1000)
    rows = [
        {name: v[i].item() if isinstance(v, np.ndarray) else v[i] for name, v in columns.items()}
        for i in range(1000)
    ]
    for extension in ("tfrecord", "parquet"):
        WRITERS[extension](tmp_path / f"a.{extension}", rows)
    first, second = (
        propose(sample.read(tmp_path / f"a.{extension}", 10_000))
        for extension in ("tfrecord", "parquet")
    )
    assert len(first.features) == 6
    assert sorted(map(str, first.schema()["features"])) == sorted(
        map(str, second.schema()["features"])
    )
    assert first.roles == second.roles


def test_partitions_are_columns_too(tmp_path: pathlib.Path) -> None:
    for day in (1, 2, 3):
        folder = tmp_path / f"dt=2024-05-0{day}" / f"scene={day % 2}"
        folder.mkdir(parents=True)
        pq.write_table(
            pa.table({"item": [1, 2, 3], "click": [0, 1, day % 2]}), folder / "a.parquet"
        )
    proposal = propose(sample.read(tmp_path, 100))
    assert entries(proposal) == {"item": {"side": "item"}, "scene": {}}
    assert proposal.roles == {"timestamp": "dt"}
    assert proposal.rows == 9
    found = propose(sample.read(tmp_path, 100), domain="scene")
    assert found.roles["domain"] == "scene"


def test_a_sample_is_of_all_files(tmp_path: pathlib.Path) -> None:
    for number in range(20):
        table = pa.table({"x": [number] * 1000})
        pq.write_table(table, tmp_path / f"{number:02d}.parquet", row_group_size=100)
    read = sample.read(tmp_path, 5000)
    assert len(read) == 5000
    assert len(read["x"].unique()) > 15
    assert len(sample.read(tmp_path, 10**9)) == 20_000


def many(count: int = 2000, **columns: Any) -> dict[str, Any]:
    random = np.random.default_rng(2)
    return {
        "click": random.integers(0, 2, count),
        "item": random.integers(0, 9, count),
        **columns,
    }


def test_columns_that_tell_the_label_stay_out() -> None:
    click = many()["click"]
    random = np.random.default_rng(3)
    noise = random.normal(size=2000)
    proposal = proposed(
        many(
            copy=np.where(click > 0, "yes", "no"),
            near=click + 0.1 * noise,
            code=click * 3 + random.integers(0, 3, 2000),
            fair=0.5 * click + noise,
            ids=random.integers(0, 1900, 2000),
        )
    )
    assert set(proposal.left_out) == {"copy", "near", "code"}
    for name, area in (("copy", "1.000"), ("code", "1.000"), ("near", "1.000")):
        why = f"alone it tells `click`, with AUC {area}: it may follow from it."
        assert proposal.left_out[name] == why
    rating = random.integers(1, 6, 2000)
    proposal = proposed({"stars": rating, "item": rating % 2, "twice": 2.0 * rating + 0.01 * noise})
    assert [line.name for line in proposal.labels] == ["stars"]
    assert "with correlation 1.000" in proposal.left_out["twice"]
    assert proposal.schema()["label_kinds"] == {"stars": "rating"}


def test_text_stays_out() -> None:
    texts = [
        f"words that hardly anyone has written before, number {i // 2 * 2}" for i in range(200)
    ]
    proposal = proposed({"click": [0, 1, 1, 0] * 50, "item": [1, 2] * 100, "title": texts})
    assert "title" in entries(proposal)  # each is there twice
    texts[::2] = [f"{text} and more" for text in texts[::2]]
    texts[0] = texts[1]
    proposal = proposed({"click": [0, 1, 1, 0] * 50, "item": [1, 2] * 100, "title": texts})
    assert re.match("text of [0-9]+ bytes on average, seldom", proposal.left_out["title"])


def test_few_rows_accuse_nobody() -> None:
    proposal = proposed({"click": [0, 1] * 20, "item": [3, 4] * 20})
    assert entries(proposal) == {"item": {"side": "item"}}


def test_what_a_null_becomes_is_no_value_of_the_column() -> None:
    proposal = proposed(
        many(
            3,
            click=[0, 1, 1],
            a=[None, -1, -2],
            b=[None, "", "none"],
            c=pa.array([[1], [None], None], pa.list_(pa.int64())),
            d=pa.array([1.5, None, float("nan")]),
            e=pa.array(["x", None, "y"]).dictionary_encode(),
        )
    )
    found = entries(proposal)
    assert found["a"]["default"] == -3
    assert found["b"]["default"] == "none 0"
    assert found["c"]["default"] == ()
    assert found["d"] == {"kind": "dense", "indicator": True}
    assert found["e"] == {"dtype": "string", "default": ""}
    assert [line.why for line in proposal.features if line.name == "d"] == [
        "1.5 to 1.5, 67 % null."
    ]


def test_whole_numbers_stored_as_floats_are_dense_and_say_why() -> None:
    proposal = proposed(many(3, click=[0, 1, 1], a=pa.array([1.0, None, 7.0])))
    (line,) = (line for line in proposal.features if line.name == "a")
    assert line.entry == {"name": "a", "kind": "dense", "indicator": True}
    assert "as int64 with nulls they could be categories" in line.why


def test_large_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qianmo.pipelines.data.propose._MANY_VALUES", 1500)
    rare = np.arange(2000) // 2 + 5000
    values = many(4000, often_id=np.arange(4000) % 1300, rare_id=np.r_[rare, rare + 5000])
    found = entries(proposed(values))
    assert found["often_id"] == {"min_count": 3}
    assert found["rare_id"] == {"hash_buckets": 2048}
    monkeypatch.setattr("qianmo.pipelines.data.propose._MANY_VALUES", 2**20)
    assert entries(proposed(values))["rare_id"] == {}  # of counts of three none would be left


REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no label": ({"a": [1, 2], "b": [0, 1]}, {}, "Name it by --label. These hold 0 and 1: b."),
    "no binary column": ({"a": [1, 2]}, {}, "No column holds 0 and 1 alone."),
    "unknown label": ({"click": [0, 1]}, {"labels": ["clik"]}, "`clik`; did you mean `click`?"),
    "unknown task": ({"click": [0, 1]}, {"task_id": "xyz"}, "no column `xyz`; it holds: click."),
    "a label of strings": ({"click": ["a", "b"]}, {"labels": ["click"]}, "should hold numbers"),
    "no feature": ({"click": [0, 1], "note": [None, None]}, {}, "no column could be a feature"),
    "names that meet": (
        {"click": [0, 1], "Age": [1, 2], "age": [3, 4]},
        {},
        "Names should differ by more than case",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    columns, arguments, message = REFUSALS[case]
    with pytest.raises(DataError) as error:
        proposed(columns, **arguments)
    assert message in str(error.value)


def test_tables_that_cannot_be_sampled(tmp_path: pathlib.Path) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.int64())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows"):
        sample.read(tmp_path, 10)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="columns differ between files"):
        sample.read(tmp_path, 10)


def test_the_text_is_a_formatted_program(tmp_path: pathlib.Path) -> None:
    """As ruff formats it, and the same schema when it is run."""
    long = {f"a_rather_long_name_of_a_feature_number_{i}": ["x", None] * 100 for i in range(3)}
    proposal = proposed(
        {"click": [0, 1] * 100, "like": [0, 1] * 100, "q": ['"', "\\"] * 100, **long},
        labels=["click"],
    )
    file = write(proposal, pathlib.Path('/rows/"a\\b'), tmp_path / "recipe.py")
    config = runpy.run_path(str(file))["get_config"]()
    assert config.data.train == '/rows/"a\\b'
    plain = json.loads(json.dumps(proposal.schema()))
    assert json.loads(json.dumps(config.schema.to_dict())) == plain
    ruff = shutil.which("ruff", path=str(pathlib.Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("no ruff here")
    for command in (["format", "--check", "--line-length=100"], ["check", "--select=E,F,I,D1"]):
        done = subprocess.run([ruff, *command, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + file.read_text()


def test_the_program(tmp_path: pathlib.Path, programs: zygote.Zygote) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table(movielens_rows(500)), path)

    def run(*arguments: str) -> zygote.Ended:
        return programs.run("schema", f"--data={path}", *arguments)

    printed = run().stdout
    assert printed.startswith('"""A recipe that qianmo-schema proposes.')
    assert f'config.data.train = "{path}"' in printed
    output = tmp_path / "recipe.py"
    done = run(f"--output={output}", "--rows=100", "--label=liked")
    assert done.code == 0, done.stderr
    assert done.stdout == (
        f"{output}: 6 features for liked; 3 columns stay out, and its comments say why.\n"
    )
    assert "what 100 rows look like" in output.read_text()
    again = run(f"--output={output}")
    assert again.code == 1
    assert "exists. Give another --output, or delete it." in again.stderr
    assert "no column `nope`" in run("--label=nope").stderr
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
