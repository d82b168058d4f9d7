r"""Quotes of a CSV file, checked as it is read: RFC 4180 is the dialect.

A cell may stand in double quotes, within which a comma, a line end and, doubled, a quote are text.
pyarrow's parser also takes what other dialects write, and gives other text than these mean:
`"a\"b"` as `a\b"`, `"a"b` as `ab`, and a quote that is never closed as one cell to the file's end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa

from qianmo.pipelines.data.errors import DataError
from qianmo.pipelines.data.files import DataFile

_BOM = b"\xef\xbb\xbf"
_CHUNK = 2**20
_QUOTE, _LINE_FEED, _RETURN = b'"\n\r'
# What stands before a quote that opens a cell, and after one that closes it. A quote beside the
# other is a doubled one.
_BORDER = np.zeros(256, bool)
_BORDER[[*b',\n\r"']] = True


class _Fault(NamedTuple):
    """A quote where none should be: its offset in the file, and what it does."""

    offset: int
    text: str


class CheckedStream:
    """The bytes of a file as pyarrow reads them, decompressed, with all quotes checked.

    In RFC 4180 a quote opens a quoted cell if the number of quotes before it is even, else it
    closes one. A doubled quote closes the cell and opens it again.

    Args:
      file: the file.
    """

    def __init__(self, file: DataFile) -> None:
        self.closed = False
        self._file = file
        self._stream = pa.input_stream(str(file.path))
        self._offset = 0  # of what is read next
        self._held = b""  # read, and not given yet
        self._quotes = 0  # before it
        self._last_quote = 0
        self._last = _LINE_FEED

    def readable(self) -> bool:
        """True, for pyarrow."""
        return True

    def close(self) -> None:
        """Closes the file."""
        self.closed = True
        self._stream.close()

    def read(self, size: int) -> bytes:
        """The next bytes; none at the end.

        Raises:
          DataError: a quote among them is none of RFC 4180.
        """
        read: bytes = self._stream.read(size - len(self._held))
        data, self._held = self._held + read, b""
        if read and data.endswith(b"\r"):
            # Of a return and a line feed in two blocks pyarrow drops the latter, also in quotes.
            data, self._held = data[:-1], data[-1:]
            if not data:
                return self.read(size)
        if (fault := self._fault(data)) is not None:
            row = self._row(fault.offset)
            where = "in the header" if row < 0 else f"row {row} (counted from 0)"
            raise DataError(
                f"{self._file}, {where}: {fault.text}. A CSV should follow RFC 4180: a cell with a "
                "quote in it stands in quotes as a whole, and the quote in it is doubled. Write it "
                "so, or as Parquet."
            )
        return data

    def _fault(self, data: bytes) -> _Fault | None:
        if not data:
            is_open = self._quotes % 2
            return _Fault(self._last_quote, "its quote is never closed") if is_open else None
        first = 0
        if not self._offset and data.startswith(_BOM):
            first = len(_BOM)
        codes = np.frombuffer(data, np.uint8)[first:]
        start, self._offset = self._offset + first, self._offset + len(data)
        if not len(codes):
            return None
        before, self._last = self._last, int(codes[-1])
        if self._last_is_closing(before) and not _BORDER[codes[0]]:
            return _Fault(self._last_quote, "text follows a closing quote")
        at = np.flatnonzero(codes == _QUOTE)
        if not len(at):
            return None
        is_open = self._quotes % 2
        opening, closing = at[is_open::2], at[1 - is_open :: 2]
        neighbour = np.where(opening > 0, codes[opening - 1], before)
        wrong = opening[~_BORDER[neighbour]]
        closing_inside = closing[closing < len(codes) - 1]  # the last one's neighbour comes later
        wrong_end = closing_inside[~_BORDER[codes[closing_inside + 1]]]
        self._quotes += len(at)
        self._last_quote = start + int(at[-1])
        if len(wrong) and not (len(wrong_end) and wrong_end[0] < wrong[0]):
            return _Fault(start + int(wrong[0]), "a quote stands in a cell that is not in quotes")
        if len(wrong_end):
            return _Fault(start + int(wrong_end[0]), "text follows a closing quote")
        return None

    def _last_is_closing(self, before: int) -> bool:
        return before == _QUOTE and self._quotes > 0 and self._quotes % 2 == 0

    def _row(self, offset: int) -> int:
        """The row of a byte, counted from 0 after the header; blank lines are none."""
        starts = quotes = done = 0
        was_end = True
        with pa.input_stream(str(self._file.path)) as stream:
            while data := stream.read(min(_CHUNK, offset + 1 - done)):
                codes = np.frombuffer(data, np.uint8)
                is_quote = codes == _QUOTE
                inside = (quotes + np.cumsum(is_quote)) % 2 == 1
                is_end = np.isin(codes, (_LINE_FEED, _RETURN)) & ~inside
                starts += int((~is_end & np.append(was_end, is_end[:-1])).sum())
                quotes += int(is_quote.sum())
                was_end = bool(is_end[-1])
                done += len(data)
        return starts - 2
