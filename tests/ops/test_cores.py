"""The C++ cores without TensorFlow: each ops/cc/x_test.cc with its cores, under the sanitizers."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest
from cores import FLAGS, ROOT, sources

TESTS = sorted(ROOT.glob("ops/cc/**/*_test.cc"))


def runs() -> list[tuple[pathlib.Path, str]]:
    """Each test for memory and arithmetic; those with threads for races as well."""
    threaded = [test for test in TESTS if "#include <thread>" in test.read_text()]
    return [(test, "address,undefined") for test in TESTS] + [(t, "thread") for t in threaded]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize(("test", "sanitizer"), runs(), ids=lambda x: getattr(x, "stem", x))
def test_core(test: pathlib.Path, sanitizer: str, tmp_path: pathlib.Path) -> None:
    program = tmp_path / test.stem
    sanitize = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover"]
    subprocess.run(["g++", *FLAGS, *sanitize, *sources(test), "-o", str(program)], check=True)
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
