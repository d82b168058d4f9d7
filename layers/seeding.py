"""Seeds that make a layer's weights a function of its own seed and structure alone."""

from __future__ import annotations

import random

import numpy as np


def pick_seed(seed: int | None) -> int:
    """Returns `seed`, or one drawn from Python's generator (`tf_keras.utils.set_random_seed`).

    Raises:
      ValueError: a seed below 0.
    """
    if seed is None:
        return random.randrange(2**31)
    if seed < 0:
        raise ValueError(f"`seed` should be >= 0. Received: {seed}")
    return seed


def derive_seed(seed: int, *path: int) -> int:
    """A seed for one part of a layer; parts with different paths get unrelated seeds.

    Example:
    >>> derive_seed(1, 0) == derive_seed(1, 0), derive_seed(1, 0) == derive_seed(0, 1)
    (True, False)
    """
    return int(np.random.SeedSequence((seed, *path)).generate_state(1)[0] >> 1)
