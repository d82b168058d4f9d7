"""The bijection of 64 bits by which ids are spread: over shards, slots, samples and groups."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def mix64(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Spreads int64 over uint64, by the finaliser of MurmurHash3; 0 stays 0.

        h = x ^ (x >> 33);  h = h c_1 mod 2^64;  h = h ^ (h >> 33);  h = h c_2 mod 2^64
        mix64(x) = h ^ (h >> 33)

    Stored embedding shards depend on it, and the op that reads them has it in C++.

    Example:
    >>> [hex(h) for h in mix64(np.array([0, 1, -1])).tolist()]
    ['0x0', '0xb456bcfc34c2cb2c', '0x64b5720b4b825f21']
    """
    h = np.asarray(values, np.int64).view(np.uint64)
    h = (h ^ h >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    h = (h ^ h >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ h >> np.uint64(33)
