"""Fuzzes rows in JSON, the bodies of REST requests, on a model that gives its inputs back."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import pathlib
import tempfile
from typing import Any

import numpy as np
import tensorflow as tf
from fuzz.choices import Choices, damaged
from fuzz.oracle import same

from qianmo.pipelines.serving import rest
from qianmo.pipelines.serving.models import Model
from qianmo.pipelines.serving.signatures import ServingError

_SPECS = {
    "i": tf.TensorSpec([None], tf.int64, "i"),
    "d": tf.TensorSpec([None], tf.float32, "d"),
    "s": tf.TensorSpec([None], tf.string, "s"),
    "l": tf.TensorSpec([None, None], tf.int64, "l"),
    "v": tf.TensorSpec([None, 2], tf.float32, "v"),
    "b": tf.TensorSpec([None], tf.bool, "b"),
}
_VALUES = (
    0, 1, -1, 2**63 - 1, -(2**63), 2**63, 10**400, True, False, None, 0.5, 1.0, 1e39, 1e-50,
    float("nan"), float("inf"), "", "a", "5", "京", "\ud800", "\0", [], [1], [1, 2], [0.5, 1],
    [[1]], {}, {"b64": "AP8="}, {"b64": "AP8"}, {"b64": 1}, {"b64": "", "x": 1}, {"i": 1},
)  # fmt: skip
_ROW = {"i": 5, "d": 0.1, "s": "x", "l": [1, 2, 3], "v": [1, 2.5], "b": True}


class WrongError(Exception):
    """A request that should be refused."""


class _Echo(tf.Module):
    """Gives its inputs back."""

    @tf.function(input_signature=[*_SPECS.values()])
    def __call__(self, i: Any, d: Any, s: Any, l: Any, v: Any, b: Any) -> dict[str, Any]:  # noqa: E741
        return dict(zip(_SPECS, map(tf.identity, (i, d, s, l, v, b)), strict=True))


@functools.cache
def _model() -> Model:
    with tempfile.TemporaryDirectory() as folder:
        echo = _Echo()
        tf.saved_model.save(echo, f"{folder}/1", signatures=echo.__call__)
        return Model("echo", folder)


def _integer(value: Any) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise WrongError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise WrongError
    try:
        with np.errstate(over="raise"):
            return float(np.float32(float(value)))
    except (OverflowError, FloatingPointError):
        raise WrongError from None


def _string(value: Any) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, dict) and [*value] == ["b64"] and isinstance(value["b64"], str):
            return base64.b64decode(value["b64"], validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError):
        pass
    raise WrongError


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise WrongError
    return value


def _list(value: Any, convert: Any) -> list[Any]:
    if type(value) is not list:
        raise WrongError
    return [convert(item) for item in value]


_CONVERT = {
    "i": _integer, "d": _number, "s": _string, "b": _boolean,
    "l": lambda value: _list(value, _integer), "v": lambda value: _list(value, _number),
}  # fmt: skip


def _expected(body: Any) -> list[dict[str, Any]]:
    """The rows of a request, from their JSON one by one.

    Raises:
      WrongError: it should be refused.
    """
    if not isinstance(body, dict) or not body.keys() <= {"signature_name", "instances", "inputs"}:
        raise WrongError
    if ("instances" in body) == ("inputs" in body):
        raise WrongError
    if body.get("signature_name", "") not in ("", "serving_default"):
        raise WrongError
    if "instances" in body:
        rows = body["instances"]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise WrongError
    else:
        columns = body["inputs"]
        if not isinstance(columns, dict) or columns.keys() != _SPECS.keys():
            raise WrongError
        if not all(isinstance(column, list) for column in columns.values()):
            raise WrongError
        if len({len(column) for column in columns.values()}) > 1:
            raise WrongError
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not 0 < len(rows) <= 1024 or any(row.keys() != _SPECS.keys() for row in rows):
        raise WrongError
    found = [{name: _CONVERT[name](value) for name, value in row.items()} for row in rows]
    if len({len(row["l"]) for row in found}) > 1 or any(len(row["v"]) != 2 for row in found):
        raise WrongError
    return found


def _read(answer: Any) -> list[dict[str, Any]]:
    """The rows of an answer; what strings stand for, as bytes."""
    if "predictions" in answer:
        rows = answer["predictions"]
    else:
        columns = answer["outputs"]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{**row, "s": _string(row["s"])} for row in rows]


def _body(choices: Choices) -> bytes:
    form = choices.number(8)
    if form == 7:
        return choices.rest()
    rows = [dict(_ROW) for _ in range(1 + choices.number(4))]
    is_columns = choices.number(2) == 1
    for _ in range(max(0, choices.number(8) - 3)):
        row = choices.pick(rows)
        name = choices.pick([*_SPECS])
        kind = choices.number(8)
        if kind == 0:
            row.pop(name, None)
        elif kind == 1:
            row[choices.pick(("x", "I", ""))] = 1
        elif kind == 2:
            row[name] = [choices.pick(_VALUES) for _ in range(choices.number(4))]
        else:
            row[name] = choices.pick(_VALUES)
    body: dict[str, Any] = {"instances": rows}
    if is_columns:
        names = dict.fromkeys(name for row in rows for name in row)
        body = {"inputs": {name: [row[name] for row in rows if name in row] for name in names}}
    if choices.number(8) == 7:
        body[choices.pick(("signature_name", "instances", "inputs", "x"))] = choices.pick(_VALUES)
    data = json.dumps(body, ensure_ascii=choices.number(2) == 0).encode("utf-8", "surrogatepass")
    return damaged(choices, data) if form == 6 else data


def check(data: bytes, folder: pathlib.Path) -> str:
    """Asks for what an input stands for; fails where the answer or the refusal is wrong."""
    del folder
    try:
        body = json.loads(_body(Choices(data)))
    except (ValueError, RecursionError):
        return "no JSON"
    refusal = ""
    answer: Any = None
    try:
        answer = json.loads(json.dumps(rest.predict(_model(), None, body)))
    except ServingError as error:
        refusal = str(error)
    assert "\n" not in refusal, f"more than a sentence: {refusal!r}"
    try:
        rows = _expected(body)
    except WrongError:
        rows = []
    assert bool(rows) == (not refusal), refusal or f"answered, and should be refused: {answer}"
    if refusal:
        return "refused"
    read = _read(answer)
    assert len(read) == len(rows)
    for one, two in zip(read, rows, strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            assert same(one[name], value), f"{name}: {one[name]!r}, not {value!r}"
    return "read"


def seeds() -> list[bytes]:
    """Bodies of both forms, as they are and with each value in each place."""
    rows = json.dumps({"instances": [_ROW, _ROW]}).encode()
    columns = json.dumps({"inputs": {name: [value] for name, value in _ROW.items()}}).encode()
    changed = [
        bytes([0, 0, form, 4, 0, name, 5, value])
        for form in (0, 1) for name in range(len(_SPECS)) for value in range(len(_VALUES))
    ]  # fmt: skip
    return [b"\x07" + rows, b"\x07" + columns, b"\x07" + b"[" * 3000, *changed]
