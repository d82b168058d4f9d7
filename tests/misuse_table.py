"""What every program does when it is misused: the one source of the tests and of the documents.

    python tests/misuse_table.py --write

writes the table into docs/programs.md. `test_misuse.py` runs its cells.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
import tomllib
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "programs.md"
BEGIN, END = "<!-- misuse: begin -->\n", "<!-- misuse: end -->\n"
TESTS = "tests/pipelines"

Change = Callable[[pathlib.Path], object]


def nothing(_: pathlib.Path) -> None:
    """Changes nothing; the command line is the misuse."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is refused, or that says what is unusual.

    Attributes:
      says: regex of the `error:` line; where the exit code is 0, of stdout.
      words: flags after the program's usual ones, which they replace.
      change: makes the misuse in the folder where the program runs.
      code: the exit code.
      done_before: whether the usual command has succeeded before the change.
      file_bytes: the largest file that the run may write.
      goes_on: whether what was done by then stays, and the same command ends well once the misuse
        is over. Otherwise no file may differ from before.
    """

    says: str
    words: tuple[str, ...] = ()
    change: Change = nothing
    code: int = 1
    done_before: bool = False
    file_bytes: int | None = None
    goes_on: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Killed:
    """SIGKILL before a function, `module:name`. Then the usual command ends well."""

    at: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twice:
    """The usual command while the other one, which is killed then, has reached its function.

    Attributes:
      says: regex of the `error:` line; empty where it ends well beside the other one.
    """

    says: str


@dataclasses.dataclass(frozen=True)
class Test:
    """Another test, `file::function`, and what it shows."""

    name: str
    shows: str


@dataclasses.dataclass(frozen=True)
class Never:
    """Why it cannot happen."""

    reason: str


Cell = Run | Killed | Twice | Test | Never

# Program -> its usual command line, and what it makes. {redis} and {server} are addresses.
COMMANDS = {
    "prepare": (
        "--dataset=movielens_1m --source=ml-1m --output=out/rows",
        "out/rows/data.json",
    ),
    "schema": ("--data=data/train.parquet --output=out/recipe.py", "out/recipe.py"),
    "train": (
        "--config=recipe.py --model_dir=out/trained --config.train.epochs=1",
        "out/trained/report.html",
    ),
    "evaluate": ("--model_dir=plain --output=out/metrics.json", "out/metrics.json"),
    "adapted": ("--model_dir=meta --output=out/metrics.json", "out/metrics.json"),
    "compare": (
        "--model_dir=plain --single=single_1,single_2 --output=out/page.html",
        "out/page.html",
    ),
    "export": (
        "--model_dir=dual --model_base_path=out/dual --form=store",
        "out/dual/1/saved_model.pb",
    ),
    "online": (
        "--model_dir=dual --model_base_path=out/dual --folder=stream --online_dir=out/online "
        "--form=in_graph --checkpoint_rows=64 --stop_at_end",
        "out/dual/1/saved_model.pb",
    ),
    "serve": ("--embedded --model_base_path=served/dual --port=0 --rest_api_port=0", ""),
    "predict": (
        "--server={server} --data=data/test.parquet --schema=dual/recipe.json --batch_size=64 "
        "--output=out/scores.jsonl",
        "out/scores.jsonl",
    ),
    "load_redis": ("--store=served/dual_embeddings --redis={redis}", ""),
}


def _table(path: pathlib.Path, change: Callable[[dict], object], rows: int | None = None) -> None:  # type: ignore[type-arg]
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pq.read_table(path).slice(0, rows).to_pydict()
    change(columns)
    schema = pq.read_schema(path) if rows == 0 else None
    pq.write_table(pa.table(columns, schema=schema), path)


def empty(name: str) -> Change:
    """A table without rows."""
    return lambda place: _table(place / name, lambda _: None, rows=0)


def of_text(name: str) -> Change:
    """A table whose items are words."""

    def change(columns: dict[str, list[object]]) -> None:
        columns["item"] = [f"item {item}" for item in columns["item"]]

    return lambda place: _table(place / name, change)


def of_others(name: str) -> Change:
    """A table of the same rows with other labels."""

    def change(columns: dict[str, list[int]]) -> None:
        columns["click"] = [1 - click for click in columns["click"]]

    return lambda place: _table(place / name, change)


def text(name: str, content: str = "This is no such file.\n") -> Change:
    """A file that holds other text."""

    def change(place: pathlib.Path) -> None:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(content)

    return change


def of_format_9(name: str) -> Change:
    """A recipe.json of another version of the package."""

    def change(place: pathlib.Path) -> None:
        config = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**config, "format": 9}))

    return change


def weights_of_others(source: str, target: str) -> Change:
    """Weights that an older version of a model would have: others by name."""

    def change(place: pathlib.Path) -> None:
        shutil.rmtree(place / target, ignore_errors=True)
        shutil.copytree(place / source, place / target)

    return change


def older_store(place: pathlib.Path) -> None:
    """A store's manifest of another format."""
    manifest = place / "served" / "dual_embeddings" / "1" / "MANIFEST"
    manifest.write_text(manifest.read_text().replace("embeddings 1", "embeddings 9", 1))


