"""The C++ cores without TensorFlow: each ops/cc/x_test.cc with x.cc, under the sanitizers."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = sorted(ROOT.glob("ops/cc/**/*_test.cc"))
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-iquote", str(ROOT)]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("test", TESTS, ids=lambda path: path.stem)
def test_core(test: pathlib.Path, tmp_path: pathlib.Path) -> None:
    core = test.with_name(test.name.replace("_test.cc", ".cc"))
    program = tmp_path / test.stem
    sources = [str(path) for path in (test, core) if path.is_file()]
    subprocess.run(["g++", *FLAGS, *SANITIZE, *sources, "-o", str(program)], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
