"""Models of mixed precision, served in the precision of their weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import tf_keras

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_mixed(layer: tf_keras.layers.Layer) -> bool:
    """Whether a layer computes in another dtype than that of its weights."""
    return bool(layer.compute_dtype != layer.variable_dtype)


@contextlib.contextmanager
def in_full(model: tf_keras.Model) -> Iterator[None]:
    """Has a model compute in the dtype of its weights within the block."""
    layers = [model, *(m for m in model.submodules if isinstance(m, tf_keras.layers.Layer))]
    mixed = [(layer, layer.dtype_policy) for layer in layers if is_mixed(layer)]
    try:
        # Another model would take the memory of all tables again.
        for layer, policy in mixed:
            layer._set_dtype_policy(policy.variable_dtype)
        yield
    finally:
        for layer, policy in mixed:
            layer._set_dtype_policy(policy)


def served_in_full(
    function: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """Calls a function of a model while the model computes in the dtype of its weights.

    Graphs of bfloat16 round otherwise wherever their ops are merged in another way, so no two agree
    to a useful tolerance.
    """

    @functools.wraps(function)
    def call(model: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with in_full(model):
            return function(model, *args, **kwargs)

    return call
