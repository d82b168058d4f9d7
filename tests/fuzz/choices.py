"""Inputs of the harnesses: bytes that stand for choices, so that mutations stay near good files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Choices:
    """Takes decisions from bytes; when they end, the first alternative.

    Args:
      data: the bytes.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether bytes are left."""
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        """The next bytes."""
        part = self._data[self._at : self._at + count]
        self._at += len(part)
        return part

    def number(self, below: int) -> int:
        """A number in [0, below)."""
        return int.from_bytes(self.take(1 if below <= 256 else 8), "little") % below

    def pick(self, values: Sequence[_T]) -> _T:
        """One of some values."""
        return values[self.number(len(values))]

    def rest(self) -> bytes:
        """All that is left."""
        return self.take(len(self._data))


def damaged(choices: Choices, data: bytes) -> bytes:
    """A file with a few bytes changed, cut out, put in or cut off at the end."""
    for _ in range(choices.number(4)):
        at = choices.number(max(1, len(data)) + 256) % max(1, len(data))
        kind = choices.number(4)
        if kind == 0:
            data = data[:at] + choices.take(1) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + data[at + 1 + choices.number(16) :]
        elif kind == 2:
            data = data[:at] + choices.take(1 + choices.number(8)) + data[at:]
        else:
            data = data[:at]
    return data


def mutated(random_: random.Random, seed: bytes) -> bytes:
    """A seed with a few mutations, for runs that no coverage guides.

    Every second one goes on with random bytes: as many choices that no seed has made.
    """
    data = bytearray(seed)
    if random_.randrange(2):
        data[random_.randrange(8) :] = random_.randbytes(random_.randrange(300))
    for _ in range(1 + random_.randrange(4)):
        at = random_.randrange(len(data) + 1)
        kind = random_.randrange(5)
        if kind == 0 or not data:
            data[at:at] = random_.randbytes(1 + random_.randrange(8))
        elif kind == 1:
            del data[at : at + 1 + random_.randrange(8)]
        elif kind == 2:
            data[at : at + 1] = random_.randbytes(1)
        elif kind == 3:
            other = random_.randrange(len(data))
            data[at:at] = data[other : other + 1 + random_.randrange(16)]
        else:
            data[at - 1 : at] = bytes([data[at - 1] ^ 1 << random_.randrange(8)])
    return bytes(data)
