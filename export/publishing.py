"""Versions of exports: one writer at a time, whole or not at all, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import qianmo
from qianmo.export.paths import check_file, check_model_path

LOOKUP = "_lookup"  # ends the name of what makes vectors
LOCK = ".lock"
ORIGIN = "origin.json"
SPARE_BYTES = 16 << 20  # of a disk, beside what is written
_OF_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
MAX_BATCH_SIZE = 1024  # rows that a server merges, and that a request may have

Origin = Mapping[str, Any]  # plain data: what a version was made from
NO_ORIGIN: Origin = {}


class ExportError(ValueError):
    """The export was refused; nothing was published."""


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_path(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a file or folder that is whole, once all of it is on the disk."""
    if temporary.is_dir():
        for path in temporary.rglob("*"):
            if not path.is_symlink():
                sync(path)
    sync(temporary)
    os.rename(temporary, target)
    sync(target.parent)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[IO[str]]:
    """A text file that takes its name when the block ends well; one process at a time writes it.

    Raises:
      ValueError: another process writes it.
      OSError: it cannot be written; the error names it.
    """
    temporary = _temporary(path)
    with _held(path, temporary, os.O_WRONLY | os.O_CREAT) as descriptor:
        try:
            os.truncate(descriptor, 0)  # what a killed process left
            with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
                yield file
            publish_path(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _OF_WRITES:
                error.filename = os.fspath(path)  # a write that fails names none
            raise


@contextlib.contextmanager
def writing_folder(path: pathlib.Path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder that takes its name when the block ends well; one process at a time writes it.

    Args:
      path: its name.
      overwrite: whether a folder of that name is replaced.

    Raises:
      ValueError: another process writes it, or it exists and is not to be replaced.
      OSError: it cannot be written.
    """
    temporary, old = _temporary(path), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _held(path, temporary, os.O_RDONLY | os.O_DIRECTORY):
        try:
            for each in (*temporary.iterdir(), old):  # what a killed process left
                shutil.rmtree(each) if each.is_dir() else each.unlink(missing_ok=True)
            yield temporary
            if path.exists():
                if not overwrite:
                    raise ValueError(f"{path} exists. Give another path.")
                os.rename(path, old)
            publish_path(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.writing")


@contextlib.contextmanager
def _held(path: pathlib.Path, temporary: pathlib.Path, mode: int) -> Iterator[int]:
    """Opens what will be at `path`, and holds its lock, which ends with the process."""
    while True:
        try:
            if mode & os.O_DIRECTORY:
                temporary.mkdir(exist_ok=True)
            descriptor = os.open(temporary, mode, 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(temporary, descriptor):  # the last holder did not rename it just now
                yield descriptor
                return
        except BlockingIOError:
            raise ValueError(
                f"{path}: another process writes it. Wait until it has ended, or give another path."
            ) from None
        finally:
            os.close(descriptor)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Asks whether a file could be written now, before the work that it takes.

    Raises:
      ValueError: another process writes it.
      OSError: it cannot be written.
    """
    check_file(path)
    file = pathlib.Path(path)
    temporary = _temporary(file)
    if temporary.exists():
        with _held(file, temporary, os.O_WRONLY):
            pass


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; see `writing`."""
    with writing(path) as file:
        file.write(text)


def write_origin(folder: pathlib.Path, origin: Origin) -> None:
    """Writes `origin.json` into a version that is being made.

    Args:
      folder: where the file goes.
      origin: what the caller knows of the version: weights, data, rows. The version of this package
        is added.
    """
    told = {"qianmo": qianmo.__version__, **origin}
    text = json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / ORIGIN).write_text(text + "\n", encoding="utf-8")


def next_version(*base_paths: str | os.PathLike[str]) -> int:
    """One above the highest version folder."""
    names = (path.name for base in base_paths for path in pathlib.Path(base).glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0) + 1


class Draft:
    """A version under a temporary name.

    Attributes:
      folder: where it lies; from `commit` on under its number.
      version: the number.
    """

    def __init__(self, base_path: pathlib.Path, version: int) -> None:
        self.version = version
        self.folder = base_path / f".{version}.writing"
        self.target = base_path / str(version)

    def commit(self) -> None:
        """Gives the version its number."""
        publish_path(self.folder, self.target)
        self.folder = self.target


@contextlib.contextmanager
def _locked(base: pathlib.Path, refusal: type[ValueError]) -> Iterator[IO[str]]:
    """Makes the folder and holds its lock, which ends with the process."""
    path = base / LOCK
    while True:
        try:
            base.mkdir(parents=True, exist_ok=True)
            opened = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise refusal(f"{base} cannot be written: {error.strerror}.") from error
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise refusal(
                    f"{base}: another export writes a version there. Wait until it has ended, or "
                    "give another path."
                ) from None
            if not _is_at(path, file.fileno()):  # the last holder removed it just now
                continue
            try:
                yield file
            finally:
                if not os.fstat(file.fileno()).st_size:  # nothing to tell the next one
                    path.unlink()
            return


def _is_at(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_free(base_path: str | os.PathLike[str]) -> None:
    """Asks whether a version could be written now, before the work that it takes.

    Raises:
      ExportError: the folder cannot be written, or another process writes a version there.
    """
    check_model_path(base_path)
    with _locked(pathlib.Path(base_path), ExportError):
        pass


@contextlib.contextmanager
def drafting(
    base_path: str | os.PathLike[str],
    version: int | None = None,
    *,
    beside: Sequence[pathlib.Path] = (),
    needed_bytes: int = 0,
    is_published: Callable[[int], bool] = lambda version: True,
    of_models: bool = True,
    refusal: type[ValueError] = ExportError,
) -> Iterator[Draft]:
    """A new version, which takes its number when the block ends well, unless it did before.

    One process at a time writes versions into a folder. While it does, the lock's file holds the
    number, so that the next one knows what a killed one left, and removes it.

    Args:
      base_path: folder of the versions; made if need be.
      version: default: one above the highest, here and in the folders `beside`.
      beside: other folders whose numbers are taken.
      needed_bytes: about what will be written.
      is_published: whether a version with its number, that a killed process wrote, is in use.
      of_models: whether TensorFlow reads the versions, which not every path allows.
      refusal: type of the errors.

    Raises:
      ExportError: the folder cannot be written, the disk is too full, another process writes a
        version, or this one exists.
    """
    base = pathlib.Path(base_path)
    if of_models:
        check_model_path(base)
    with _locked(base, refusal) as file:
        _remove_leftovers(base, file, is_published)
        free = shutil.disk_usage(base).free
        if free < needed_bytes + SPARE_BYTES:
            raise refusal(
                f"{base}: the export takes about {needed_bytes + SPARE_BYTES:,} bytes, and its "
                f"disk has {free:,} free. Make room, or give another path."
            )
        draft = Draft(base, version or next_version(base, *beside))
        if draft.target.exists():
            raise refusal(f"{draft.target} exists; give another version.")
        _note(file, str(draft.version))
        temporary = draft.folder
        try:
            temporary.mkdir()
            yield draft
            if draft.folder == temporary:
                draft.commit()
        except BaseException:
            shutil.rmtree(draft.folder, ignore_errors=True)
            raise
        finally:
            _note(file, "")


def _note(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def _remove_leftovers(
    base: pathlib.Path, file: IO[str], is_published: Callable[[int], bool]
) -> None:
    left = [path for path in base.iterdir() if re.fullmatch(r"\.[0-9]+\.writing", path.name)]
    file.seek(0)
    noted = file.read()
    if noted.isdigit() and not is_published(int(noted)):
        left.append(base / noted)
    for path in left:
        if path.exists():
            shutil.rmtree(path)
            logging.getLogger(__name__).warning("%s: removed what a killed export left", path)


@contextlib.contextmanager
def drafting_fed(
    base: pathlib.Path, version: int | None, needed_bytes: int
) -> Iterator[tuple[Draft, Draft]]:
    """`drafting` of a graph and of the one that makes its vectors, both under one number."""
    lookup_base = base.with_name(base.name + LOOKUP)
    with (
        drafting(base, version, beside=[lookup_base]) as graph,
        drafting(
            lookup_base,
            graph.version,
            needed_bytes=needed_bytes,
            is_published=lambda version: (base / str(version)).exists(),
        ) as lookup,
    ):
        yield graph, lookup
        # A graph never stands there without what makes its inputs.
        lookup.commit()
        graph.commit()


def write_serving_files(base_path: pathlib.Path) -> None:
    """Writes `models.config` and `batching_parameters.txt` beside the versions."""
    write_text(
        base_path / "models.config",
        "model_config_list {\n  config {\n"
        f'    name: "{base_path.name}"\n    base_path: "{base_path.resolve()}"\n'
        '    model_platform: "tensorflow"\n  }\n}\n',
    )
    write_text(
        base_path / "batching_parameters.txt",
        f"max_batch_size {{ value: {MAX_BATCH_SIZE} }}\n"
        "batch_timeout_micros { value: 1000 }\n"
        "max_enqueued_batches { value: 256 }\n"
        "num_batch_threads { value: 4 }\n",
    )
