"""Small real data, recipes and models, on which every program ends within seconds."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qianmo.pipelines import run_dir
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.preparing import completed

USERS, ITEMS, NEW_ITEMS = 40, 30, 6
FILES = {"train": 512, "support": 256, "test": 256}

RECIPE = '''"""The recipes; their variants are models."""

import pathlib

from qianmo.configs.base import base_config

DATA = pathlib.Path(__file__).parent / "data"
PLAIN = {"name": "mlp", "units": (4,)}
MODELS = {
    "plain": PLAIN,
    "single_1": PLAIN,
    "single_2": PLAIN,
    "dual": {
        "name": "dual_dnn",
        "interactions": {"fm": {}},
        "teacher_units": (4,),
        "student_units": (4,),
    },
    "meta": {
        **PLAIN,
        "seam_dim": 4,
        "tower_units": (4,),
        "meta": {"inner": {"steps": 1, "step_size": 0.5}},
    },
}


def get_config(variant="plain"):
    config = base_config()
    config.data.train = str(DATA / "train.parquet")
    config.data.test = str(DATA / "test.parquet")
    config.schema = {
        "features": [
            {"name": "user", "num_ids": 40, "dim": 4, "side": "user"},
            {"name": "item", "num_ids": 30, "dim": 4, "side": "item"},
            {"name": "kind", "dim": 4, "side": "item"},
            {"name": "scene", "vocabulary": (1, 2), "dim": 4},
            {"kind": "dense", "name": "price"},
        ],
        "labels": ("click",),
        "task_id": "user",
        "timestamp": "time",
        "domain": "scene",
    }
    if variant.startswith("single_"):
        config.schema.only_domains = (int(variant[-1]),)
    if variant == "meta":
        config.data.test_support = str(DATA / "support.parquet")
    config.model = MODELS[variant]
    config.train.epochs = 2
    config.train.batch_size = 64
    config.train.steps_per_call = 1
    config.train.checkpoint_every = 2
    return config
'''


def write_rows(path: pathlib.Path, count: int, seed: int) -> None:
    """Rows of two scenes in order of time, whose clicks depend on user and item."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, USERS, count), random.integers(0, ITEMS - NEW_ITEMS, count)
    columns = {
        "user": user,
        "item": item,
        "kind": item % 4,
        "scene": random.integers(1, 3, count),
        "price": random.normal(size=count).astype(np.float32),
        "click": ((user + item + random.integers(0, 3, count)) % 2).astype(np.int8),
        "time": 1_000_000 * seed + np.arange(count),
    }
    pq.write_table(pa.table(columns), path)


def write_data(folder: pathlib.Path) -> None:
    """The files that the recipes name, and a row for each item."""
    folder.mkdir()
    for seed, (name, count) in enumerate(FILES.items(), 1):
        write_rows(folder / f"{name}.parquet", count, seed)
    items = pa.table({"item": np.arange(ITEMS), "kind": np.arange(ITEMS) % 4})
    pq.write_table(items, folder / "items.parquet")


def write_movielens(folder: pathlib.Path) -> None:
    """Ratings in GroupLens's format: fields between two colons, Latin-1."""
    folder.mkdir()
    ratings = [(1 + i % 3, 1 + i % 2, 1 + i % 5, 1000 - i) for i in range(50)]
    lines = ["::".join(map(str, row)) for row in ratings]
    (folder / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    users = "1::F::1::10::48067\n2::M::56::16::70072-1\n3::M::25::15::00231\n"
    (folder / "users.dat").write_text(users, encoding="latin-1")
    movies = "1::Léon: a (b) (1994)::Crime|Drama\n2::Toy Story (1995)::Animation\n"
    (folder / "movies.dat").write_text(movies, encoding="latin-1")


def make(folder: pathlib.Path) -> None:
    """Writes data, recipes, ratings, and a model directory of each variant with its first weights.

    What the programs do with a model does not depend on whether it has learned.
    """
    write_data(folder / "data")
    write_movielens(folder / "ml-1m")
    (folder / "recipe.py").write_text(RECIPE)
    spec = importlib.util.spec_from_file_location("recipe", folder / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for variant in module.MODELS:
        recipe = completed(Recipe.from_config(module.get_config(variant).to_dict()))
        run_dir.write(folder / variant, run_dir.build(recipe), recipe)
