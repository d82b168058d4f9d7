"""The flag --config: a recipe file, and --config.key=value for any key of it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from qianmo.layers.names import nearest

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


class RecipeError(Exception):
    """The recipe file cannot be used.

    It is no ValueError, which absl would report as one of the flag.
    """


def define() -> None:
    """Defines --config, which is required. Its value is a locked `ConfigDict`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A recipe, such as those in configs/; after a colon its variant. Any key of it can be set: "
        "--config.train.epochs=1 --config.data.train=rows/",
    )
    flags.mark_flag_as_required("config")  # type: ignore[no-untyped-call]
    flags.FLAGS["config"].parser = _Parser()


class _Parser(flags.ArgumentParser):  # type: ignore[type-arg]
    """Loads a recipe, and says what is wrong with it or with the keys to set."""

    def parse(self, argument: str) -> ConfigDict:
        file, _, variant = argument.partition(":")
        if not os.path.isfile(file):
            raise RecipeError(f"--config={argument}: there is no such file; {_nearest_file(file)}")
        try:
            config = _load(file, variant)
        except Exception as error:
            raise RecipeError(_fault(error, file, variant)) from error
        if not isinstance(config, ConfigDict):
            raise RecipeError(
                f"{file}: get_config() should return the ConfigDict that `base_config()` makes. "
                f"Received: {type(config).__name__}"
            )
        config.lock()
        for arg in sys.argv:
            if found := _OVERRIDE.match(arg):
                _check_key(config, found[1])
        return config


def _load(file: str, variant: str) -> Any:
    loader = importlib.machinery.SourceFileLoader("recipe", file)
    spec = importlib.util.spec_from_loader("recipe", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module.get_config(*([variant] if variant else []))


def _nearest_file(file: str) -> str:
    folder, name = os.path.split(file)
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    if near := nearest(name, [other for other in there if other.endswith(".py")]):
        return f"did you mean {os.path.join(folder, near)}?"
    return "give the path of a recipe, such as configs/kuairand_dual_dnn.py."


def _fault(error: BaseException, file: str, variant: str) -> str:
    """What a recipe raised, with file and line."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        where = f"{error.filename}, line {error.lineno}"
        return f"{where}: {type(error).__name__}: {error.msg}. Correct the recipe."
    what = f"{type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    if lines:
        return f"{file}, line {lines[-1]}: {what}. Correct the recipe."
    if isinstance(error, AttributeError):
        return f"{file}: it should define get_config(), which returns the recipe. Add it."
    if isinstance(error, TypeError) and variant:
        return f"{file} has no variants; leave `:{variant}` out."
    return f"{file}: {what}. Correct the recipe."


def _check_key(config: Any, path: str) -> None:
    """Looks for a key to set.

    Raises:
      flags.Error: there is none; the message names the nearest.
    """
    place, prefix = config, "--config"
    for key in path.split("."):
        if not isinstance(place, Mapping | ConfigDict) or "[" in key:
            return  # ml_collections knows what else has parts
        if key not in place:
            near = nearest(key, place)
            hint = f"did you mean {prefix}.{near}?" if near else f"known: {', '.join(place)}."
            raise flags.IllegalFlagValueError(f"{prefix}.{key} is no key of the recipe; {hint}")
        place, prefix = place[key], f"{prefix}.{key}"
