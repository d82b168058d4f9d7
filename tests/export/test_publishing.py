"""Versions are written by one process at a time, whole, on the disk, and leave nothing behind."""

from __future__ import annotations

import collections
import errno
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tf_keras

from qianmo.export import embedding_shards as shards
from qianmo.export import publishing
from qianmo.export.publishing import ExportError, drafting, next_version
from qianmo.export.saved_model import export_fed, export_in_graph
from qianmo.export.store import export_store
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=20, dim=4),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click",),
)
ROWS = {"user": np.arange(8), "price": np.linspace(-1, 1, 8, dtype=np.float32)}

# Runs the rest of a program that holds, or dies holding, a version of the folder.
PROGRAM = """
import os, pathlib, signal, sys
from qianmo.export import publishing
from qianmo.export.publishing import drafting, drafting_fed
base = pathlib.Path(sys.argv[1])
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(code: str, base: pathlib.Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM + code, str(base)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def model():
    tf_keras.utils.set_random_seed(1)
    made = zoo.build(SCHEMA, {"name": "mlp", "units": (4,)})
    made.build()
    return made


def test_of_two_exports_at_a_time_the_second_is_told(model, tmp_path: pathlib.Path) -> None:
    first = run(
        "with drafting(base) as d:\n print(d.version, flush=True)\n input()", tmp_path / "m"
    )
    assert first.stdout.readline() == "1\n"
    half_written = tmp_path / "m" / ".1.writing"
    with pytest.raises(ExportError, match="/m: another export writes a version there"):
        export_in_graph(model, tmp_path / "m", ROWS)
    with pytest.raises(ExportError, match="another export"):
        publishing.check_free(tmp_path / "m")
    assert half_written.is_dir()
    first.communicate("\n")
    assert first.returncode == 0
    folder, _ = export_in_graph(model, tmp_path / "m", ROWS)
    assert folder.name == "2"
    assert names(tmp_path / "m") == ["1", "2", "batching_parameters.txt", "models.config"]


def test_many_exports_at_a_time_each_succeed_or_are_told(tmp_path: pathlib.Path) -> None:
    code = (
        "while True:\n try:\n  with drafting(base) as d:\n   (d.folder / 'x').write_text('whole')\n"
        "  break\n except publishing.ExportError as error:\n  assert 'another export' in str(error)"
    )
    programs = [run(code, tmp_path / "m") for _ in range(6)]
    assert [program.wait() for program in programs] == [0] * 6
    assert names(tmp_path / "m") == ["1", "2", "3", "4", "5", "6"]
    assert {path.read_text() for path in tmp_path.glob("m/*/x")} == {"whole"}


def killed(code: str, base: pathlib.Path) -> None:
    program = run(code, base)
    program.communicate()
    assert program.returncode == -signal.SIGKILL


def test_what_a_killed_graph_export_left_is_removed(
    model, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "m"
    killed("with drafting(base) as d:\n (d.folder / 'variables').mkdir()\n die()", base)
    assert names(base) == [".1.writing", ".lock"]
    publishing.check_free(base)  # which leaves it to the next export
    with caplog.at_level(logging.WARNING):
        folder, _ = export_in_graph(model, base, ROWS)
    assert f"{base / '.1.writing'}: removed what a killed export left" in caplog.text
    assert folder.name == "1"
    # Killed when it had its number: it is whole, and stays.
    killed("with drafting(base) as d:\n (d.folder / 'x').touch()\n d.commit()\n die()", base)
    with drafting(base):
        pass
    assert names(base) == ["1", "2", "3", "batching_parameters.txt", "models.config"]


def test_what_a_killed_export_of_two_graphs_left_is_removed(model, tmp_path: pathlib.Path) -> None:
    base = tmp_path / "m"
    code = "with drafting_fed(base, None, 0) as (graph, lookup):\n lookup.commit()\n die()"
    killed(code, base)
    assert names(tmp_path / "m_lookup") == [".lock", "1"]
    assert names(base) == [".1.writing", ".lock"]
    folder, _ = export_fed(model, base, ROWS)
    for path in (base, tmp_path / "m_lookup"):
        assert names(path) == [folder.name, "batching_parameters.txt", "models.config"]


@pytest.mark.parametrize("when", ["writing", "whole", "published"])
def test_embeddings_of_a_killed_export_are_removed_unless_they_are_published(
    model, tmp_path: pathlib.Path, when: str
) -> None:
    export_store(model, tmp_path / "m", ROWS)
    store = tmp_path / "m_embeddings"
    steps = {"writing": "", "whole": "\n d.commit()"}
    steps["published"] = steps["whole"] + "\n shards.set_current(base, 2)"
    killed(
        "from qianmo.export import embedding_shards as shards\n"
        "table = shards.Table(name='user', dim=4, num_rows=2)\n"
        "with drafting(base) as d:\n"
        " shards.fill(d.folder, 2, [(table, [[[0.] * 4] * 2])], space=2)"
        f"{steps[when]}\n die()",
        store,
    )
    assert (store / ("2" if steps[when] else ".2.writing")).is_dir()
    export_store(model, tmp_path / "m", ROWS)
    kept = ["1", "2", "3"] if when == "published" else ["1", "2"]
    assert names(store) == [*kept, "CURRENT"]
    assert shards.published(store) == int(kept[-1])


def test_versions_that_were_written_and_not_published_stay(tmp_path: pathlib.Path) -> None:
    table = shards.Table(name="user", dim=1, num_rows=1)
    for version in (1, 2):
        shards.write(tmp_path, version, [(table, [np.ones((1, 1))])])
    with drafting(tmp_path, is_published=lambda version: False) as draft:
        pass
    assert names(tmp_path) == ["1", "2", "3"]
    assert draft.folder == tmp_path / "3"


def test_all_is_on_the_disk_before_it_has_its_name(
    model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_sync(descriptor: int) -> None:
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_rename(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if pathlib.Path(target).name.isdigit():  # whole versions
            files = {str(p) for p in pathlib.Path(source).rglob("*") if not p.is_symlink()}
            synced = {path for what, path in done if what == "sync"}
            assert {*files, str(source)} <= synced
        done.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    folder, _ = export_store(model, tmp_path / "m", ROWS)
    renamed = [path for what, path in done if what == "rename"]
    store = tmp_path / "m_embeddings"
    assert renamed == [
        str(path)
        for path in (
            store / "1", store / "CURRENT", folder,
            tmp_path / "m" / "models.config", tmp_path / "m" / "batching_parameters.txt",
        )
    ]  # fmt: skip
    for path in renamed:
        after = done[done.index(("rename", path)) + 1 :]
        assert ("sync", str(pathlib.Path(path).parent)) in after


def test_a_full_or_unwritable_disk_is_told_before_the_work(
    model, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for call in (
        lambda: export_in_graph(model, tmp_path / "file" / "m", ROWS),
        lambda: publishing.check_free(tmp_path / "file"),
    ):
        with pytest.raises(ExportError, match=r"file.* cannot be written: (Not a dir|File exists)"):
            call()
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ExportError, match=r"takes about 16,\d+,\d+ bytes.* has 1,000,000 free"):
        export_in_graph(model, tmp_path / "m", ROWS)
    assert names(tmp_path / "m") == []
    assert next_version(tmp_path / "m") == 1


def test_an_export_that_fails_leaves_nothing(model, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ExportError, match="`heads` should be some of"):
        export_store(model, tmp_path / "m", ROWS, heads=("other",))
    bad = {**ROWS, "user": np.array(["x"] * 8)}
    with pytest.raises(ValueError, match="invalid literal"):
        export_store(model, tmp_path / "m", bad)
    with pytest.raises(shards.StoreError, match="MANIFEST: No such file"):
        export_store(model, tmp_path / "m", ROWS, changes_of=7)
    assert names(tmp_path / "m") == names(tmp_path / "m_embeddings") == []


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_one_process_writes_a_name_and_what_a_killed_one_left_is_gone(
    tmp_path: pathlib.Path, is_folder: bool
) -> None:
    target = tmp_path / "out"
    kind = "writing_folder" if is_folder else "writing"

    def write(text: str) -> None:
        if is_folder:
            with publishing.writing_folder(target, overwrite=True) as folder:
                (folder / "text").write_text(text)
        else:
            publishing.write_text(target, text)

    code = f"with publishing.{kind}(base / 'out') as made:\n"
    if is_folder:
        code += "    (made / 'half').write_text('half')\n"
    else:
        code += "    made.write('half-written, and longer'); made.flush()\n"
    with run(code + "    print(flush=True); sys.stdin.read(); die()\n", tmp_path) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match="out: another process writes it"):
            write("mine")
        if not is_folder:
            with pytest.raises(ValueError, match="out: another process writes it"):
                publishing.check_writable(target)
        assert names(tmp_path) == [".out.writing"]
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait() == -signal.SIGKILL
    assert names(tmp_path) == [".out.writing"]
    for text in ("one", "two"):
        write(text)
        assert names(tmp_path) == ["out"]
        assert (target / "text" if is_folder else target).read_text() == text
    if is_folder:
        assert names(target) == ["text"]


def test_a_folder_that_appeared_meanwhile_stays(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "out"

    def write() -> None:
        with publishing.writing_folder(target):
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(ValueError, match=r"out exists\. Give another path"):
        write()
    assert names(tmp_path) == ["out"]
    assert names(target) == ["theirs"]


def test_an_error_of_the_block_leaves_the_file_and_keeps_its_words(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "out"
    target.write_text("before")

    def write() -> None:
        with publishing.writing(target) as file:
            file.write("half")
            raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    with pytest.raises(ConnectionRefusedError) as caught:
        write()
    assert caught.value.filename is None  # it is not the file's
    assert target.read_text() == "before"
    assert names(tmp_path) == ["out"]
    with pytest.raises(NotADirectoryError, match=r"out/below"):
        publishing.write_text(target / "below", "text")
