"""Runs one harness under its coverage-guided fuzzer: `make fuzz TARGET=csv SECONDS=60`.

C++ harnesses run under libFuzzer (clang), with the address and the undefined behaviour sanitizer;
those in Python under atheris, which guides itself by the branches of our readers in Python.
Inputs that were of interest stay in build/fuzz/TARGET/corpus, and what fails is written beside it.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import importlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from cores import FLAGS, ROOT, sources

NATIVE = ("embedding_version", "support_log")
# The module fuzz_TARGET has `seeds()` and `check(data, folder)`, which returns what the reader made
# of an input, and fails where that is wrong.
PYTHON = ("csv", "entries", "parquet", "tfrecord", "json_rows", "recipe", "manifest")
# MiB of memory, TensorFlow's included, and seconds for one input, after which it is a failure.
_RSS, _TIMEOUT = 4096, 20


def compiled(target: str, program: pathlib.Path) -> None:
    """Compiles a C++ harness for libFuzzer."""
    sanitize = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    files = sources(ROOT / f"tests/fuzz/{target}_fuzz.cc")
    subprocess.run(["clang++", *FLAGS, *sanitize, *files, "-o", str(program)], check=True)


def instrumented(target: str) -> Any:
    """The module of a harness in Python, it and the readers instrumented."""
    import atheris

    with atheris.instrument_imports(include=["qianmo.pipelines", "qianmo.export", "fuzz"]):
        return importlib.import_module(f"fuzz.fuzz_{target}")


def fuzz(harness: Any, work: pathlib.Path, seconds: int, options: list[str]) -> None:
    """Fuzzes in this process, and ends it.

    It ends at once: libFuzzer's exit waits for threads of the libraries, at times for ever.
    """
    import atheris

    begin = time.monotonic()
    outcomes: collections.Counter[str] = collections.Counter()
    folder = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))

    def check(data: bytes) -> None:
        try:
            outcomes[harness.check(data, folder)] += 1
        except BaseException:
            (work / f"failed-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)
            raise
        count = outcomes.total()
        if count & (count - 1) == 0 or count % 256 == 0:
            text = ", ".join(f"{number} {what}" for what, number in outcomes.most_common())
            (work / "outcomes").write_text(text + "\n")
        if time.monotonic() - begin > seconds:
            print(f"Done {count} runs in {seconds} seconds: {dict(outcomes)}", flush=True)
            os._exit(0)

    atheris.Setup([sys.argv[0], *options], check)
    atheris.Fuzz()


def main() -> None:
    """Fuzzes a target for a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=[*NATIVE, *PYTHON])
    parser.add_argument("--seconds", type=int, default=300)
    values = parser.parse_args()
    target = values.target
    work = ROOT / "build" / "fuzz" / target
    for name in ("corpus", "seeds"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if target in PYTHON:
        harness = instrumented(target)
        seeds = harness.seeds()
    else:
        from fuzz import store_seeds

        seeds = store_seeds.of(target)
    for number, seed in enumerate(seeds):
        (work / "seeds" / str(number)).write_bytes(seed)
    options = [
        str(work / "corpus"),
        str(work / "seeds"),
        f"-rss_limit_mb={_RSS}",
        f"-timeout={_TIMEOUT}",
        f"-artifact_prefix={work}/",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    if target in PYTHON:
        fuzz(harness, work, values.seconds, options)
    program = work / "harness"
    compiled(target, program)
    options.append(f"-max_total_time={values.seconds}")
    sys.exit(subprocess.run([program, *options], check=False).returncode)


if __name__ == "__main__":
    main()
