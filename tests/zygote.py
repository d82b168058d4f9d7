"""Runs programs in processes that are forked from one that has imported everything.

A program starts within milliseconds so, with flags, exit code, signals and streams of its own. What
happens while TensorFlow is imported needs a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import qianmo
from qianmo.pipelines import silence

# The longest that a test waits for a program, on a busy machine.
PATIENCE = 300.0
_BAR = re.compile(r"[^\[]*\[\d+:\d\d(:\d\d)?[^\[]*\]\S*")


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """The lines of stderr that are no progress bars."""
        return own_lines(self.stderr)


def own_lines(stderr: str) -> list[str]:
    """The lines that are no progress bars."""
    lines = [line.strip() for line in re.split("[\r\n]+", stderr)]
    return [line for line in lines if line and not _BAR.fullmatch(line)]


class Program:
    """A program that was started.

    Args:
      zygote: its parent.
      pid: its process.
      folder: of the files `stdout` and `stderr`.
    """

    def __init__(self, zygote: Zygote, pid: int, folder: pathlib.Path) -> None:
        self._zygote = zygote
        self.pid = pid
        self._folder = folder

    def read(self, stream: str) -> str:
        """What it has written to a stream so far."""
        return (self._folder / stream).read_text(encoding="utf-8", errors="replace")

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def until(self, happened: Callable[[], Any], what: str) -> None:
        """Waits for something that the program does; fails if it ends before."""
        deadline = time.monotonic() + PATIENCE
        while not happened():
            state = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state != "Z", f"it ended before {what}: {self.read('stderr')[-2000:]}"
            assert time.monotonic() < deadline, (
                f"not in time: {what}: {self.read('stderr')[-2000:]}"
            )
            time.sleep(0.002)

    def wait(self) -> Ended:
        """Waits for its end."""
        code = self._zygote.ask({"wait": self.pid})
        return Ended(code, self.read("stdout"), self.read("stderr"))


class Zygote:
    """The process that programs are forked from; a context manager.

    Args:
      folder: for what the programs write to their streams.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._count = 0
        # Programs start with the settings of a user, not with those of the tests.
        environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "zygote").open("w"),
            env=environment,
            text=True,
        )

    def imported(self) -> str:
        """What importing the whole package wrote to stderr."""
        return (self._folder / "zygote").read_text()

    def ask(self, request: Mapping[str, Any]) -> int:
        """Sends a request and returns the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self.imported()
        return int(answer)

    def start(
        self,
        program: str,
        *arguments: str | os.PathLike[str],
        cwd: str | os.PathLike[str] = ".",
        environment: Mapping[str, str] | None = None,
        file_bytes: int | None = None,
        memory_bytes: int | None = None,
        before: str = "",
    ) -> Program:
        """Starts a program of `qianmo.pipelines`.

        Args:
          program: its module.
          arguments: its command line.
          cwd: its working directory.
          environment: variables to set.
          file_bytes: the largest file that it may write.
          memory_bytes: how far its address space may grow beyond what it has at its start.
          before: Python to run first, which may replace what cannot be caused from outside.
        """
        self._count += 1
        folder = self._folder / f"{self._count:03d}-{program}"
        folder.mkdir()
        for stream in ("stdout", "stderr"):
            (folder / stream).touch()
        request = {
            "program": program,
            "argv": list(map(os.fspath, arguments)),
            "cwd": os.fspath(cwd),
            "environment": dict(environment or {}),
            "streams": str(folder),
            "file_bytes": file_bytes,
            "memory_bytes": memory_bytes,
            "before": before,
        }
        return Program(self, self.ask(request), folder)

    def run(self, program: str, *arguments: str | os.PathLike[str], **options: Any) -> Ended:
        """Starts a program and waits for its end."""
        return self.start(program, *arguments, **options).wait()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve() -> None:
    """Forks and waits as standard input says, a line of JSON a request."""
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            running.remove(request["wait"])
            continue
        pid = os.fork()
        if not pid:
            _become(request)
        running.add(pid)
        print(pid, flush=True)
    for pid in running:  # of tests that failed
        os.kill(pid, signal.SIGKILL)


def _become(request: Mapping[str, Any]) -> None:
    """Turns this process into the program; does not return."""
    code = 70
    try:
        sys.stdin.close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(os.path.join(request["streams"], name), os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        if request["file_bytes"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
        if request["memory_bytes"] is not None:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + request["memory_bytes"]
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.argv = [f"qianmo-{request['program']}", *request["argv"]]
        exec(request["before"], {})
        module = importlib.import_module(f"qianmo.pipelines.{request['program']}")
        module.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.pop(0)  # of this script's folder
    silence.silence()
    for found in pkgutil.walk_packages(qianmo.__path__, "qianmo."):
        if not found.name.endswith("._qianmo_ops"):  # TensorFlow's to load, by those who need it
            importlib.import_module(found.name)
    _serve()
