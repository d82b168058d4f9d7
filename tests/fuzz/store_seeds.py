"""Seeds of the stores' harnesses: small files as the exporters and the support store write them."""

from __future__ import annotations

import functools
import pathlib
import struct
import tempfile

import numpy as np

from qianmo.export import embedding_changes, embedding_shards
from qianmo.export.embedding_shards import Table

_MASK = 2**64 - 1


def pack(folder: pathlib.Path) -> bytes:
    """The files of a folder as one input: a line "NAME SIZE", then SIZE bytes, for each."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return b"".join(
        f"{file.name} {len(data)}\n".encode() + data
        for file, data in ((file, file.read_bytes()) for file in files)
    )


def unpack(archive: bytes) -> dict[str, bytes]:
    """The files of an input; an archive may end anywhere."""
    files: dict[str, bytes] = {}
    while archive and len(files) < 20:
        head, end, rest = archive.partition(b"\n")
        name, _, digits = head.partition(b" ")
        if not (end and digits.isdigit() and len(digits) < 10):
            break
        if not name or len(name) > 100 or name.startswith(b".") or b"/" in name or b"\0" in name:
            break
        files[name.decode("latin-1")] = rest[: int(digits)]
        archive = rest[int(digits) :]
    return files


@functools.cache
def embedding_versions() -> list[bytes]:
    """A version of each type of rows, dense and hashed, one with changed rows."""
    random = np.random.default_rng(0)
    seeds = []
    with tempfile.TemporaryDirectory() as folder:
        store = pathlib.Path(folder)
        for version, dtype in enumerate(("float32", "float16", "bfloat16", "int8"), 1):
            dense = Table(name="d", dim=3, num_rows=10, dtype=dtype, default_id=0)
            hashed = Table(name="h", dim=2, num_rows=12, dtype=dtype, hashed=True, default_id=-1)
            ids = np.array([-1, *random.integers(-(2**63), 2**63 - 1, 11)])
            tables = [
                (dense, [random.normal(size=(10, 3))]),
                (hashed, [(ids, random.normal(size=(12, 2)))]),
            ]
            shard_rows = 8 if version % 2 else 16
            written = embedding_shards.write(store, version, tables, shard_rows=shard_rows)
            seeds.append(pack(written))
        changed = [
            ("d", [(np.array([3]), random.normal(size=(1, 3)))]),
            ("h", [(np.array([-1, 7]), random.normal(size=(2, 2)))]),
        ]
        embedding_changes.write_changes(store, 5, 1, changed)
        seeds.append(pack(store / "5"))
    return seeds


def _sum(data: bytes) -> bytes:
    total = len(data)
    for (word,) in struct.iter_unpack("<Q", data):
        total = (total ^ word) * 0x9E3779B97F4A7C15 & _MASK
        total ^= total >> 32
    return struct.pack("<Q", total)


def _record(data: bytes) -> bytes:
    return data + _sum(data)


def _put(task: int, time: int, event: int = 0, version: int = 1, written: int = 10**9) -> bytes:
    floats = struct.pack("<7f4x", *(task + time + i for i in range(7)))
    return _record(b"QSPUTROW" + struct.pack("<5q", task, time, event, version, written) + floats)


def _drop(task: int) -> bytes:
    return _record(b"QSDROPTK" + struct.pack("<q", task))


def support_logs() -> list[bytes]:
    """Snapshots and logs of a store of dim 3, 2 labels and 4 rows a task."""
    header = _record(b"QIANMOS2" + struct.pack("<2I", 3, 2))
    snapshot = header + _put(1, 10) + _put(1, 20, 1) + _put(2, 5) + _put(77, 5, 6, 7)
    log = header + _put(1, 15, 2) + _put(1, 20, 1, 2) + _drop(2) + _put(2, 6, written=5)
    full = header + b"".join(_put(3, time, version=time % 2) for time in (4, 3, 9, 1, 2, 8, 9))
    older = _record(b"QIANMOS1" + struct.pack("<2I", 3, 2)) + _put(1, 1)
    wider = _record(b"QIANMOS2" + struct.pack("<2I", 4, 2)) + _put(1, 1)
    torn = log[:-5]
    pairs = [
        (snapshot, log),
        (snapshot, torn),
        (b"", full),
        (full, b""),
        (older, log),
        (log, wider),
    ]
    return [struct.pack("<BH", ttl, len(one)) + one + two for ttl in (0, 1) for one, two in pairs]


def of(target: str) -> list[bytes]:
    """The seeds of a C++ harness."""
    return {"embedding_version": embedding_versions, "support_log": support_logs}[target]()
