"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
from collections.abc import Iterator

LOCK = ".lock"


@contextlib.contextmanager
def alone(folder: str | os.PathLike[str], doing: str) -> Iterator[None]:
    """Holds a folder's lock, which ends with the process however it ends.

    Args:
      folder: made where it is not there.
      doing: what the holder does, for the message that others get, such as "trains".

    Raises:
      ValueError: another process holds it.
      OSError: the folder cannot be made or written.
    """
    path = pathlib.Path(folder)
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use: {holder}. Wait until it has ended, or give another folder."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} {doing} there")
        file.flush()
        try:
            yield
        finally:
            if is_new and [each.name for each in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()  # what was refused leaves nothing behind
                path.rmdir()
