"""Tables of the documents, made from benchmarks/results/*.json.

    python benchmarks/tables.py --write   fills them in
    python benchmarks/tables.py --check   fails when a document differs

In a document, a table stands between `<!-- table:NAME -->` and `<!-- /table -->`; NAME is a
result, or `NAME.targets` for its targets.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table:([\w.]+) -->\n).*?(<!-- /table -->)", re.S)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _grid(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def rows(result: Mapping[str, Any]) -> str:
    """The measured rows of a result."""
    header = list(dict.fromkeys(key for row in result["rows"] for key in row))
    return _grid(header, [[_cell(row.get(key)) for key in header] for row in result["rows"]])


def targets(result: Mapping[str, Any]) -> str:
    """The targets of a result."""
    found = [
        [name, _cell(t["value"]), _cell(t["target"]), _cell(t["met"])]
        for name, t in result["targets"].items()
    ]
    return _grid(["target", "measured", "asked", "met"], found)


def markdown(result: Mapping[str, Any]) -> str:
    """Rows and targets of a result."""
    return f"{rows(result)}\n\n{targets(result)}"


def render(name: str) -> str:
    """The table that a document's mark asks for."""
    base, _, part = name.partition(".")
    result = json.loads((RESULTS / f"{base}.json").read_text(encoding="utf-8"))
    return targets(result) if part == "targets" else rows(result)


def main() -> int:
    """Writes or checks the tables of README.md and docs/."""
    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--write", action="store_true")
    which.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        fresh = MARK.sub(lambda m: f"{m[1]}{render(m[2])}\n{m[3]}", text)
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if arguments.write:
                path.write_text(fresh, encoding="utf-8")
    if stale and arguments.check:
        print(f"Not as benchmarks/results says: {', '.join(map(str, stale))}. Run with --write.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
