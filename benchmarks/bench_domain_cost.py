"""What one model of five domains costs beside one model for each, and a plain one for all.

KuaiRand's five largest tabs, the recipes of configs/kuairand_domains.py, weights as initialised:
costs do not depend on them. A pass is a number of steps times the median time of a step, on batches
of 1,024 impressions that are in memory; models take turns. (The recipes train models of small tabs
with batches of 128, with which a pass takes longer.) Keys are the distinct table rows that 1,024
impressions read; each single model reads its own. Bytes moved are those of weights and moments that
a step, or one of each single model, reads and writes. Artefacts are in_graph exports; memory is
what a process with TensorFlow and its session loader running takes more after it loaded them and
answered 1,024 rows once.

Then the assembly with 2 to 32 domains, which rows belong to at random, the first ones to more.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import numpy as np
import tensorflow as tf

from qianmo.configs import kuairand_domains as recipes
from qianmo.export.saved_model import export_in_graph
from qianmo.layers.features import Categorical
from qianmo.layers.schema import Schema
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.evaluation import cost
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import runtime

DOMAIN_ID, PLAIN, ASSEMBLY = "domain_id", "cross_domain_plain_tower", "cross_domain"
NAMES = {
    DOMAIN_ID: "one model, tab as a feature",
    PLAIN: "shared + own experts, gate, plain tower",
    ASSEMBLY: "shared + own experts, gate, star tower",
}
SINGLES = [f"single_{tab}" for tab in recipes.TABS]
NUM_DOMAINS = (2, 8, 32)
BATCH = 1024
# Loads models and answers one request of each; prints the megabytes that this took.
LOADER = """
import contextlib, sys
import numpy as np
from qianmo.export.saved_model import session

def megabytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

def ask(folder):
    own = {k: v for k, v in rows.items() if k != "tab" or "single" not in folder}
    stack.enter_context(session(folder))("serving_default", own)

rows = dict(np.load(sys.argv[1]))
with contextlib.ExitStack() as stack:
    ask(sys.argv[2])
    before = megabytes()
    for folder in sys.argv[3:]:
        ask(folder)
    print(megabytes() - before)
"""


def training(recipe: Recipe, held: int) -> cost.Training:
    """Steps of a recipe's model as initialised."""
    return cost.Training(run_dir.build(recipe), recipe, cost.first_batches(recipe, held))


def recipe_of(variant: str, folder: pathlib.Path, counted: Schema | None = None) -> Recipe:
    """A variant's recipe on the prepared rows, with its vocabularies."""
    config = common.point(recipes.get_config(variant), folder, valid=False)
    config.train.batch_size = BATCH
    recipe = Recipe.from_config(config.to_dict())
    schema = counted or statistics.complete(recipe.schema, recipe.data.train)
    return dataclasses.replace(recipe, schema=schema)


def with_domains(recipe: Recipe, count: int) -> tuple[Recipe, Any]:
    """The recipe with so many domains, and what draws one for each row."""
    features = [
        dataclasses.replace(f, vocabulary=tuple(range(count)))
        if isinstance(f, Categorical) and f.name == "tab"
        else f
        for f in recipe.schema.features
    ]
    schema = dataclasses.replace(recipe.schema, features=tuple(features))
    random = np.random.default_rng(1)

    def changed(x: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        drawn = (count * random.random(len(x["tab"])) ** 2).astype(np.int64)
        return {**x, "tab": tf.constant(drawn)}

    return dataclasses.replace(recipe, schema=schema), changed


def seconds(trainings: dict[Any, cost.Training], repeats: int) -> dict[Any, float]:
    """Median seconds of a step of each, which take turns."""
    calls = {name: one.step for name, one in trainings.items()}
    return {k: float(np.median(v)) for k, v in cost.times(calls, repeats).items()}


def memory(rows: dict[str, np.ndarray], small: pathlib.Path, folders: Sequence[Any]) -> float:
    """Megabytes that a process takes for the models in the folders."""
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, **rows)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-c", LOADER, file.name, str(small), *map(str, folders)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
    return float(done.stdout.split()[-1])


