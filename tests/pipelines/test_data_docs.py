"""docs/data.md: its examples, its messages, and that it names every key."""

from __future__ import annotations

import dataclasses
import doctest
import pathlib
import re

from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema

DOCUMENT = pathlib.Path(__file__).resolve().parents[2] / "docs" / "data.md"


def test_the_examples() -> None:
    found = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert found.failed == 0
    assert found.attempted > 15


def test_every_key_has_its_line() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    tables = dict(zip(("whole", "categorical", "dense"), text.split("\nKeys of ")[1:], strict=True))
    for name, described in (("whole", Schema), ("categorical", Categorical), ("dense", Dense)):
        lines = re.findall(r"^\| (`.*?) \|", tables[name], re.MULTILINE)
        named = {key for line in lines for key in re.findall(r"`(\w+)`", line)}
        fields = {field.name for field in dataclasses.fields(described)}
        assert fields <= named, (name, fields - named)


def test_every_format_and_program_is_named() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for word in (".parquet", ".tfrecord", ".csv.gz", "qianmo-schema", "--ties", "--test_day"):
        assert word in text
