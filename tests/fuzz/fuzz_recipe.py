"""Fuzzes recipe.json and the other JSON files of a model directory.

What is read comes back from a file written of it, and holds every key that was given as it was.
"""

from __future__ import annotations

import copy
import json
import pathlib
from typing import Any

from fuzz.choices import Choices, damaged

from qianmo.pipelines import run_dir
from qianmo.pipelines.recipe import Recipe

_SUMMARY = {
    "rows": 9, "sampled": 9, "labels": {"y": {"rows": 9, "mean": 0.5, "low": 0, "high": 1}},
    "weight": {}, "columns": [{"name": "u", "kind": "dense", "missing": 0.0}], "tasks": None,
}  # fmt: skip
_IDENTITY = {
    "sha256": "00", "path": "a.csv", "rows": 3,
    "files": [{"name": "a.csv", "bytes": 5, "sha256": "00"}],
}  # fmt: skip
_CONFIG = {
    "data": {"train": "a", "valid": "", "test": "", "test_support": "", "shuffle_rows": 8,
             "chunk_rows": 0, "chunk_tasks": 1, "chunks_beside": False},
    "schema": {
        "features": [
            {"kind": "categorical", "name": "u", "dim": 4, "vocabulary": [1, 2]},
            {"kind": "categorical", "name": "c", "num_ids": 5, "domains": [1]},
            {"kind": "dense", "name": "x", "mean": 0.5, "variance": 2.0},
            {"name": "l", "dtype": "string", "max_length": 3, "default": []},
            {"name": "p", "vocabulary": [0, 1]},
        ],
        "labels": ["y", "r"], "label_kinds": {"r": "rating"}, "optional_labels": ["y"],
        "label_weights": {"y": 2.0}, "label_moments": {"r": [1.0, 2.0]}, "task_id": "u",
        "domain": "p", "domain_weights": [[1, 0.5]], "timestamp": "t",
    },
    "model": {"name": "mlp", "units": [4, 2]},
    "train": {"seed": 1, "batch_size": 8, "epochs": 1, "monitor": "auc", "patience": 1,
              "optimizer": {"name": "adam", "learning_rate": 0.1}, "table_optimizer": {},
              "meta_optimizer": {}, "checkpoint_every": 9, "steps_per_call": 1,
              "dtype_policy": "float32", "start_from": "", "start_except": []},
    "migrate": {"m": {"model_dir": "b", "weights": {"a/0": "b/0"}, "tables": None, "domain": 1}},
    "plugins": [],
}  # fmt: skip
_VALUES = (
    None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, 1e999, float("nan"), "", "a", "u", "y",
    "\ud800", "\0", "京", [], ["a"], [1], [[1, 2.0]], {}, {"a": 1}, {"name": 3}, "two_tower",
    "rating", "int64", "string", "gauc", "ndcg_10", "float64",
)  # fmt: skip


def _changed(choices: Choices, value: Any) -> Any:
    """Plain data with some parts of it changed, left out or added."""
    value = copy.deepcopy(value)
    for _ in range(choices.number(5)):
        at = value
        while isinstance(at, dict | list) and at:
            keys = sorted(at) if isinstance(at, dict) else range(len(at))
            key = choices.pick(keys)
            kind = choices.number(8)
            if kind > 2 and isinstance(at[key], dict | list) and at[key]:
                at = at[key]
                continue
            if kind == 0:
                del at[key]
            elif kind == 1 and isinstance(at, dict):
                at[choices.pick([*map(str, keys), "names", "new"])] = copy.deepcopy(
                    choices.pick(_VALUES)
                )
            elif kind == 1:
                at.append(copy.deepcopy(at[key]))
            else:
                at[key] = copy.deepcopy(choices.pick(_VALUES))
            break
    return value


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _assert_kept(given: Any, back: Any, where: str) -> None:
    """Fails where a key that was given is not as it was; a key may be left out at its default."""
    if isinstance(given, dict) and isinstance(back, dict):
        for key, value in given.items():
            if key in back:
                _assert_kept(value, back[key], f"{where}.{key}")
            else:
                known = {"kind": "categorical"}
                assert (
                    value in (None, "", 0, [], {}, False) or key in known or _is_default(key, value)
                ), f"{where}.{key} is lost: {value!r}"
    elif isinstance(given, list) and isinstance(back, list) and len(given) == len(back):
        for number, (one, two) in enumerate(zip(given, back, strict=True)):
            _assert_kept(one, two, f"{where}[{number}]")
    else:
        is_nan = given != given and back != back
        assert (given == back and type(given) is type(back)) or is_nan or given == back == 0, (
            f"{where}: {given!r} became {back!r}"
        )


def _is_default(key: str, value: Any) -> bool:
    """Whether `to_config` leaves a schema's value out."""
    return value in {
        "dtype": ["int64"], "dim": [16], "min_count": [1], "keep": ["last"], "pooling": ["mean"],
        "side": ["context"], "timestamp_unit": ["us"], "task_dtype": ["int64"],
    }.get(key, [])  # fmt: skip


def _file(choices: Choices, base: Any) -> bytes:
    form = choices.number(8)
    if form == 7:
        return choices.rest()
    text = json.dumps(_changed(choices, base), ensure_ascii=choices.number(2) == 0)
    data = text.encode("utf-8", "surrogatepass")
    return damaged(choices, data) if form == 6 else data


def _has_plugins(data: bytes) -> bool:
    """Plug-ins are imported: any module of the machine, for which no harness can answer."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        return False
    names = config.get("plugins") if isinstance(config, dict) else None
    return isinstance(names, list) and any(isinstance(name, str) for name in names)


def check(data: bytes, folder: pathlib.Path) -> str:
    """Reads what an input stands for; fails where it or the refusal is wrong."""
    choices = Choices(data)
    name, base, read = choices.pick(
        (
            (run_dir.RECIPE, _CONFIG, run_dir.read_recipe),
            (run_dir.RECIPE, _CONFIG, run_dir.read_recipe),
            (run_dir.LOOK, {"train": _SUMMARY}, run_dir.read_looks),
            (run_dir.DATA, {"train": _IDENTITY}, run_dir.read_identities),
        )
    )
    written = _file(choices, base)
    if _has_plugins(written):
        return "names plug-ins"
    file = folder / name
    file.write_bytes(written)
    try:
        found: Any = read(folder)
    except ValueError as error:
        text = str(error)
    else:
        text = ""
    if text:
        assert str(file) in text, f"the error names no file: {text}"
        return "refused"
    if not isinstance(found, Recipe):
        return "read"
    config = found.to_config()
    try:
        again = json.dumps(config, allow_nan=True)
        file.write_text(again)
    except UnicodeEncodeError:
        return "read"
    assert _plain(run_dir.read_recipe(folder).to_config()) == _plain(config) or "NaN" in again
    given = json.loads(written)
    given.setdefault("data", {}).pop("items", None)
    _assert_kept(given, _plain(config), "recipe")
    return "read"


def seeds() -> list[bytes]:
    """Each file as it should be, as text, and with changes."""
    texts = [json.dumps(base).encode() for base in (_CONFIG, {"t": _SUMMARY}, {"t": _IDENTITY})]
    return [
        *(bytes([1 + number, 7]) + text for number, text in enumerate(texts)),
        *(bytes([file, form, 1, *range(part, part + 9)])
          for file in range(4) for form in (0, 6) for part in range(8)),
        b"\x00\x07" + b"[" * 2000,
    ]  # fmt: skip
