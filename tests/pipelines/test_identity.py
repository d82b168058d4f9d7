"""Identity of data: what a run read is known, and other rows under the same name are told."""

from __future__ import annotations

import hashlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qianmo.configs.base import base_config
from qianmo.layers.schema import Schema
from qianmo.pipelines import locks, run_dir
from qianmo.pipelines.data import identity, readers
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import run as training
from qianmo.pipelines.training.run import Run, train

SCHEMA = {
    "features": [{"name": "item", "num_ids": 20, "dim": 4}, {"kind": "dense", "name": "price"}],
    "labels": ["click"],
}


def rows(count: int, seed: int, *, inverted: bool = False) -> pa.Table:
    random = np.random.default_rng(seed)
    item = random.integers(0, 20, count)
    click = random.random(count) < (item + 1) / 22
    price = random.normal(size=count).astype(np.float32)
    return pa.table({"item": item, "price": price, "click": (click ^ inverted).astype(np.int8)})


@pytest.fixture
def data(tmp_path: pathlib.Path) -> pathlib.Path:
    for seed, part in enumerate(("train", "valid", "test")):
        pq.write_table(rows(1000, seed), tmp_path / f"{part}.parquet")
    return tmp_path


def recipe(data: pathlib.Path, **train: object) -> Recipe:
    rate = {"name": "adam", "learning_rate": 0.01}
    return Recipe.from_config(
        {
            "data": {
                **{part: str(data / f"{part}.parquet") for part in ("train", "valid", "test")},
                "test_support": "",
                "shuffle_rows": 1000,
                "chunk_rows": 0,
                "chunk_tasks": 1,
                "chunks_beside": False,
            },
            "schema": SCHEMA,
            "model": {"name": "lr"},
            "train": {
                "seed": 1,
                "batch_size": 100,
                "epochs": 2,
                "optimizer": rate,
                "table_optimizer": rate,
                "meta_optimizer": rate,
                "monitor": "auc",
                "patience": 2,
                "checkpoint_every": 5,
                "steps_per_call": 1,
                "dtype_policy": "float32",
                "start_from": "",
                **train,
            },
        }
    )


