"""The spreading of 64 bits, on which stored shards depend."""

from __future__ import annotations

import numpy as np
import pytest

from qianmo.layers.hashing import mix64

# Stored rows were placed by these values; they may never change.
KNOWN = {
    0: 0x0,
    1: 0xB456BCFC34C2CB2C,
    2: 0x3ABF2A20650683E7,
    -1: 0x64B5720B4B825F21,
    2**63 - 1: 0xABB93DF0A930EDEA,
    -(2**63): 0x8F780810AF31A493,
}


def fmix64(value: int) -> int:
    """The finaliser as MurmurHash3 publishes it, in Python's integers."""
    k = value % 2**64
    k ^= k >> 33
    k = k * 0xFF51AFD7ED558CCD % 2**64
    k ^= k >> 33
    k = k * 0xC4CEB9FE1A85EC53 % 2**64
    return k ^ k >> 33


@pytest.mark.parametrize(("value", "expected"), KNOWN.items())
def test_known_values(value: int, expected: int) -> None:
    assert mix64(np.array([value])).tolist() == [expected]


def test_any_values_of_any_shape() -> None:
    values = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, (50, 4))
    found = mix64(values)
    assert found.dtype == np.uint64
    expected = [[fmix64(value) for value in row] for row in values.tolist()]
    assert found.tolist() == expected
