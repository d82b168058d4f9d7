"""Process-wide settings that training and serving want, each for a measured reason."""

from __future__ import annotations

import ctypes
import functools

import tensorflow as tf

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 1 << 29


@functools.cache
def settle() -> None:
    """Applies the settings, once.

    glibc gives large freed blocks back to the kernel, and a step's tensors are just that large:
    each step then pays for fresh pages. Keeping them makes gathers about three times as fast.

    TensorFlow's arithmetic optimiser regroups sums by what else is in the graph, so a teacher
    trained beside a student would differ in the last bit from one trained alone.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc alone has it
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TOP_PAD, _KEPT_BYTES >> 3)
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