def test_it_is_what_sha256sum_says(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(SCHEMA)
    one = tmp_path / "one.parquet"
    pq.write_table(rows(100, 1), one)
    found = identity.of(schema, one)
    assert found.rows == 100
    assert found.sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    folder = tmp_path / "rows"
    folder.mkdir()
    for number in range(3):
        pq.write_table(rows(10, number), folder / f"{number}.parquet")
    said = subprocess.run(
        "sha256sum *.parquet | sha256sum",
        shell=True,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    found = identity.of(schema, folder)
    assert found.sha256 == said.stdout.split()[0]
    assert found.rows == 30
    assert [f.name for f in found.files] == ["0.parquet", "1.parquet", "2.parquet"]
    assert identity.Identity.from_config(json.loads(json.dumps(found.to_config()))) == found
    assert "3 files, 30 rows" in str(found)


def test_values_in_the_names_of_folders_belong_to_it(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config({**SCHEMA, "group": "dt"})
    file = tmp_path / "dt=1" / "part.parquet"
    file.parent.mkdir()
    pq.write_table(rows(10, 1), file)
    ways = ["dt=*/*.parquet", "dt=*", "", "dt={}", "dt={}/part.parquet"]
    before = [identity.of(schema, tmp_path / way.format(1)) for way in ways]
    assert {found.sha256 for found in before} == {before[0].sha256}
    file.parent.rename(tmp_path / "dt=2")
    for way, found in zip(ways, before, strict=True):
        assert not identity.of(schema, tmp_path / way.format(2)).is_same(found), way


def test_the_same_rows_elsewhere_are_the_same_data(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(SCHEMA)
    pq.write_table(rows(100, 1), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes())
    pq.write_table(rows(100, 1, inverted=True), tmp_path / "c.parquet")
    a, b, c = (identity.of(schema, tmp_path / f"{name}.parquet") for name in "abc")
    assert a.is_same(b)
    assert not a.is_same(c)


def test_a_file_that_is_replaced_while_it_is_read_is_told(tmp_path: pathlib.Path) -> None:
    schema = Schema.from_config(SCHEMA)
    path = tmp_path / "a.parquet"
    pq.write_table(rows(100, 1), path)
    with identity.taking(schema, path) as taken:
        taken.result()
        taken.check_unchanged()
        pq.write_table(rows(90, 2), path)
        with pytest.raises(readers.DataError, match="was replaced or removed while it was in use"):
            taken.check_unchanged()
        path.unlink()
        with pytest.raises(readers.DataError, match="was replaced or removed"):
            taken.check_unchanged()


def test_a_finished_run_says_that_the_data_changed_since(data: pathlib.Path) -> None:
    found = train(recipe(data), data / "model")
    old = identity.of(Schema.from_config(SCHEMA), data / "train.parquet")
    assert found["data"]["train"]["sha256"] == old.sha256
    assert train(recipe(data), data / "model") == run_dir.plain(found)  # the same rows: done
    pq.write_table(rows(500, 9, inverted=True), data / "train.parquet")
    before = (data / "model" / "report.json").read_bytes()
    with pytest.raises(ValueError, match="is finished; the data changed since") as caught:
        train(recipe(data), data / "model")
    assert f"1,000 rows, sha256 {old.sha256[:12]} when the run began" in str(caught.value)
    assert "500 rows" in str(caught.value)
    assert "start_from" in str(caught.value)
    assert (data / "model" / "report.json").read_bytes() == before


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_run_does_not_go_on_with_other_data(
    data: pathlib.Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(training.report, "epoch_line", kill)  # after the first epoch's checkpoint
        with pytest.raises(KilledError):
            train(recipe(data), data / "model")
    original = (data / f"{part}.parquet").read_bytes()
    pq.write_table(rows(1000, 9, inverted=True), data / f"{part}.parquet")
    with pytest.raises(ValueError, match=rf"saw other data: data\.{part}"):
        train(recipe(data), data / "model")
    (data / f"{part}.parquet").write_bytes(original)
    found = train(recipe(data), data / "model")
    assert len(found["history"]) == 2


def test_a_file_replaced_between_epochs_ends_the_run(
    data: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(entry: object) -> str:
        pq.write_table(rows(1000, 9, inverted=True), data / "train.parquet")
        return ""

    monkeypatch.setattr(training.report, "epoch_line", replace)
    with pytest.raises(readers.DataError, match=r"train\.parquet: it was replaced or removed"):
        train(recipe(data), data / "model")
    assert not (data / "model" / "report.json").exists()


def test_two_trainings_in_one_directory(data: pathlib.Path) -> None:
    with locks.alone(data / "model", "trains"), pytest.raises(ValueError, match="is in use: proc"):
        train(recipe(data), data / "model")
    hold = (
        "import sys, time\n"
        "from qianmo.pipelines import locks\n"
        "with locks.alone(sys.argv[1], 'trains'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", hold, str(data / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {other.pid} trains there"):
            train(recipe(data), data / "model")
        other.kill()
        other.wait()
    train(recipe(data), data / "model")  # a killed holder's lock is gone


@pytest.mark.parametrize("damage", ["cut", "flipped", "index"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    data: pathlib.Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(recipe(data), data / "model")
    run.train()
    (data / "model" / "report.json").unlink()
    newest = pathlib.Path(run.checkpoints.latest_checkpoint)
    shard = newest.with_name(f"{newest.name}.data-00000-of-00001")
    index = newest.with_name(f"{newest.name}.index")
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 255
        shard.write_bytes(content)
    else:
        index.write_bytes(index.read_bytes()[:50])
    again = Run(recipe(data), data / "model")
    said = capsys.readouterr().out
    assert f"warning: {newest} cannot be read" in said
    assert "Going on after 1 epochs and 5 batches" in said
    again.train()
    for path in (data / "model" / "checkpoints").glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 2 checkpoints can be read"):
        Run(recipe(data), data / "model")


def test_a_run_that_ended_before_its_first_checkpoint_starts_from_the_same_weights(
    data: pathlib.Path,
) -> None:
    train(recipe(data), data / "day1")
    again = recipe(data, start_from=str(data / "day1"), seed=2)
    Run(again, data / "day2")  # stopped here
    assert (data / "day2" / "recipe.json").exists()
    taken = Run(again, data / "day2").model
    known, _ = run_dir.load(data / "day1")
    for here, there in zip(taken.trainable_variables, known.trainable_variables, strict=True):
        np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("file", ["recipe.json", "asked.json", "data.json"])
def test_a_cut_file_is_named(data: pathlib.Path, file: str) -> None:
    train(recipe(data), data / "model")
    path = data / "model" / file
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=rf"{file} cannot be read as JSON"):
        train(recipe(data), data / "model")


def test_damaged_weights_are_named(data: pathlib.Path) -> None:
    train(recipe(data), data / "model")
    run_dir.load(data / "model")
    (shard,) = (data / "model" / "weights").glob("*.data*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read into the model of"):
        run_dir.load(data / "model")


def test_hashing_costs_no_second_pass_of_the_reader(
    data: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are decoded once before the first step, however many things want to know of them."""
    read: list[str] = []
    blocks = readers.blocks

    def counted(schema: Schema, path: readers.PathLike, **options: object) -> object:
        read.append(pathlib.Path(path).name)
        return blocks(schema, path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(readers, "blocks", counted)
    Run(recipe(data), data / "model")
    assert sorted(read) == ["train.parquet", "valid.parquet"]


@pytest.mark.parametrize("text", ["[]", '{"train": 3}', '{"train": {"path": "a"}}', "[" * 100_000])
@pytest.mark.parametrize(
    ("name", "read"),
    [("data.json", run_dir.read_identities), ("look.json", run_dir.read_looks)],
)
def test_a_file_of_a_run_that_holds_something_else_is_named(
    tmp_path: pathlib.Path, name: str, read: Callable[[pathlib.Path], object], text: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{tmp_path / name} .*It was cut or changed\."):
        read(tmp_path)


def test_a_recipe_with_a_number_beyond_floats_is_named(tmp_path: pathlib.Path) -> None:
    feature = {"kind": "dense", "name": "x", "mean": 10**400, "variance": 1.0}
    config = base_config().to_dict()
    config |= {"schema": {"features": [feature], "labels": ["y"]}, "model": {"name": "mlp"}}
    run_dir.write_json(tmp_path / "recipe.json", config)
    with pytest.raises(ValueError, match=rf"{tmp_path / 'recipe.json'} is no recipe: int too larg"):
        run_dir.read_recipe(tmp_path)