def other_store(place: pathlib.Path) -> None:
    """Another store whose version has the number of the first one's."""
    import numpy as np

    from qianmo.export import embedding_shards as shards

    table = shards.Table(name="user", dim=2, num_rows=3)
    shards.write(place / "other", 1, [(table, [np.ones((3, 2), np.float32)])])
    shards.publish(place / "other", 1)


def schema_of_version_9(place: pathlib.Path) -> None:
    """A schema with a key that this version does not know."""
    path = place / "dual" / "recipe.json"
    config = json.loads(path.read_text())
    config["schema"]["buckets"] = {}
    path.write_text(json.dumps(config))


def schema_of_others(place: pathlib.Path) -> None:
    """A schema of rows without a feature."""
    path = place / "dual" / "recipe.json"
    config = json.loads(path.read_text())
    config["schema"]["features"] = [f for f in config["schema"]["features"] if f["name"] != "kind"]
    path.write_text(json.dumps(config))


NOWHERE = "No such file or directory|no such file|holds no recipe|there is none"
UNWRITABLE = r"^error: /sys/\S+ .*(Permission denied|Read-only file system|Operation not permitted)"
FULL = r"File too large\. Raise the limit of a file's size"
WRITES_IT = "another process writes it. Wait until it has ended, or give another path"
NO_OUTPUT = Never("It writes no file.")
READS_NONE = Never("It reads nothing that another version of this package wrote.")

