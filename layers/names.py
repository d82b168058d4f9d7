"""Names that people type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that is most like a name, in upper or lower case; None if none is.

    Example:
    >>> nearest("deepFM", ["dcn", "deepfm"])
    'deepfm'
    """
    by_lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return by_lower[near[0]] if near else None
