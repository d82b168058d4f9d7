"""Embedding versions that are another one with some rows changed.

Such a version shares the files of its base, and adds one file for each table with the rows that
differ from them; however many versions lie between, a reader looks at two places at most.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np

from qianmo.export import embedding_shards as shards
from qianmo.export.embedding_shards import DType, IdRows, StoreError, Table
from qianmo.export.publishing import drafting
from qianmo.layers.hashing import mix64

CHANGED_SHARD = 2**32 - 1  # the number in the header of a file of changed rows
REWRITTEN_PART = 0.25  # a table of which more has changed is written whole
_CHUNK_ROWS = 1 << 16


class Shard:
    """The rows of one shard, mapped."""

    def __init__(self, path: pathlib.Path) -> None:
        with path.open("rb") as file:
            file.seek(32)
            num_rows, row_bytes, self.home_slots, num_slots, offset = struct.unpack(
                "<5Q", file.read(40)
            )
        self.rows = np.zeros((0, row_bytes), np.uint8)  # what is empty cannot be mapped
        if num_rows:
            self.rows = np.memmap(path, np.uint8, "r", offset, (num_rows, row_bytes))
        if num_slots:
            self.slots = np.memmap(path, shards.SLOT, "r", shards.HEADER_BYTES, num_slots)

    def ids(self) -> np.ndarray:
        """The ids of a hashed shard's rows, in their order."""
        used = self.slots[self.slots["row"] != shards.NO_ROW]
        return used["id"][np.argsort(used["row"])]

    def find(self, ids: np.ndarray) -> np.ndarray:
        """The places of ids in a hashed shard; -1 for those that are not there."""
        home = (mix64(ids) & np.uint64(self.home_slots - 1)).astype(np.int64)
        found = np.full(len(ids), -1)
        for step in range(len(self.slots) - self.home_slots + 1):
            slots = self.slots[home + step]
            hit = (slots["id"] == ids) & (slots["row"] != shards.NO_ROW)
            found[hit] = slots["row"][hit]
        return found


@dataclasses.dataclass(frozen=True)
class Stored:
    """A table of a version, as its manifest describes it."""

    table: Table
    lines: tuple[str, ...]
    shard_rows: int
    shards: tuple[Shard, ...]
    changed: Shard | None

    def base_rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows that the shards hold for ids, changes left out, and which of them there are."""
        if self.table.hashed:
            bits = len(self.shards).bit_length() - 1
            shard = mix64(ids) >> np.uint64(1) >> np.uint64(63 - bits)
            shard = shard.astype(np.int64)
        else:
            shard = ids // self.shard_rows
        rows = np.zeros((len(ids), self.shards[0].rows.shape[1]), np.uint8)
        there = np.zeros(len(ids), bool)
        for k in np.unique(shard):
            at = np.flatnonzero(shard == k)
            source = self.shards[k]
            place = source.find(ids[at]) if self.table.hashed else ids[at] % self.shard_rows
            there[at] = place >= 0
            rows[at[place >= 0]] = source.rows[place[place >= 0]]
        return rows, there

    def whole(self, ids: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All ids and rows in chunks, with changed ones (sorted by id) in place."""
        in_base = self.base_rows(ids)[1]
        for k, shard in enumerate(self.shards):
            first = k * self.shard_rows
            own = shard.ids() if self.table.hashed else np.arange(first, first + len(shard.rows))
            for start in range(0, len(own), _CHUNK_ROWS):
                part = own[start : start + _CHUNK_ROWS]
                chunk = np.array(shard.rows[start : start + _CHUNK_ROWS])
                place = np.minimum(np.searchsorted(ids, part), len(ids) - 1)
                hit = ids[place] == part
                chunk[hit] = rows[place[hit]]
                yield part, chunk
        if not in_base.all():
            yield ids[~in_base], rows[~in_base]


def contents(folder: pathlib.Path) -> dict[str, Stored]:
    """The tables of a version, by name."""
    blocks: list[list[list[str]]] = []
    for words in shards.manifest(folder):
        if words[0] == "table":
            blocks.append([])
        if blocks:
            blocks[-1].append(words)
    found = {}
    for head, *rest in blocks:
        table = Table(
            name=head[1],
            dim=int(head[5]),
            num_rows=int(head[7]),
            dtype=cast(DType, head[3]),
            hashed=head[2] == "hash",
            default_id=int(head[9]),
        )
        files = {kind: [Shard(folder / w[1]) for w in rest if w[0] == kind] for kind in _KINDS}
        found[table.name] = Stored(
            table,
            tuple(" ".join(words) for words in (head, *rest)),
            int(head[11]),
            tuple(files["shard"]),
            files["changed"][0] if files["changed"] else None,
        )
    return found


_KINDS = ("shard", "changed")


