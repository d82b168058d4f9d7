"""Rows of blocks: taking some, and shuffling."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from qianmo.pipelines.data.columns import Block


def shuffled(
    ordered: Iterable[Block], random: np.random.Generator, shuffle_rows: int
) -> Iterator[Block]:
    """Passes rows through a buffer: new ones take the places of as many drawn at random."""
    ordered = iter(ordered)
    first: list[Block] = []
    while sum(map(num_rows, first)) < shuffle_rows and (block := next(ordered, None)):
        first.append(block)
    if not first:
        return
    # A column at a time, so that the rows are not held twice.
    buffer = {name: np.concatenate([block.pop(name) for block in first]) for name in [*first[0]]}
    size = num_rows(buffer)
    for block in ordered:
        for start in range(0, num_rows(block), size):
            new = {name: values[start : start + size] for name, values in block.items()}
            places = random.choice(size, num_rows(new), replace=False)
            yield taken(buffer, places)
            for name, values in new.items():
                buffer[name][places] = values
    yield taken(buffer, random.permutation(size))


def taken(block: Block, rows: npt.NDArray[np.int64]) -> Block:
    """Some rows of a block."""
    return {name: values[rows] for name, values in block.items()}


def num_rows(block: Block) -> int:
    """How many rows a block has."""
    return len(next(iter(block.values()), ()))
