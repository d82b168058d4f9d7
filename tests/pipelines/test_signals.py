"""Ctrl-C and SIGTERM: one line, an exit code, nothing half-written, and the same command goes on.

A program is stopped by a real signal at a point where it has begun to work or to write. So that it
does not depend on how fast the machine is, the program waits there: a function is replaced by one
that says that it was reached, and sleeps.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import redis_servers
import zygote

from qianmo.pipelines import program

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
STARTS_AGAIN = "nothing half-written is left; the same command starts again."
INT, TERM = signal.SIGINT, signal.SIGTERM
# Program, the function before which it is stopped, and by what: while it works, and just before an
# output takes its name.
CASES = [
    ("prepare", "pyarrow.parquet:write_table", INT),
    ("prepare", "os:rename", TERM),
    ("train", "qianmo.pipelines.training.run:report.latency", TERM),
    ("train", "os:rename", INT),
    ("evaluate", "qianmo.pipelines.evaluation.scores:evaluate", INT),
    ("evaluate", "os:rename", TERM),
    ("adapted", "os:rename", INT),
    ("compare", "qianmo.pipelines.evaluation.compare:score", TERM),
    ("cold_items", "os:rename", INT),
    ("export", "tensorflow:saved_model.save", TERM),
    ("export", "os:rename", INT),
    ("load_redis", "qianmo.export.redis_loader:_each", INT),
    ("load_redis", "qianmo.export.redis_loader:_each", TERM),
    ("predict", "qianmo.pipelines.serving.predictions:write_scores", INT),
    ("predict", "os:rename", TERM),
]


def waits(point: str, reached: pathlib.Path) -> str:
    """Code that has a function say that it was reached, and wait."""
    module, _, name = point.partition(":")
    return (
        f"import pathlib, time, {module} as found\n"
        f"def wait(*_, **__):\n"
        f"    pathlib.Path({str(reached)!r}).touch()\n"
        f"    while True: time.sleep(60)\n"
        f"found.{name} = wait\n"
    )


@pytest.fixture
def place(world: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A world of its own, without what other tests wrote."""
    return shutil.copytree(world, tmp_path / "place")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_servers.Server]:
    if redis_servers.MISSING:
        pytest.skip(redis_servers.REASON)
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def served(
    programs: zygote.Zygote, world: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[pathlib.Path, str]]:
    """A folder of exports, and the address of a server of one of them."""
    folder = tmp_path_factory.mktemp("served")
    words = [f"--model_dir={world / 'dual'}", f"--model_base_path={folder / 'dual'}"]
    done = programs.run("export", *words, "--form=store")
    assert done.code == 0, done.stderr
    ports = ["--port=0", "--rest_api_port=0"]
    server = programs.start("serve", "--embedded", f"--model_base_path={folder / 'dual'}", *ports)
    server.until(lambda: "\n" in server.read("stdout"), "its ready line")
    yield folder, server.read("stdout").split()[2].rstrip(",")
    server.signal(signal.SIGTERM)
    assert server.wait().code == 0


def words(name: str, request: pytest.FixtureRequest) -> list[str]:
    """A program's command line, all of whose outputs are in the folder `out`."""
    lines = {
        "prepare": ["--dataset=movielens_1m", "--source=ml-1m", "--output=out/rows"],
        "train": ["--config=recipe.py", "--model_dir=out/trained"],
        "evaluate": ["--model_dir=plain", "--output=out/metrics.json"],
        "adapted": ["--model_dir=meta", "--output=out/metrics.json"],
        "compare": ["--model_dir=plain", "--single=single_1,single_2", "--output=out/page.html"],
        "cold_items": ["--model_dir=plain", "--item_id=item", "--items=data/items.parquet",
                       "--output=out/filled"],
        "export": ["--model_dir=dual", "--model_base_path=out/dual", "--form=store"],
    }  # fmt: skip
    if name in lines:
        return lines[name]
    folder, address = request.getfixturevalue("served")
    if name == "load_redis":
        redis = request.getfixturevalue("redis")
        url = redis.url(f"test{request.node.callspec.indices['number']}")
        return [f"--store={folder / 'dual_embeddings'}", f"--redis={url}"]
    return [f"--server={address}", "--data=data/test.parquet", "--schema=dual/recipe.json",
            "--output=out/scores.jsonl", "--batch_size=8"]  # fmt: skip


def files(folder: pathlib.Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("name", "point", "number"), CASES, ids=[" ".join(c[:2]) for c in CASES])
def test_stopped_it_says_so_and_leaves_nothing_and_goes_on(
    request: pytest.FixtureRequest,
    programs: zygote.Zygote,
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    name: str,
    point: str,
    number: signal.Signals,
) -> None:
    line = words(name, request)
    (place / "out").mkdir()
    running = programs.start(name, *line, cwd=place, before=waits(point, tmp_path / "reached"))
    running.until((tmp_path / "reached").exists, point)
    running.signal(number)
    ended = running.wait()
    code, word = program.STOPPED[number]
    assert ended.code == code
    assert len(ended.lines) == 1, ended.stderr
    last = ended.lines[0]
    assert last.startswith(f"{word}: ")
    if name == "train":
        assert last.endswith("the same command goes on from the last checkpoint.")
        assert "out/trained/report.html" not in files(place)
    elif name == "load_redis":
        assert last.endswith("what is loaded stays; the same command goes on.")
    else:
        assert last.endswith(STARTS_AGAIN)
        assert files(place / "out") == set()
    again = programs.run(name, *line, cwd=place)
    assert again.code == 0, again.stderr
    if name != "load_redis":
        assert files(place / "out")
        hidden = {path for path in files(place / "out") if "/." in f"/{path}"}
        assert hidden <= {"trained/.lock"}