def _changes(stored: Stored, chunks: Iterable[IdRows]) -> tuple[np.ndarray, np.ndarray]:
    """Ids, sorted, and encoded rows that differ from the shards; the last of an id counts."""
    table = stored.table
    ids = [np.zeros(0, np.int64)]
    rows = [np.zeros((0, stored.shards[0].rows.shape[1]), np.uint8)]
    if stored.changed is not None:
        ids.append(stored.changed.ids())
        rows.append(np.array(stored.changed.rows))
    for given, vectors in chunks:
        some, encoded = shards.encoded_with_ids(table, given, vectors)
        if not table.hashed and not ((some >= 0) & (some < table.num_rows)).all():
            raise StoreError(
                f"table `{table.name}`: ids should be in [0, {table.num_rows}). "
                f"Received: {some.min()} to {some.max()}"
            )
        base, there = stored.base_rows(some)
        # A row that is as in the shards matters only where it takes back an earlier change.
        keep = ~there | (base != encoded).any(1)
        if stored.changed is not None:
            keep |= stored.changed.find(some) >= 0
        ids.append(some[keep])
        rows.append(encoded[keep])
    every, last = np.unique(np.concatenate(ids)[::-1], return_index=True)
    latest = np.concatenate(rows)[::-1][last]
    base, there = stored.base_rows(every)
    differs = ~there | (base != latest).any(1)
    return every[differs], latest[differs]


def _write_changed(
    folder: pathlib.Path, table: Table, version: int, ids: np.ndarray, rows: np.ndarray
) -> str:
    file = shards.ShardFile(folder, f"{table.name}-changed-{version}.rows")
    slots, home_slots = shards.index(table, ids)
    file.write(slots.view(np.uint8).data)
    file.write(bytes(shards.rows_offset(len(slots)) - file.bytes))
    file.write(rows.data)
    file.num_rows = len(ids)
    as_hashed = dataclasses.replace(table, hashed=True)
    line = file.close(as_hashed, CHANGED_SHARD, home_slots, len(slots))
    return line.replace("shard", "changed", 1)


def write_changes(
    store: str | os.PathLike[str],
    version: int,
    base: int,
    tables: Iterable[tuple[str, Iterable[IdRows]]],
) -> pathlib.Path:
    """Writes a version that is another one, of the same space, with some rows changed.

    What did not change is shared with the base's files by hard links, so that either version may be
    deleted. A table more than a quarter of which differs from its shards is written whole.

    Args:
      store: folder of the versions.
      version: the new one's number.
      base: the version it starts from, itself whole or changed.
      tables: names of tables, each with ids [n] and rows [n, dim] in chunks. Rows that are as they
        were cost nothing, so all rows may be given; ids that are not given keep theirs. A hashed
        table may get new ids.

    Returns:
      The version's folder. `embedding_shards.publish` makes it the one that is read.

    Raises:
      StoreError: a table that the base has not, rows or ids that do not fit, a version that exists.
        Nothing is left behind.

    Cost: reads the rows given and their like in the base; memory holds the rows that differ.
    """
    source = pathlib.Path(store) / str(base)
    shards.space(source)  # it is there
    with drafting(store, version, of_models=False, refusal=StoreError) as draft:
        fill_changes(draft.folder, version, source, tables)
    return draft.folder


def fill_changes(
    folder: pathlib.Path,
    version: int,
    source: pathlib.Path,
    tables: Iterable[tuple[str, Iterable[IdRows]]],
) -> None:
    """Writes the files of a version, see `write_changes`, into a folder beside its base."""
    stored_tables = contents(source)
    blocks = {name: list(stored.lines) for name, stored in stored_tables.items()}
    for name, chunks in tables:
        if name not in stored_tables:
            raise StoreError(
                f"{source}: there should be a table `{name}`. It has {sorted(stored_tables)}"
            )
        blocks[name] = _with_changes(folder, stored_tables[name], version, chunks)
    lines = [line for block in blocks.values() for line in block]
    for line in lines:
        words = line.split(" ")
        if words[0] in _KINDS and not (folder / words[1]).exists():
            os.link(source / words[1], folder / words[1])
    shards.write_manifest(folder, version, shards.space(source), lines)


def _with_changes(
    folder: pathlib.Path, stored: Stored, version: int, chunks: Iterable[IdRows]
) -> list[str]:
    """The manifest's lines of a table that changes, its files written."""
    table = stored.table
    ids, rows = _changes(stored, chunks)
    unchanged = [line for line in stored.lines if not line.startswith("changed ")]
    if not len(ids):
        return unchanged
    if len(ids) <= REWRITTEN_PART * table.num_rows:
        return [*unchanged, _write_changed(folder, table, version, ids, rows)]
    added = int((~stored.base_rows(ids)[1]).sum())
    table = dataclasses.replace(table, num_rows=table.num_rows + added)
    whole = stored.whole(ids, rows)
    if table.hashed:
        line = shards.table_line(table, 0)
        return [line, *shards.write_hashed(folder, table, whole, shards.SHARD_ROWS)]
    line = shards.table_line(table, stored.shard_rows)
    chunks_in_order = (rows for _, rows in whole)
    return [line, *shards.write_dense(folder, table, chunks_in_order, stored.shard_rows)]
