"""What the documents tell Python to import is there."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
IMPORT = re.compile(r"^ *from (qianmo[\w.]*) import ([\w, ]+)$|^ *import (qianmo[\w.]*)$", re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_imported_is_there(path: pathlib.Path) -> None:
    for line in IMPORT.finditer(path.read_text(encoding="utf-8")):
        module, names, alone = line.groups()
        imported = importlib.import_module(module or alone)
        for name in re.split(", *", names or ""):
            part = name.partition(" as ")[0].strip()
            if part and not hasattr(imported, part):
                importlib.import_module(f"{module}.{part}")
