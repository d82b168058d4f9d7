"""Writes embedding tables as the files that `qianmo.ops.embedding_lookup` reads.

    store/CURRENT     the number of the version that is published
    store/7/MANIFEST  what version 7 holds, with sizes and checksums
    store/7/*.rows    its shards

ops/cc/embedding_version.h describes the files.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Literal, cast, get_args

import numpy as np

from qianmo.export.publishing import drafting, write_text
from qianmo.layers.hashing import mix64

DType = Literal["float32", "float16", "bfloat16", "int8"]
DenseRows = np.ndarray
IdRows = tuple[np.ndarray, np.ndarray]

SHARD_ROWS = 1 << 20
MANIFEST = "MANIFEST"
CURRENT = "CURRENT"
_NAME = b"qianmo embeddings "
_FORMAT = _NAME + b"1\n"
_MAGIC = b"QMROWS1\n"
HEADER_BYTES = 4096
COPIED_BYTES = 1 << 20
SLOT = np.dtype([("id", "<i8"), ("row", "<u8")])
NO_ROW = np.uint64(2**64 - 1)
# Of a manifest of format 1, by their number, and all others.
_N = "(0|[1-9][0-9]{0,18})"
_FIRST_LINES = {1: "qianmo embeddings 1", 2: f"version {_N} space {_N}"}
_OTHER_LINE = (
    f"table [A-Za-z0-9_]{{1,63}} (dense|hash) ({'|'.join(get_args(DType))}) dim {_N} rows {_N} "
    f"default -?{_N} shard_rows {_N}"
    f"|(shard|changed) [A-Za-z0-9_-][A-Za-z0-9_.-]* rows {_N} bytes {_N} crc [0-9a-f]{{8}}"
)


class StoreError(ValueError):
    """The store, a version or a table was refused; nothing was published."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """One table of an embedding version.

    Attributes:
      name: letters, digits and underscores.
      dim: width of the vectors.
      num_rows: how many there are.
      dtype: how they are stored. "int8" has a float scale for each row.
      hashed: whether rows have any int64 ids; otherwise the ids are 0 to num_rows - 1.
      default_id: whose vector stands for ids without a row; it must have one.
    """

    name: str
    dim: int
    num_rows: int
    dtype: DType = "float32"
    hashed: bool = False
    default_id: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Za-z0-9_]{1,63}", self.name):
            raise StoreError(
                "A table's name should be 1 to 63 letters, digits and underscores. "
                f"Received: {self.name!r}"
            )
        if self.dtype not in get_args(DType):
            raise StoreError(
                f"table `{self.name}`: `dtype` should be one of {get_args(DType)}. "
                f"Received: {self.dtype!r}"
            )
        for key, most in (("dim", 1 << 16), ("num_rows", 1 << 40)):
            if not 1 <= getattr(self, key) <= most:
                raise StoreError(
                    f"table `{self.name}`: `{key}` should be in [1, {most}]. "
                    f"Received: {getattr(self, key)}"
                )
        if not self.hashed and not 0 <= self.default_id < self.num_rows:
            raise StoreError(
                f"table `{self.name}`: `default_id` should be in [0, {self.num_rows}). "
                f"Received: {self.default_id}"
            )


def encode(vectors: np.ndarray, dtype: DType) -> np.ndarray:
    """The bytes of rows: float32 [n, dim] to uint8 [n, bytes of a row]."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if dtype == "float32":
        parts = [vectors]
    elif dtype == "float16":
        parts = [vectors.astype(np.float16)]
    elif dtype == "bfloat16":
        bits = vectors.view(np.uint32)
        # Round to the nearest, ties to even.
        parts = [((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)]
    else:
        scale = np.abs(vectors).max(1, keepdims=True) / np.float32(127)
        # A scale of 0 has only zeros in its row.
        numbers = np.rint(vectors / np.where(scale > 0, scale, 1))
        parts = [scale, np.clip(numbers, -127, 127).astype(np.int8)]
    rows = np.concatenate([p.view(np.uint8).reshape(len(vectors), -1) for p in parts], 1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4)))


def row_bytes(table: Table) -> int:
    """Bytes of a table's row."""
    return encode(np.zeros((1, table.dim), np.float32), table.dtype).shape[1]


