"""A proposed schema as the text of a recipe, with its reasons beside it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from qianmo.pipelines.data.propose import Proposal

_WIDTH = 100
_HEAD = '''"""A recipe that qianmo-schema proposes.

Its comments say what {rows:,} rows look like. Read them, and change what only you can know.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from qianmo.configs.base import base_config


def schema() -> dict[str, Any]:
    """What a row holds."""
    features: list[dict[str, Any]] = [
'''
_TAIL = '''

def get_config() -> ConfigDict:
    """The recipe."""
    config = base_config()
    config.data.train = {path}
    # Rows of later days, by which training knows when to stop; and those that tell how good it is.
    # config.data.valid = ""
    # config.data.test = ""
    config.schema = schema()
    config.model = {{"name": "mlp", "units": (128, 64), "embedding_l2": 3e-3}}
    config.train.epochs = 1
    return config
'''


def text(proposal: Proposal, path: str) -> str:
    """The recipe's file."""
    lines = []
    for line in proposal.features:
        lines += [*_comment(line.why, 8), *_entry(line.entry)]
    lines.append("    ]")
    if proposal.left_out:
        lines += _comment("Left out:", 4)
        for name, why in proposal.left_out.items():
            lines += _comment(f"{name}: {why}", 4, "  ")
    for note in proposal.notes:
        lines += _comment(note, 4)
    schema = proposal.schema()
    del schema["features"]
    lines += ["    return {", '        "features": features,']
    for label in proposal.labels:
        lines += _comment(f"{label.name}: {label.why}", 8)
    lines += [f"        {_value(key)}: {_value(value)}," for key, value in schema.items()]
    lines.append("    }")
    head = _HEAD.format(rows=proposal.rows)
    return head + "\n".join(lines) + "\n" + _TAIL.format(path=_value(path))


def _comment(words: str, indent: int, extra: str = "") -> Iterable[str]:
    """Comment lines; those after the first, and all with `extra`, are set in."""
    start = " " * indent + "# "
    return textwrap.wrap(
        words,
        _WIDTH,
        initial_indent=start + extra,
        subsequent_indent=start + extra * 2,
        break_long_words=False,
    )


def _entry(entry: Mapping[str, Any]) -> list[str]:
    pairs = [f"{_value(key)}: {_value(value)}" for key, value in entry.items()]
    one = f"        {{{', '.join(pairs)}}},"
    if len(one) <= _WIDTH:
        return [one]
    return ["        {", *(f"            {pair}," for pair in pairs), "        },"]


def _value(value: Any) -> str:
    """A value as Python writes it, strings in double quotes unless they hold some."""
    if isinstance(value, str):
        return repr(value) if '"' in value else json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        inside = ", ".join(map(_value, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_value(k)}: {_value(v)}' for k, v in value.items())}}}"
    return repr(value)
