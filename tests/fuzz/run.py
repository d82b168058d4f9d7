"""Runs one harness under its coverage-guided fuzzer: `make fuzz TARGET=csv SECONDS=60`.

C++ harnesses run under libFuzzer (clang), with the address and the undefined behaviour sanitizer;
those in Python under atheris, which guides itself by the branches of our readers in Python.
Inputs that were of interest stay in build/fuzz/TARGET/corpus, and what fails is written beside it.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import pathlib
import subprocess
import sys
import tempfile

from cores import FLAGS, ROOT, sources
from fuzz import store_seeds

NATIVE = {
    "embedding_version": store_seeds.embedding_versions,
    "support_log": store_seeds.support_logs,
}
# Each has `seeds()` and `check(data, folder)`, which returns what the reader made of the input and
# fails where that is wrong.
PYTHON = ("csv", "entries", "parquet", "tfrecord", "json_rows", "recipe", "manifest")
# MiB of memory, TensorFlow's included, and seconds for one input, after which it is a failure.
_RSS, _TIMEOUT = 4096, 20


def module(target: str) -> str:
    """The module of a harness in Python."""
    return f"fuzz.fuzz_{target}"


def native(target: str) -> list[str]:
    """Compiles a C++ harness; returns the command."""
    program = ROOT / "build" / "fuzz" / target / "harness"
    sanitize = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    files = sources(ROOT / f"tests/fuzz/{target}_fuzz.cc")
    subprocess.run(["clang++", *FLAGS, *sanitize, *files, "-o", str(program)], check=True)
    return [str(program)]


def python(target: str, options: list[str]) -> None:
    """Fuzzes in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["qianmo.pipelines", "qianmo.export", "fuzz"]):
        harness = importlib.import_module(module(target))
    outcomes: collections.Counter[str] = collections.Counter()
    folder = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"))
    log = ROOT / "build" / "fuzz" / target / "outcomes"

    def check(data: bytes) -> None:
        outcomes[harness.check(data, folder)] += 1
        count = outcomes.total()
        if count & (count - 1) == 0 or count % 256 == 0:
            log.write_text(", ".join(f"{n} {what}" for what, n in outcomes.most_common()))

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
    make = NATIVE[target] if target in NATIVE else importlib.import_module(module(target)).seeds
    for number, seed in enumerate(make()):
        (work / "seeds" / str(number)).write_bytes(seed)
    options = [
        str(work / "corpus"),
        str(work / "seeds"),
        f"-max_total_time={values.seconds}",
        f"-rss_limit_mb={_RSS}",
        f"-timeout={_TIMEOUT}",
        f"-artifact_prefix={work}/",
        "-max_len=65536",
        "-verbosity=1",
        "-print_final_stats=1",
    ]
    if target in NATIVE:
        sys.exit(subprocess.run([*native(target), *options], check=False).returncode)
    python(target, options)


if __name__ == "__main__":
    main()
