"""The harnesses in C++, for seconds: on seeds and on mutations that no coverage guides."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
from cores import FLAGS, ROOT, sources
from fuzz import run, store_seeds

RUNS = 1000


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("target", run.NATIVE)
def test_native_harness(target: str, tmp_path: pathlib.Path) -> None:
    here = ROOT / "tests" / "fuzz"
    program = tmp_path / "harness"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]
    files = [*sources(here / f"{target}_fuzz.cc"), str(here / "replay.cc")]
    subprocess.run(["g++", *FLAGS, *sanitize, *files, "-o", str(program)], check=True)
    names = []
    for number, seed in enumerate(store_seeds.of(target)):
        (tmp_path / str(number)).write_bytes(seed)
        names.append(str(tmp_path / str(number)))
    ran = subprocess.run([program, str(RUNS), *names], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{RUNS} mutations of {len(names)} seeds\n"
