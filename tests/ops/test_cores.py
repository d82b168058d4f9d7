"""The C++ cores without TensorFlow: each ops/cc/x_test.cc with its cores, under the sanitizers."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = sorted(ROOT.glob("ops/cc/**/*_test.cc"))
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-iquote", str(ROOT)]


def sources(test: pathlib.Path) -> set[pathlib.Path]:
    """The test, and x.cc of every header x.h that it includes, directly or through others."""
    found, new = set(), {test}
    while new:
        path = new.pop()
        found.add(path)
        for name in re.findall(r'^#include "(ops/cc/\w+)\.h"', path.read_text(), re.MULTILINE):
            both = {ROOT / f"{name}.h", ROOT / f"{name}.cc"}
            new |= {path for path in both if path.is_file()} - found
    return {path for path in found if path.suffix == ".cc"}


def runs() -> list[tuple[pathlib.Path, str]]:
    """Each test for memory and arithmetic; those with threads for races as well."""
    threaded = [test for test in TESTS if "#include <thread>" in test.read_text()]
    return [(test, "address,undefined") for test in TESTS] + [(t, "thread") for t in threaded]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize(("test", "sanitizer"), runs(), ids=lambda x: getattr(x, "stem", x))
def test_core(test: pathlib.Path, sanitizer: str, tmp_path: pathlib.Path) -> None:
    program = tmp_path / test.stem
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover"]
    files = [str(path) for path in sorted(sources(test))]
    subprocess.run(["g++", *FLAGS, *sanitize, *files, "-o", str(program)], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
