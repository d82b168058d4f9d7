"""What is raised where data cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pyarrow as pa


class DataError(ValueError):
    """Data that does not fit the schema, or cannot be read.

    Rows in its message are counted from 0 within the file, without a CSV's header line.
    """


class NoRowsError(DataError):
    """Files that can be read, and hold no rows."""


@contextlib.contextmanager
def readable(file: object, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises on a bad file into a `DataError`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise DataError(
            f"{file}: cannot be read as {kind}: {reason}. It is empty, truncated or corrupt; "
            "write it again."
        ) from error
