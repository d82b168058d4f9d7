"""The C++ cores without TensorFlow, compiled into programs of their own."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-iquote", str(ROOT)]


def sources(program: pathlib.Path) -> list[str]:
    """The program, and x.cc of every header x.h that it includes, directly or through others."""
    found, new = set(), {program}
    while new:
        path = new.pop()
        found.add(path)
        for name in re.findall(r'^#include "(ops/cc/\w+)\.h"', path.read_text(), re.MULTILINE):
            both = {ROOT / f"{name}.h", ROOT / f"{name}.cc"}
            new |= {path for path in both if path.is_file()} - found
    return sorted(str(path) for path in found if path.suffix == ".cc")
