"""Weights that belong to one domain, label or task, and move only when a batch speaks of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf


class Own(NamedTuple):
    """A variable whose parts have owners of their own.

    Attributes:
      variable: what is owned.
      parts: for each of its axes, into how many equal parts owners divide it; 1 where they do not.
        Empty if all of it has one owner.
    """

    variable: tf.Variable
    parts: tuple[int, ...] = ()


def collect(modules: Iterable[Any]) -> dict[Any, tuple[int, ...]]:
    """Reference of a variable -> `parts`, of what modules list as their `own_weights`.

    Of a variable that several list the parts are the finer ones, axis by axis.
    """
    found: dict[Any, tuple[int, ...]] = {}
    for module in modules:
        for variable, parts in getattr(module, "own_weights", ()):
            whole = (1,) * variable.shape.rank
            before = found.get(variable.ref(), whole)
            found[variable.ref()] = tuple(map(max, before, parts or whole))
    return found


def spoken_of(gradient: tf.Tensor, parts: Sequence[int]) -> tf.Tensor:
    """Where the gradient of a part is not 0 everywhere: bool, in a shape that broadcasts.

    Example:
    >>> spoken_of(tf.constant([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), (1, 2)).numpy()
    array([[False, False,  True,  True]])
    """
    mask = gradient != 0
    for axis, count in enumerate(parts):
        size = gradient.shape[axis]
        if count == 1:
            mask = tf.reduce_any(mask, axis, keepdims=True)
        elif count < size:
            shape = tf.shape(mask)
            split = tf.concat([shape[:axis], [count, size // count], shape[axis + 1 :]], 0)
            mask = tf.repeat(
                tf.reduce_any(tf.reshape(mask, split), axis + 1), size // count, axis=axis
            )
    return mask


def _slots(optimizer: Any, variable: tf.Variable) -> list[tf.Variable]:
    """What an optimiser keeps of a variable, such as its moments: Keras has a list of each kind."""
    index = optimizer._index_dict[optimizer._var_key(variable)]
    count = len(optimizer._index_dict)
    return [
        kind[index]
        for name, kind in vars(optimizer).items()
        if isinstance(kind, list)
        and name != "_variables"
        and len(kind) == count
        and all(isinstance(one, tf.Variable) for one in kind)
    ]


@contextlib.contextmanager
def still(
    optimizer: Any, pairs: Iterable[tuple[Any, tf.Variable]], owned: Mapping[Any, tuple[int, ...]]
) -> Iterator[None]:
    """Keeps parts whose gradient is 0 everywhere as they are, moments and all, through a step.

    An optimiser with moments, or with weight decay, would move them all the same.

    Args:
      optimizer: of tf_keras, with its variables made.
      pairs: gradients and variables of the step.
      owned: what has owners, see `collect`.
    """
    kept = []
    for gradient, variable in pairs:
        if gradient is not None and variable.ref() in owned:
            mask = spoken_of(tf.convert_to_tensor(gradient), owned[variable.ref()])
            for one in (variable, *_slots(optimizer, variable)):
                shared = [i for i, size in enumerate(one.shape) if size < variable.shape[i]]
                # RowwiseAdagrad has one number for a row of several parts.
                own = tf.reduce_any(mask, shared, keepdims=True)
                kept.append((one, tf.identity(one), own))
    yield
    for one, before, mask in kept:
        one.assign(tf.where(mask, one, before))