class ShardFile:
    """A shard's file while it is written."""

    def __init__(self, folder: pathlib.Path, name: str) -> None:
        self.file = (folder / name).open("xb")
        self.file.write(bytes(HEADER_BYTES))
        self.name, self.num_rows, self.bytes, self.crc = name, 0, HEADER_BYTES, 0

    def write(self, data: bytes | memoryview) -> None:
        self.crc = zlib.crc32(data, self.crc)
        self.bytes += memoryview(data).nbytes
        self.file.write(data)

    def close(self, table: Table, number: int, home_slots: int, num_slots: int) -> str:
        """Writes the header; returns the manifest's line."""
        offset = rows_offset(num_slots)
        assert self.bytes == offset + self.num_rows * row_bytes(table)
        header = struct.pack(
            "<8s4I7Q64s",
            _MAGIC,
            get_args(DType).index(table.dtype),
            int(table.hashed),
            table.dim,
            self.crc,
            number,
            self.num_rows,
            row_bytes(table),
            home_slots,
            num_slots,
            offset,
            self.bytes,
            table.name.encode(),
        ).ljust(HEADER_BYTES - 4, b"\0")
        self.file.seek(0)
        self.file.write(header + struct.pack("<I", zlib.crc32(header)))
        self.file.close()
        return f"shard {self.name} rows {self.num_rows} bytes {self.bytes} crc {self.crc:08x}"