def run(*, quick: bool) -> dict[str, Any]:
    """Five tabs in one model and in five, then many domains in one."""
    runtime.settle()
    folder = common.kuairand()
    repeats, held = (2, 4) if quick else (12, 20)
    five = recipe_of(ASSEMBLY, folder)
    made = {
        name: training(recipe_of(name, folder, five.schema), held)
        for name in (DOMAIN_ID, PLAIN, ASSEMBLY)
    }
    singles = SINGLES[2:4] if quick else SINGLES
    made |= {name: training(recipe_of(name, folder), held) for name in singles}
    step = seconds(made, repeats)
    rows: dict[str, np.ndarray] = {}
    size, megabytes, batches = {}, {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for name, one in made.items():
            x, _ = one.batches[0]
            if not rows:
                columns = {k: v.numpy() for k, v in x.items()}
                rows = {k: v.astype("S") if v.dtype == object else v for k, v in columns.items()}
            replayed = {k: v.numpy()[:100] for k, v in x.items()}
            base = pathlib.Path(temporary) / name
            folders[name], _ = export_in_graph(one.model, base, replayed)
            size[name] = cost.size_of(folders[name])
            count = readers.count_rows(one.recipe.schema, one.recipe.data.train)
            batches[name] = -(-count // BATCH)
        small = folders[singles[-1]]
        for name in (DOMAIN_ID, PLAIN, ASSEMBLY):
            megabytes[name] = memory(rows, small, [folders[name]])
        megabytes["singles"] = memory(rows, small, [folders[name] for name in singles])
    whole = [x for x, _ in made[DOMAIN_ID].batches]
    keys = {name: cost.mean_keys(made[name].model, whole) for name in NAMES}
    for name in singles:  # what it reads for the rows of its tab
        tab = int(name.rpartition("_")[2])
        parts = [{k: tf.boolean_mask(v, x["tab"] == tab) for k, v in x.items()} for x in whole]
        keys[name] = cost.mean_keys(made[name].model, parts)

    def row(title: str, names: Sequence[str], held_megabytes: float) -> dict[str, Any]:
        numbers = [cost.parameters(made[name].model) for name in names]
        return {
            "model": title,
            "dense parameters": sum(n["dense"] for n in numbers),
            "parameters of tables": sum(n["tables"] for n in numbers),
            "keys of 1,024 rows": round(sum(sum(keys[name].values()) for name in names)),
            "MB moved": sum(made[name].bytes_moved(keys[name]) for name in names) / 1e6,
            "ms a step": 1e3 * sum(step[name] for name in names),
            "s a pass": sum(step[name] * batches[name] for name in names),
            "MB of artefacts": sum(size[name] for name in names) / 1e6,
            "MB in serving": held_megabytes,
        }

    table = [row(NAMES[name], [name], megabytes[name]) for name in NAMES]
    table.append(row("one model per tab, all five", singles, megabytes["singles"]))
    fused, alone = table[2], table[3]
    ratios = {key: fused[key] / alone[key] for key in fused if key != "model"}
    table.append({"model": "the assembly / all five", **ratios})
    many, first = {}, {}
    for count in NUM_DOMAINS[::2] if quick else NUM_DOMAINS:
        recipe, changed = with_domains(five, count)
        drawn = [(changed(x), y) for x, y in cost.first_batches(recipe, held)]
        many[count] = cost.Training(run_dir.build(recipe), recipe, drawn)
        start = time.perf_counter()
        many[count].step()
        first[count] = time.perf_counter() - start
    step_of = seconds(many, repeats)
    for count, one in many.items():
        table.append(
            {
                "model": f"the assembly with star tower, {count} domains",
                "dense parameters": cost.parameters(one.model)["dense"],
                "ms a step": 1e3 * step_of[count],
                "s to the first step": first[count],
            }
        )
    targets = {
        "step, the assembly / tab as a feature": common.target(
            step[ASSEMBLY] / step[DOMAIN_ID], 1.6, at_most=True
        ),
        "step, 32 domains / 2 domains": common.target(step_of[32] / step_of[2], 1.5, at_most=True),
    }
    return {"data_sha256": common.sha256(folder), "rows": table, "targets": targets}