TABLE: dict[str, dict[str, Cell]] = {
    "prepare": {
        "missing input": Run(says=NOWHERE, words=("--source=nowhere",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--output=/sys/rows",)),
        "full disk": Run(says=FULL, file_bytes=1000),
        "wrong type": Run(
            says="ratings.dat", change=text("ml-1m/ratings.dat", "1::1::five::1000\n")
        ),
        "older version": READS_NONE,
        "killed midway": Killed(at="os:rename"),
        "started twice": Twice(says=WRITES_IT),
        "empty data": Run(says="ratings.dat", change=text("ml-1m/ratings.dat", "")),
        "other data": Run(
            says="out/rows exists. Give another output, or --overwrite",
            change=text("ml-1m/ratings.dat", "1::1::5::1000\n"),
            done_before=True,
        ),
    },
    "schema": {
        "missing input": Run(says=NOWHERE, words=("--data=nowhere.parquet",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--output=/sys/recipe.py",)),
        "full disk": Run(says=FULL, file_bytes=300),
        "wrong type": Run(says="cannot be read as Parquet", change=text("data/train.parquet")),
        "older version": READS_NONE,
        "killed midway": Killed(at="os:rename"),
        "started twice": Twice(says=WRITES_IT),
        "empty data": Run(says="no rows", change=empty("data/train.parquet")),
        "other data": Run(
            says="out/recipe.py exists. Give another --output",
            change=of_others("data/train.parquet"),
            done_before=True,
        ),
    },
    "train": {
        "missing input": Run(says=NOWHERE, words=("--config.data.train=nowhere.parquet",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--model_dir=/sys/trained",)),
        "full disk": Run(says=FULL, file_bytes=8000, goes_on=True),
        "wrong type": Run(says="column `item`", change=of_text("data/train.parquet")),
        "older version": Run(
            says=r"recipe\.json is no recipe: its format is 9",
            change=of_format_9("out/trained/recipe.json"),
            done_before=True,
        ),
        "killed midway": Killed(at="qianmo.pipelines.training.run:report.write_html"),
        "started twice": Twice(
            says=r"out/trained is in use: process \d+ trains there",
        ),
        "empty data": Run(says="no rows", change=empty("data/train.parquet")),
        "other data": Run(
            says="is finished; the data changed since: data.train",
            change=of_others("data/train.parquet"),
            done_before=True,
        ),
    },
    "evaluate": {
        "missing input": Run(says=NOWHERE, words=("--model_dir=nowhere",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--output=/sys/metrics.json",)),
        "full disk": Run(says=FULL, file_bytes=1000),
        "wrong type": Run(says="column `item`", change=of_text("data/test.parquet")),
        "older version": Run(
            says=r"recipe\.json is no recipe: its format is 9",
            change=of_format_9("plain/recipe.json"),
        ),
        "killed midway": Killed(at="os:rename"),
        "started twice": Twice(says=WRITES_IT),
        "empty data": Run(says="no rows", change=empty("data/test.parquet")),
        "other data": Run(
            says="data.test .* when the run began, and is", change=of_others("data/test.parquet")
        ),
    },
    "adapted": {
        "missing input": Run(says=NOWHERE, words=("--data=nowhere.parquet", "--support=nowhere")),
        "unwritable output": Run(says=UNWRITABLE, words=("--output=/sys/metrics.json",)),
        "full disk": Run(says=FULL, file_bytes=1500),
        "wrong type": Run(says="column `item`", change=of_text("data/test.parquet")),
        "older version": Run(
            says="was written by a version of this package whose models were built otherwise",
            change=weights_of_others("plain/weights", "meta/weights"),
        ),
        "killed midway": Killed(at="os:rename"),
        "started twice": Twice(says=WRITES_IT),
        "empty data": Run(says="no rows", change=empty("data/test.parquet")),
        "other data": Run(
            says="data.test_support .* when the run began, and is",
            change=of_others("data/support.parquet"),
        ),
    },
    "compare": {
        "missing input": Run(says=NOWHERE, words=("--single=single_1,nowhere",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--output=/sys/page.html",)),
        "full disk": Run(says=FULL, file_bytes=1500),
        "wrong type": Run(says="column `item`", change=of_text("data/test.parquet")),
        "older version": Run(
            says="single_2/recipe.json is no recipe: its format is 9",
            change=of_format_9("single_2/recipe.json"),
        ),
        "killed midway": Killed(at="qianmo.pipelines.run_dir:write_json"),
        "started twice": Twice(says=WRITES_IT),
        "empty data": Run(says="no rows", change=empty("data/test.parquet")),
        "other data": Run(
            says="data.test .* when the run began, and is", change=of_others("data/test.parquet")
        ),
    },
    "export": {
        "missing input": Run(says=NOWHERE, words=("--model_dir=nowhere",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--model_base_path=/sys/dual",)),
        "full disk": Run(says=FULL, file_bytes=1000),
        "wrong type": Run(says="column `item`", change=of_text("data/test.parquet")),
        "older version": Run(
            says="was written by a version of this package whose models were built otherwise",
            change=weights_of_others("plain/weights", "dual/weights"),
        ),
        "killed midway": Killed(at="tensorflow:saved_model.save"),
        "started twice": Twice(says="out/dual: another export writes a version there"),
        "empty data": Run(says="no rows", change=empty("data/test.parquet")),
        "other data": Run(
            says="^note: data.test .* when the run began, and is",
            change=of_others("data/test.parquet"),
            code=0,
            goes_on=True,
        ),
    },
    "online": {
        "missing input": Run(says=NOWHERE, words=("--folder=nowhere",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--online_dir=/sys/online",)),
        "full disk": Run(says=FULL, file_bytes=1000, goes_on=True),
        "wrong type": Run(says="column `item`", change=of_text("stream/1.parquet"), goes_on=True),
        "older version": Run(
            says="none of 1 checkpoints can be read",
            change=weights_of_others("plain/weights", "out/online/checkpoints"),
        ),
        "killed midway": Killed(at="qianmo.export.saved_model:export_in_graph"),
        "started twice": Twice(
            says=r"out/online is in use: process \d+ updates its student there",
        ),
        "empty data": Run(
            says="no rows for a step came, so nothing was published",
            change=empty("stream/1.parquet"),
            code=0,
            goes_on=True,
        ),
        "other data": Run(
            says=r"1\.parquet: it holds other bytes than when \d+ of its rows were taken",
            change=empty("stream/1.parquet"),
            done_before=True,
        ),
    },
    "serve": {
        "missing input": Run(
            says="should hold a folder named by a version", words=("--model_base_path=nowhere",)
        ),
        "unwritable output": NO_OUTPUT,
        "full disk": NO_OUTPUT,
        "wrong type": Run(says="saved_model.pb", change=text("served/dual/1/saved_model.pb")),
        "older version": Run(says="MANIFEST: its format is not 1", change=older_store),
        "killed midway": Test(
            f"{TESTS}/test_misuse.py::test_a_killed_server_starts_again_on_its_ports",
            "the same command serves",
        ),
        "started twice": Test(
            f"{TESTS}/test_programs.py::test_a_port_in_use_is_said_before_a_model_is_loaded",
            "refused: the port is in use",
        ),
        "empty data": Run(
            says="should hold a folder named by a version", words=("--model_base_path=out",)
        ),
        "other data": Test(
            "tests/export/test_store.py::test_retrained_embeddings_never_meet_an_old_graph",
            "a graph keeps to its own embeddings",
        ),
    },
    "predict": {
        "missing input": Run(says=NOWHERE, words=("--data=nowhere.parquet",)),
        "unwritable output": Run(says=UNWRITABLE, words=("--output=/sys/scores.jsonl",)),
        "full disk": Run(says=FULL, file_bytes=1000),
        "wrong type": Run(says="column `item`", change=of_text("data/test.parquet")),
        "older version": Run(
            says=r"dual/recipe\.json should be the JSON of a schema.*buckets",
            change=schema_of_version_9,
        ),
        "killed midway": Killed(at="os:rename"),
        "started twice": Twice(says=WRITES_IT),
        "empty data": Run(says="no rows", change=empty("data/test.parquet")),
        "other data": Run(
            says="the model's input `kind` is not a column of the schema", change=schema_of_others
        ),
    },
    "load_redis": {
        "missing input": Run(says="no version is published", words=("--store=nowhere",)),
        "unwritable output": Run(
            says=r"redis://127\.0\.0\.1:1/a: .*[Cc]onnection refused",
            words=("--redis=redis://127.0.0.1:1/a",),
        ),
        "full disk": Test(
            f"{TESTS}/test_misuse.py::test_a_redis_whose_memory_is_full",
            "refused: what is loaded stays",
        ),
        "wrong type": Run(
            says="its checksum differs", change=text("served/dual_embeddings/1/MANIFEST")
        ),
        "older version": Run(says="its format is 9", change=older_store),
        "killed midway": Killed(at="qianmo.export.redis_loader:_each"),
        "started twice": Twice(says=""),
        "empty data": Run(
            says="no version is published",
            change=lambda place: (place / "served/dual_embeddings/CURRENT").unlink(),
        ),
        "other data": Run(
            says="holds another version 1, whose checksum differ",
            words=("--store=other",),
            change=other_store,
            done_before=True,
        ),
    },
}
MISUSES = tuple(TABLE["prepare"])


def words(program: str, **addresses: str) -> list[str]:
    """A program's usual command line."""
    return COMMANDS[program][0].format(**addresses).split()


def _shown(cell: Cell, notes: list[str]) -> str:
    """A cell of the document's table."""
    if isinstance(cell, Run):
        if not cell.code:
            return "said"
        return "refused; goes on afterwards" if cell.goes_on else "refused"
    if isinstance(cell, Killed):
        return "the same command ends well"
    if isinstance(cell, Twice):
        return "the second is refused" if cell.says else "both end well"
    if isinstance(cell, Test):
        return cell.shows
    if cell.reason not in notes:
        notes.append(cell.reason)
    return f"– ({notes.index(cell.reason) + 1})"


def document() -> str:
    """The table as docs/programs.md has it."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = {target.split(":")[0].rpartition(".")[2]: name for name, target in scripts.items()}
    notes: list[str] = []
    lines = ["| | " + " | ".join(MISUSES) + " |", "|---" * (len(MISUSES) + 1) + "|"]
    for program, row in TABLE.items():
        cells = [_shown(row[misuse], notes) for misuse in MISUSES]
        lines.append(f"| {modules[program].removeprefix('qianmo-')} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"({i}) {note}" for i, note in enumerate(notes, 1)), ""])


def in_document(text: str) -> str:
    """A text with the table between its two marks."""
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + document() + text[end:]


if __name__ == "__main__":
    if "--write" not in sys.argv:
        sys.exit("give --write, which writes the table into docs/programs.md")
    DOCUMENT.write_text(in_document(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