def rows_offset(num_slots: int) -> int:
    """Where the rows begin in a shard's file."""
    return -(-(HEADER_BYTES + num_slots * SLOT.itemsize) // HEADER_BYTES) * HEADER_BYTES


def encoded(table: Table, vectors: np.ndarray, first: int = 0) -> np.ndarray:
    """The bytes of a table's rows, `first` the number of those before.

    Raises:
      StoreError: rows of another width, or numbers that the dtype cannot hold.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.shape[1] != table.dim:
        raise StoreError(
            f"table `{table.name}`: rows should be [n, {table.dim}]. Received: {vectors.shape}"
        )
    with np.errstate(over="ignore"):
        stored = vectors.astype(np.float16 if table.dtype == "float16" else np.float32)
    finite = np.isfinite(stored).all(1)
    if not finite.all():
        raise StoreError(
            f"table `{table.name}`: row {first + int(np.argmin(finite))} should hold numbers that "
            f"{table.dtype} can hold. Received: {vectors[np.argmin(finite)].tolist()}"
        )
    return encode(vectors, table.dtype)


def encoded_with_ids(
    table: Table, ids: np.ndarray, vectors: np.ndarray, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """`encoded` rows with their ids.

    Raises:
      StoreError: not one id for each row.
    """
    rows, ids = encoded(table, vectors, first), np.asarray(ids, np.int64)
    if ids.shape != (len(rows),):
        raise StoreError(
            f"table `{table.name}`: ids should be [{len(rows)}], one for each row. "
            f"Received: {ids.shape}"
        )
    return ids, rows


def write_dense(
    folder: pathlib.Path, table: Table, chunks: Iterable[np.ndarray], shard_rows: int
) -> list[str]:
    """Writes the shards of encoded rows; returns their lines of the manifest."""
    count = -(-table.num_rows // shard_rows)
    lines: list[str] = []
    shard: ShardFile | None = None
    written = 0
    for chunk in chunks:
        rows = chunk
        while len(rows) and written < table.num_rows:
            if shard is None:
                shard = ShardFile(folder, f"{table.name}-{len(lines):05d}-of-{count:05d}.rows")
            part = rows[: min(shard_rows - shard.num_rows, table.num_rows - written)]
            rows = rows[len(part) :]
            shard.write(part.data)
            shard.num_rows += len(part)
            written += len(part)
            if shard.num_rows == shard_rows or written == table.num_rows:
                lines.append(shard.close(table, len(lines), 0, 0))
                shard = None
        written += len(rows)
    _check_count(table, written)
    return lines


def _check_count(table: Table, written: int) -> None:
    if written != table.num_rows:
        raise StoreError(
            f"table `{table.name}`: there should be {table.num_rows} rows. Received: {written}"
        )


def index(table: Table, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Slots for rows that lie in the order of `ids`, and how many of them are home slots."""
    home_slots = 1 << max(0, (len(ids) * 3 // 2) - 1).bit_length()
    home = (mix64(ids) & np.uint64(home_slots - 1)).astype(np.int64)
    order = np.lexsort((ids, home))
    twice = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(twice):
        raise StoreError(
            f"table `{table.name}`: id {ids[order][twice[0]]} should have one row, and has two."
        )
    # In the order of their home slots, each row takes the first slot that is free.
    places = np.arange(len(ids))
    slot = np.maximum.accumulate(home[order] - places) + places
    tail = int((slot - home[order]).max(initial=0))
    slots = np.full(home_slots + tail, np.array((0, NO_ROW), SLOT))
    slots["id"][slot] = ids[order]
    slots["row"][slot] = order
    return slots, home_slots


def write_hashed(
    folder: pathlib.Path, table: Table, chunks: Iterable[IdRows], shard_rows: int
) -> list[str]:
    """Writes the shards of ids and encoded rows; returns their lines of the manifest."""
    bits = max(0, -(-table.num_rows // shard_rows) - 1).bit_length()
    count = 1 << bits
    spills = [folder / f".{table.name}-{k}" for k in range(count)]
    written = 0
    default_found = False
    # Rows are first dealt out to the shards: one index at a time fits into memory.
    for ids, rows in chunks:
        default_found |= bool((ids == table.default_id).any())
        shard_of = (mix64(ids) >> np.uint64(1) >> np.uint64(63 - bits)).astype(np.int64)
        order = np.argsort(shard_of, kind="stable")
        ends = np.cumsum(np.bincount(shard_of, minlength=count))
        for k, part in enumerate(np.split(order, ends[:-1])):
            if len(part):
                with open(f"{spills[k]}.ids", "ab") as file:
                    file.write(ids[part].data)
                with open(f"{spills[k]}.rows", "ab") as file:
                    file.write(rows[part].data)
        written += len(ids)
    _check_count(table, written)
    if not default_found:
        raise StoreError(
            f"table `{table.name}`: `default_id` {table.default_id} should have a row. It has none."
        )
    lines = []
    for k, spill in enumerate(spills):
        shard = ShardFile(folder, f"{table.name}-{k:05d}-of-{count:05d}.rows")
        own = pathlib.Path(f"{spill}.ids")
        ids = np.fromfile(own, np.int64) if own.exists() else np.zeros(0, np.int64)
        slots, home_slots = index(table, ids)
        shard.write(slots.view(np.uint8).data)
        shard.write(bytes(rows_offset(len(slots)) - shard.bytes))
        shard.num_rows = len(ids)
        if len(ids):
            with open(f"{spill}.rows", "rb") as file:
                while block := file.read(COPIED_BYTES):
                    shard.write(block)
            own.unlink()
            os.unlink(f"{spill}.rows")
        lines.append(shard.close(table, k, home_slots, len(slots)))
    return lines


def write(
    store: str | os.PathLike[str],
    version: int,
    tables: Iterable[tuple[Table, Iterable[DenseRows] | Iterable[IdRows]]],
    *,
    space: int | None = None,
    shard_rows: int = SHARD_ROWS,
) -> pathlib.Path:
    """Writes one embedding version, under a temporary name until all of it is on the disk.

    Memory holds one chunk at a time, and for a hashed table the index of one shard.

    Args:
      store: folder of the versions.
      version: its number, from 1 on.
      tables: each table with its rows in chunks of any size: arrays [n, dim], in the order of the
        ids; for a hashed table pairs of ids [n] and such arrays, in any order.
      space: the version whose graphs can read this one as well: its vectors are of one space with
        that one's. Default: the version itself, which begins a new space.
      shard_rows: rows of a shard; a power of two. Shards of a hashed table have about as many.

    Returns:
      The version's folder. `publish` makes it the one that is read.

    Raises:
      StoreError: rows that do not fit their table, an id that stands twice, a version that exists.
        Nothing is left behind.
    """
    space = version if space is None else space
    if not 1 <= space <= version or shard_rows < 1 or shard_rows & (shard_rows - 1):
        raise StoreError(
            "`version` should be >= 1, `space` in [1, version] and `shard_rows` a power of two. "
            f"Received: {version}, {space} and {shard_rows}"
        )
    with drafting(store, version, of_models=False, refusal=StoreError) as draft:
        fill(draft.folder, version, tables, space=space, shard_rows=shard_rows)
    return draft.folder


def fill(
    folder: pathlib.Path,
    version: int,
    tables: Iterable[tuple[Table, Iterable[DenseRows] | Iterable[IdRows]]],
    *,
    space: int,
    shard_rows: int = SHARD_ROWS,
) -> None:
    """Writes the files of a version, see `write`, into a folder of its own."""
    lines = []
    for table, chunks in tables:
        lines.append(table_line(table, shard_rows))
        if table.hashed:
            pairs = cast(Iterable[IdRows], chunks)
            lines += write_hashed(folder, table, _encode_pairs(table, pairs), shard_rows)
        else:
            arrays = cast(Iterable[np.ndarray], chunks)
            lines += write_dense(folder, table, _encode_arrays(table, arrays), shard_rows)
    write_manifest(folder, version, space, lines)


def _encode_arrays(table: Table, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    first = 0
    for vectors in chunks:
        yield encoded(table, vectors, first)
        first += len(vectors)


def _encode_pairs(table: Table, chunks: Iterable[IdRows]) -> Iterator[IdRows]:
    first = 0
    for ids, vectors in chunks:
        yield encoded_with_ids(table, ids, vectors, first)
        first += len(vectors)


def write_manifest(folder: pathlib.Path, version: int, space: int, lines: Iterable[str]) -> None:
    """Writes what a version holds: lines of `table_line` and of its files."""
    text = "\n".join(["qianmo embeddings 1", f"version {version} space {space}", *lines]) + "\n"
    crc = f"crc {zlib.crc32(text.encode()):08x}\n"
    (folder / MANIFEST).write_text(text + crc, encoding="ascii")


def table_line(table: Table, shard_rows: int) -> str:
    """A table's line of the manifest."""
    scheme = "hash" if table.hashed else "dense"
    return (
        f"table {table.name} {scheme} {table.dtype} dim {table.dim} rows {table.num_rows} "
        f"default {table.default_id} shard_rows {0 if table.hashed else shard_rows}"
    )


def manifest(version_dir: str | os.PathLike[str]) -> Iterator[list[str]]:
    """The words of each line of a version's manifest, its checksum and its lines' form checked.

    Raises:
      StoreError: there is none, it was changed or damaged, or it is of another format.
    """
    path = pathlib.Path(version_dir) / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    if data.startswith(_NAME) and not data.startswith(_FORMAT):
        received = data[len(_NAME) :].partition(b"\n")[0].decode("ascii", "replace")
        raise StoreError(
            f"{path}: its format is {received}, "
            "and this version of the package reads 1. Export the embeddings anew."
        )
    lines = data[: data.rfind(b"crc ")]
    if data != lines + f"crc {zlib.crc32(lines):08x}\n".encode():
        raise StoreError(f"{path}: its checksum differs; it was changed or damaged")
    found = lines.decode("latin-1").split("\n")[:-1]
    for number, line in enumerate(found or [""], 1):
        if not re.fullmatch(_FIRST_LINES.get(number, _OTHER_LINE), line):
            raise StoreError(f"{path}: line {number} is not one of format 1. Received: {line!r}")
    if len(found) < 2:
        raise StoreError(f"{path}: it should hold a line `version`, and ends before it")
    yield from (line.split(" ") for line in found)


def space(version_dir: str | os.PathLike[str]) -> int:
    """The space of a version's vectors."""
    return int(next(words for words in manifest(version_dir) if words[0] == "version")[3])


def verify(version_dir: str | os.PathLike[str]) -> None:
    """Reads every byte of a version and compares sizes and checksums.

    Raises:
      StoreError: a file differs from what was written; it names the file.
    """
    folder = pathlib.Path(version_dir)
    for words in manifest(folder):
        if words[0] not in ("shard", "changed"):
            continue
        path, size, crc = folder / words[1], int(words[5]), int(words[7], 16)
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                found, read = 0, len(header)
                while block := file.read(COPIED_BYTES):
                    found, read = zlib.crc32(block, found), read + len(block)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from None
        if read != size:
            raise StoreError(f"{path}: it has {read} bytes and the manifest says {size}")
        if found != crc or zlib.crc32(header[:-4]).to_bytes(4, "little") != header[-4:]:
            raise StoreError(f"{path}: its checksum differs; it was changed or damaged")


def publish(store: str | os.PathLike[str], version: int) -> None:
    """Makes a version the one that is read, after `verify`.

    Graphs that have the store open take it within a tenth of a second, between two lookups.

    Raises:
      StoreError: the version is not there, or damaged; what was published stays.
    """
    verify(pathlib.Path(store) / str(version))
    set_current(store, version)


def set_current(store: str | os.PathLike[str], version: int) -> None:
    """Makes a version the one that is read, which was verified."""
    write_text(pathlib.Path(store) / CURRENT, f"{version}\n")


def published(store: str | os.PathLike[str]) -> int | None:
    """The version that is read, if any was published.

    Raises:
      StoreError: CURRENT does not hold a version's number.
    """
    path = pathlib.Path(store) / CURRENT
    if not path.exists():
        return None
    text = path.read_bytes()
    if not re.fullmatch(rb"[1-9][0-9]{0,17}\n", text):
        raise StoreError(
            f"{path}: it should hold a version's number. Received: {text[:40]!r}. "
            "Publish one again."
        )
    return int(text)
