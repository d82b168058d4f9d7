"""The one door to the benchmarks.

    python benchmarks/run.py NAME [--quick]

Prints a table and writes benchmarks/results/NAME.json. With --quick the program shows that it runs,
on fewer rows and seeds, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import platform
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import tensorflow as tf

import qianmo

RESULTS = pathlib.Path(__file__).parent / "results"
NAMES = {
    "adgroups": "a tower for each of 10 to 100,000 adgroups beside one trunk",
    "ctr": "CTR models against DeepCTR on MovieLens-1M",
    "distillation": "the dual DNN and its relatives on MovieLens-1M",
    "distillation_speed": "a student in serving against its teachers",
    "domains_amazon": "retrieval models of Amazon's departments in pairs, fused and apart",
    "domains_apart": "KuaiRand's tabs with labels and features of their own, by some designs",
    "domain_cost": "one model of five tabs against five models, and 2 to 32 domains in one",
    "domains_kuairand": "KuaiRand's tabs in one model, by many designs",
    "domains_ml1m": "MovieLens-1M's three ages of users in one model, by many designs",
    "embedding_exports": "the forms of an export against Keras, and AUC lost by small dtypes",
    "embedding_faults": "swaps of graphs and embeddings under load, and damaged files",
    "embedding_lookup": "rows/s of the op against tf.gather, memory, time to open",
    "identity": "knowing which data a run read, against an epoch",
    "kuairand": "KuaiRand clicks",
    "meta_coldstart": "new users and new films, MeLU's four states",
    "meta_ctr": "towers that adapt to each user, on clicks and likes",
    "meta_ranking": "click, like and long view by towers that adapt to each user",
    "meta_serving": "adapted scores against the plain score of one exported graph",
    "meta_speed": "episodes in the training step, and MeLU's net",
    "publish": "a student's graph beside tables of 1,000 and 10 million rows",
    "redis_lookup": "rows from Redis by the op against redis-py, and a node that is killed",
    "retrieval": "the next film of each user, by two towers that adapt",
    "serving": "the embedded server against a direct session.run",
    "support_store": "rows of a million tasks: rates, memory, eviction, threads, kills",
}


def commit() -> str:
    """The commit that is checked out, with a + when files differ from it; empty outside git."""
    root = pathlib.Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    return git("rev-parse", "--short=12", "HEAD") + "+" * bool(changed)


def environment() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        lines = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        cpu = lines[0].split(":")[1].strip() if lines else cpu
    return {
        "qianmo": qianmo.__version__,
        "commit": commit(),
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
        "cpu": cpu,
        "cores": os.cpu_count(),
    }


def main() -> None:
    """Runs one benchmark."""
    listing = "\n".join(f"  {name:<20}{what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"names:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=NAMES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer rows and seeds; not recorded")
    arguments = parser.parse_args()
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    tables = importlib.import_module("tables")
    found = importlib.import_module(f"bench_{arguments.name}").run(quick=arguments.quick)
    result = {"name": arguments.name, "environment": environment(), **found}
    print(tables.markdown(result))
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{arguments.name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