@BOTH
def test_training_is_stopped_in_the_midst_and_goes_on_from_its_checkpoint(
    programs: zygote.Zygote, place: pathlib.Path, number: signal.Signals
) -> None:
    line = ["--config=recipe.py", "--model_dir=out", "--config.train.epochs=1000000"]
    line += ["--config.train.patience=1000000"]
    running = programs.start("train", *line, cwd=place)
    running.until((place / "out" / "checkpoints" / "checkpoint").exists, "a checkpoint")
    running.signal(number)
    ended = running.wait()
    code, word = program.STOPPED[number]
    assert ended.code == code
    last = ended.lines[-1]
    assert last == f"{word}: the same command goes on from the last checkpoint."
    again = programs.start("train", *line, cwd=place)
    again.until(lambda: "Going on after" in again.read("stdout"), "that it goes on")
    again.signal(number)
    assert again.wait().code == code


@BOTH
def test_online_updates_end_with_a_checkpoint_and_a_graph(
    programs: zygote.Zygote, place: pathlib.Path, number: signal.Signals
) -> None:
    (place / "stream").mkdir()
    shutil.copy(place / "data" / "train.parquet", place / "stream" / "1.parquet")
    line = ["--model_dir=dual", "--model_base_path=out/dual", "--folder=stream", "--form=in_graph",
            "--checkpoint_rows=64"]  # fmt: skip
    running = programs.start("online", *line, cwd=place)
    running.until((place / "dual/online/checkpoints/checkpoint").exists, "a checkpoint")
    running.signal(number)
    ended = running.wait()
    assert ended.code == 0, ended.stderr
    assert (place / "out" / "dual" / "1" / "saved_model.pb").exists()
    again = programs.run("online", *line, "--stop_at_end", cwd=place)
    assert again.code == 0, again.stderr
    assert "Going on after" in again.stdout


@BOTH
def test_stopped_while_tensorflow_is_imported(world: pathlib.Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "qianmo.pipelines.evaluate", f"--model_dir={world / 'plain'}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        maps = pathlib.Path(f"/proc/{running.pid}/maps")
        while "libtensorflow" not in maps.read_text():
            assert running.poll() is None
        running.send_signal(number)
        assert running.stderr is not None
        errors = running.stderr.read()
        code, word = program.STOPPED[number]
        assert running.wait() == code
    assert errors == f"{word}: {STARTS_AGAIN}\n"


def test_a_signal_within_a_destructor_is_not_lost(programs: zygote.Zygote) -> None:
    code = (
        "import os, signal, time\n"
        "from qianmo.pipelines import run_dir\n"
        "class Stops:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        for _ in range(1000): pass\n"
        "def load(folder):\n"
        "    Stops()\n"
        "    while True: time.sleep(60)\n"
        "run_dir.load = load\n"
    )
    ended = programs.run("evaluate", "--model_dir=a", before=code)
    assert (ended.code, ended.stderr) == (143, f"terminated: {STARTS_AGAIN}\n")


def test_the_second_signal_ends_it_at_once(programs: zygote.Zygote, tmp_path: pathlib.Path) -> None:
    code = (
        "import pathlib, time\n"
        "from qianmo.pipelines import run_dir\n"
        "def load(folder):\n"
        "    try:\n"
        f"        pathlib.Path({str(tmp_path / 'one')!r}).touch()\n"
        "        while True: time.sleep(60)\n"
        "    finally:\n"
        f"        pathlib.Path({str(tmp_path / 'two')!r}).touch()\n"
        "        while True: time.sleep(60)\n"
        "run_dir.load = load\n"
    )
    running = programs.start("evaluate", "--model_dir=a", before=code)
    running.until((tmp_path / "one").exists, "its work")
    running.signal(signal.SIGINT)
    running.until((tmp_path / "two").exists, "its clearing up")
    running.signal(signal.SIGINT)
    assert running.wait().code == -signal.SIGINT


def test_an_ignored_signal_stays_ignored(world: pathlib.Path) -> None:
    command = [sys.executable, "-m", "qianmo.pipelines.evaluate", f"--model_dir={world / 'plain'}"]
    shell = f"trap '' INT; exec {' '.join(command)}"  # as nohup and background jobs do
    with subprocess.Popen(["sh", "-c", shell], stdout=subprocess.DEVNULL, text=True,
                          stderr=subprocess.PIPE) as running:  # fmt: skip
        maps = pathlib.Path(f"/proc/{running.pid}/maps")
        while "libtensorflow" not in maps.read_text():
            assert running.poll() is None
        os.kill(running.pid, signal.SIGINT)
        assert running.stderr is not None
        assert zygote.own_lines(running.stderr.read()) == []
        assert running.wait() == 0
