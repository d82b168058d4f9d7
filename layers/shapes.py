"""Checks on input shapes that several layers share."""

from __future__ import annotations

from typing import Any


def field_shape(layer: str, shape: Any) -> tuple[int, int]:
    """Number of fields F and their dim D, from the shape [B, F, D] that a layer is built on.

    Raises:
      ValueError: not three axes, or F or D not known when the layer is built.
    """
    if len(shape) != 3 or shape[1] is None or shape[2] is None:
        raise ValueError(
            f"`{layer}` reads field vectors: their shape should be [B, F, D] with F and D known. "
            f"Received: {tuple(shape)}"
        )
    return int(shape[1]), int(shape[2])
