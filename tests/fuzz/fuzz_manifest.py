"""Fuzzes what Python reads of a store: CURRENT, MANIFEST and the checksums of an embedding version.

An input is a version as it was written and what is changed of it, or an archive of files, as for
the harness in C++. The manifest's checksum is made right in most.
"""

from __future__ import annotations

import pathlib
import shutil
import zlib

from fuzz import store_seeds
from fuzz.choices import Choices, damaged

from qianmo.export import embedding_shards

_HEADER = 4096


def _sealed(manifest: bytes) -> bytes:
    lines = b"".join(
        line + b"\n" for line in manifest.split(b"\n") if line and not line.startswith(b"crc ")
    )
    return lines + f"crc {zlib.crc32(lines):08x}\n".encode()


def _is_whole(files: dict[str, bytes]) -> bool:
    """Whether all files are as the manifest says."""
    for line in files["MANIFEST"].split(b"\n"):
        words = line.decode().split(" ")
        if words[0] not in ("shard", "changed"):
            continue
        data = files.get(words[1], b"")
        header = data[: _HEADER - 4]
        crc = int.from_bytes(data[_HEADER - 4 : _HEADER], "little")
        if len(data) != int(words[5]) or zlib.crc32(data[_HEADER:]) != int(words[7], 16):
            return False
        if len(data) < _HEADER or zlib.crc32(header) != crc:
            return False
    return True


def check(data: bytes, folder: pathlib.Path) -> str:
    """Reads the version that an input holds; fails where what is told of it is wrong."""
    choices = Choices(data)
    is_sealed = choices.number(4) > 0
    version = choices.number(8)
    versions = store_seeds.embedding_versions()
    if version < len(versions):
        files = {"CURRENT": b"12\n", **store_seeds.unpack(versions[version])}
        for _ in range(choices.number(3)):
            name = choices.pick(["MANIFEST", *files])
            files[name] = damaged(choices, files[name])
        if choices.number(8) == 7:
            del files[choices.pick([*files])]
    else:
        files = store_seeds.unpack(choices.rest())
    if is_sealed and "MANIFEST" in files:
        files["MANIFEST"] = _sealed(files["MANIFEST"])
    store = folder / "store"
    shutil.rmtree(store, ignore_errors=True)
    (store / "7").mkdir(parents=True)
    current = files.pop("CURRENT", b"7\n")
    (store / "CURRENT").write_bytes(current)
    for name, content in files.items():
        (store / "7" / name).write_bytes(content)
    refusal = ""
    try:
        number = embedding_shards.published(store)
        space = embedding_shards.space(store / "7")
        embedding_shards.verify(store / "7")
    except embedding_shards.StoreError as error:
        refusal = str(error)
    if refusal:
        assert str(store) in refusal, f"the error names no file: {refusal}"
        assert current != b"7\n" or not _is_sound(files), f"refused, and is sound: {refusal}"
        return "refused"
    assert current == f"{number}\n".encode()
    assert _is_whole(files), "verify says that damaged files are whole"
    assert f" space {space}\n".encode() in files["MANIFEST"]
    return "read"


def _is_sound(files: dict[str, bytes]) -> bool:
    """Whether a version is as it was written."""
    return files in map(store_seeds.unpack, store_seeds.embedding_versions())


def seeds() -> list[bytes]:
    """Versions as they are written, and manifests alone, whose checksum is made right."""
    versions = store_seeds.embedding_versions()
    manifests = [store_seeds.unpack(version)["MANIFEST"] for version in versions]
    return [
        *(b"\1\7MANIFEST %d\n%s" % (len(text), text) for text in manifests),
        *(b"\0\7" + archive for archive in versions[:2]),
        *(bytes([seal, version, edits, 0, 1, 40 * version, 3, 1, 65])
          for seal in (0, 1) for version in range(5) for edits in (0, 1, 2)),
    ]  # fmt: skip
