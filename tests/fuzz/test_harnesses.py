"""The harnesses in Python, for seconds: on seeds and on mutations that no coverage guides."""

from __future__ import annotations

import importlib
import pathlib
import random

import pytest
from fuzz import run
from fuzz.choices import mutated

# Mutations: hundreds where a read takes milliseconds, few where it begins with a tf.data pipeline.
RUNS = {"tfrecord": 20, "parquet": 600, "csv": 2000}


def test_every_harness_is_run() -> None:
    here = pathlib.Path(__file__).parent
    assert {path.stem for path in here.glob("fuzz_*.py")} == {f"fuzz_{t}" for t in run.PYTHON}
    assert {path.stem for path in here.glob("*_fuzz.cc")} == {f"{t}_fuzz" for t in run.NATIVE}


@pytest.mark.parametrize("target", run.PYTHON)
def test_harness(target: str, tmp_path: pathlib.Path) -> None:
    harness = importlib.import_module(f"fuzz.fuzz_{target}")
    seeds = harness.seeds()
    generator = random.Random(0)
    inputs = seeds[:40] if target == "tfrecord" else list(seeds)
    inputs += [mutated(generator, generator.choice(seeds)) for _ in range(RUNS.get(target, 2000))]
    outcomes = {harness.check(data, tmp_path) for data in inputs}
    # Inputs that are all refused, or all read, would test little.
    assert outcomes >= {"read", "refused"}
