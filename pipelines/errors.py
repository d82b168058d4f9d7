"""What went wrong, as one sentence for whoever started a program.

`sentence` covers what a user can cause and mend: data, recipes, disks, networks, memory. For all
else it has no words, and the program shows the traceback.
"""

from __future__ import annotations

import dis
import errno
import os
import pathlib
import re
import sys
import traceback
import types
from typing import Any

from qianmo.pipelines import plugins

PACKAGE = str(pathlib.Path(__file__).parents[1]) + os.sep

_FREE_SPACE = "Free space there, and give the same command again."
_MEMORY = "Give the machine more, or lower the recipe's `batch_size` and `shuffle_rows`."
# What to do, by what the operating system said.
REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), and give the same command again.",
    errno.EROFS: "Give a path that can be written.",
    errno.EACCES: "Give a path that this user may use, or change its permissions.",
    errno.EPERM: "Give a path that this user may use, or change its permissions.",
    errno.ENOTDIR: "A part of the path is a file; give another path.",
    errno.EISDIR: "It is a folder; give a file.",
    errno.ENOENT: "Check the path.",
    errno.EEXIST: "Give another path.",
    errno.ENAMETOOLONG: "Give a shorter path.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENOMEM: _MEMORY,
    errno.EADDRINUSE: "Another process listens there; stop it, or give another port.",
    errno.ECONNREFUSED: "Nothing listens there; start the server, or check the address.",
}
# Codes of TensorFlow's errors that come from outside: files, networks, memory.
_FROM_OUTSIDE = (
    "AlreadyExistsError",
    "DataLossError",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "NotFoundError",
    "PermissionDeniedError",
    "ResourceExhaustedError",
    "UnavailableError",
    "UnimplementedError",
)
# How Keras and AutoGraph begin the messages that they put around another one.
_WRAPPED = ("Exception encountered when calling", "in user code:")


def sentence(error: BaseException) -> str | None:
    """One sentence or two on an error that a user can mend; None for an error of this package.

    What follows the first line is details.
    """
    if isinstance(error, MemoryError):
        return f"The memory was not enough{_detail(error)}. {_MEMORY}"
    if isinstance(error, OSError):
        return _system(error)
    if _is_a(error, "tensorflow.python.framework.errors_impl", "OpError"):
        return _tensorflow(error)
    if _is_a(error, "grpc", "RpcError"):
        return f"{_code(error)}: {_first_line(error.details())}"  # type: ignore[attr-defined]
    if _is_a(error, "redis.exceptions", "RedisError") or _is_a(
        error, "http.client", "HTTPException"
    ):
        return f"{type(error).__name__}: {_first_line(error)}"
    refusal = _refusal(error)
    return None if refusal is None else str(refusal)


def _is_a(error: BaseException, module: str, name: str) -> bool:
    """Whether an error is of a class of a module; one that was not imported raised nothing."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)


def _first_line(text: object) -> str:
    return str(text).strip().partition("\n")[0].rstrip(".")


def _detail(error: BaseException) -> str:
    return f": {_first_line(error)}" if str(error).strip() else ""


def _code(error: Any) -> str:
    return str(error.code().name)


def _system(error: OSError) -> str:
    """What the operating system refused, and the remedy."""
    if error.errno is None:
        return str(error)
    paths = [
        os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes)
    ]
    # What is no number of the system's, as of addresses, has words of its own.
    known = error.errno in errno.errorcode and (paths or not error.strerror)
    what = os.strerror(error.errno) if known else str(error.strerror)
    return said(" -> ".join(paths), what, error.errno)


def said(where: str, what: str, number: int | None) -> str:
    """A path or an address, what was wrong with it, and the remedy where one is known."""
    text = f"{where}: {what}" if where else what
    return f"{text.rstrip('.')}. {REMEDIES.get(number or 0, '')}".rstrip()


def _tensorflow(error: Any) -> str | None:
    """TensorFlow's errors on files begin with the path and end with the system's words."""
    # Without the names that TensorFlow puts around it.
    line = re.sub(r"^(\{\{.*?\}\} )+| \[Op:\w+\].*$", "", _first_line(error.message))
    for number, words in ((n, os.strerror(n)) for n in errno.errorcode):
        if line.endswith(f"; {words}"):
            return said(line.removesuffix(f"; {words}"), words, number)
    if type(error).__name__ not in _FROM_OUTSIDE:
        return None
    if type(error).__name__ == "ResourceExhaustedError":
        return f"The memory was not enough: {line}. {_MEMORY}"
    return f"{line}."


def culprit(error: BaseException) -> str:
    """Whose code was at work when an error was raised: this package's, or a plug-in's."""
    name = "qianmo"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if plugins.has_frame(frame):
            name = f"the plug-in {frame.f_globals['__name__']}"
        elif frame.f_code.co_filename.startswith(PACKAGE):
            name = "qianmo"
    return name


def _refusal(error: BaseException) -> BaseException | None:
    """The error, if it was raised on purpose, without what Keras put around it."""
    while error.__context__ is not None and str(error).startswith(_WRAPPED):
        error = error.__context__
    if type(error).__module__.startswith("qianmo."):
        return error
    is_kind = isinstance(error, ImportError | RuntimeError | ValueError)
    is_kind = is_kind and not isinstance(error, NotImplementedError | RecursionError)
    return error if is_kind and _was_raised_here(error.__traceback__) else None


def _was_raised_here(trace: types.TracebackType | None) -> bool:
    """Whether a `raise` of this package or a plug-in made the error, and not a library."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    opcode = dis.opname[code.co_code[trace.tb_lasti]]
    is_ours = code.co_filename.startswith(PACKAGE) or plugins.has_frame(trace.tb_frame)
    return opcode == "RAISE_VARARGS" and is_ours
