"""Rules on the source tree: who may import whom, what may be committed, tables that are current."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Room -> rooms it may import besides itself.
MAY_IMPORT = {
    "ops": set(),
    "layers": {"ops"},
    "models": {"layers", "ops"},
    "export": {"layers", "models", "ops"},
    "pipelines": {"configs", "export", "layers", "models", "ops"},
    "configs": set(),
}
SOURCES = [path for room in MAY_IMPORT for path in sorted(ROOT.glob(f"{room}/**/*.py"))]

# Split in two, so that this file does not hold what it forbids.
MACHINE_PATH = re.compile(r"(?<![\w.}])/" + r"(home|root|Users|work)/")
UNFINISHED = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def imported(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (place, dotted name) for every import of the file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield f"{path.relative_to(ROOT)}:{node.lineno} imports {name}", name


def committed() -> list[pathlib.Path]:
    """The files that git tracks; a source archive has none."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_from_pipelines_down_to_ops(path: pathlib.Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    for where, name in imported(path):
        head, *rest = name.split(".")
        assert head, f"{where}: write the absolute name, qianmo.{room}..."
        assert head not in MAY_IMPORT, f"{where}: write qianmo.{name}"
        if head == "absl":
            assert room == "pipelines", f"{where}: absl stays in pipelines"
        if head == "qianmo" and rest and rest[0] != "__version__":
            allowed = MAY_IMPORT[room] | {room}
            assert rest[0] in allowed, f"{where}: {room} may import {sorted(allowed)}"


def test_committed_text_is_finished_and_names_no_path_of_a_machine() -> None:
    faults = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE_PATH.search(line) or UNFINISHED.search(line):
                faults.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not faults, "\n".join(faults)


def test_committed_files_are_small() -> None:
    sizes = {path: path.stat().st_size for path in committed()}
    sample = {p: size for p, size in sizes.items() if p.suffix == ".parquet"}
    large = [str(p) for p, size in sizes.items() if size > 1_000_000 and p not in sample]
    assert not large, f"over 1 MB: {large}"
    assert sum(sample.values()) < 5_000_000


def test_every_program_of_the_package_exists() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module, function = target.split(":")
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert path.is_file(), f"{name}: no {path.relative_to(ROOT)}"
        defined = [n.name for n in ast.parse(path.read_text()).body if hasattr(n, "name")]
        assert function in defined, f"{name}: {path.relative_to(ROOT)} defines no `{function}`"


@pytest.mark.skipif(not (ROOT / "benchmarks/tables.py").exists(), reason="no benchmark tables yet")
def test_tables_in_the_documents_agree_with_the_measured_results() -> None:
    check = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
