"""Columns made as wide as a served signature asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def shown(shape: Sequence[int | None]) -> str:
    """A shape as messages write it: `?` for any number."""
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def fitted(name: str, column: npt.NDArray[Any], shape: Sequence[int | None]) -> npt.NDArray[Any]:
    """Pads the axes after the first to the widths of `shape`, at their ends, by 0 or b"".

    TensorFlow Serving merges only requests of equal widths, so those of signatures are fixed. Lists
    come with lengths and support rows with their count; what lies behind is not read.

    Args:
      name: of the input, for the message.
      column: [n, ...].
      shape: of the input; None is any number.

    Raises:
      ValueError: another number of axes, or an axis that is longer than the input's.

    Example:
    >>> fitted("seen", np.array([[7], [8]]), (None, 3)).tolist()
    [[7, 0, 0], [8, 0, 0]]
    """
    if column.shape[1:] == tuple(shape)[1:]:
        return column
    if column.ndim != len(shape):
        raise ValueError(
            f"input `{name}` should have shape {shown(shape)}. Received: {list(column.shape)}"
        )
    missing = [
        0 if want is None else want - have for have, want in zip(column.shape, shape, strict=True)
    ]
    if min(missing, default=0) < 0:
        raise ValueError(
            f"input `{name}` should have shape {shown(shape)}. Received: {list(column.shape)}. "
            "Cut what is longer: a list at the end that its `keep` in the schema names, support "
            "rows to the newest."
        )
    if not any(missing):
        return column
    sizes = [have + count for have, count in zip(column.shape, missing, strict=True)]
    found = np.full(sizes, b"", object) if column.dtype == object else np.zeros(sizes, column.dtype)
    found[tuple(map(slice, column.shape))] = column
    return found
