"""Every program and every misuse of it: one line, an exit code, and nothing that is half-written.

`misuse_table.py` has the cells. A full disk is caused by the largest size that a file may have
(RLIMIT_FSIZE), since to mount a small file system takes rights that tests do not have; the system's
error and its way through the program differ in the number alone, see `test_programs.py`.
"""

from __future__ import annotations

import ast
import pathlib
import re
import shutil
import signal
import tomllib
from collections.abc import Iterator

import misuse_table
import program_world
import pyarrow.parquet as pq
import pytest
import redis_servers
import zygote
from misuse_table import COMMANDS, TABLE, Killed, Never, Run, Test, Twice

from qianmo.pipelines import program as every_program
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import identity

ROOT = pathlib.Path(__file__).resolve().parents[2]


def cells(kind: type) -> pytest.MarkDecorator:
    """The cells of a kind."""
    found = [
        pytest.param(program, cell, id=f"{program}-{misuse.replace(' ', '_')}")
        for program, row in TABLE.items()
        for misuse, cell in row.items()
        if isinstance(cell, kind)
    ]
    return pytest.mark.parametrize(("program", "cell"), found)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_servers.Server]:
    if redis_servers.MISSING:
        pytest.skip(redis_servers.REASON)
    with redis_servers.server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def made(programs: zygote.Zygote, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A world whose models know their data, with a stream, and an export of the form `store`."""
    folder = tmp_path_factory.mktemp("misuse") / "made"
    folder.mkdir()
    program_world.make(folder)
    support = pq.read_table(folder / "data" / "support.parquet").slice(0, 40)
    pq.write_table(support, folder / "data" / "support.parquet")  # each number of rows takes time
    for model_dir in (path.parent for path in folder.glob("*/recipe.json")):
        recipe = run_dir.read_recipe(model_dir)
        named = {role: getattr(recipe.data, role) for role in ("train", "test", "test_support")}
        run_dir.write_identities(
            model_dir,
            {role: identity.of(recipe.schema, path) for role, path in named.items() if path},
        )
    (folder / "stream").mkdir()
    shutil.copy(folder / "data" / "train.parquet", folder / "stream" / "1.parquet")
    (folder / "out").mkdir()
    done = programs.run(
        "export", "--model_dir=dual", "--model_base_path=served/dual", "--form=store", cwd=folder
    )
    assert done.code == 0, done.stderr
    return folder


@pytest.fixture
def place(made: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it, whose recipes name its own data."""
    place = shutil.copytree(made, tmp_path / "place")
    for path in [*place.glob("*/recipe.json"), *place.glob("*/data.json")]:
        path.write_text(path.read_text().replace(str(made), str(place)))
    return place


@pytest.fixture(scope="module")
def server(programs: zygote.Zygote, made: pathlib.Path) -> Iterator[str]:
    """The address of a server of the export."""
    running = programs.start("serve", *misuse_table.words("serve"), cwd=made)
    running.until(lambda: "\n" in running.read("stdout"), "its ready line")
    yield running.read("stdout").split()[2].rstrip(",")
    running.signal(signal.SIGTERM)
    assert running.wait().code == 0


@pytest.fixture
def line(request: pytest.FixtureRequest, program: str) -> list[str]:
    """The usual command line of a cell's program."""
    addresses = {}
    if "{server}" in COMMANDS[program][0]:
        addresses["server"] = request.getfixturevalue("server")
    if "{redis}" in COMMANDS[program][0]:
        prefix = re.sub(r"\W+", "_", request.node.name)
        addresses["redis"] = request.getfixturevalue("redis").url(prefix)
    return misuse_table.words(program, **addresses)


def files(folder: pathlib.Path) -> dict[str, bytes]:
    """What all files hold, but for locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def hidden(folder: pathlib.Path) -> list[pathlib.Path]:
    """What was not finished."""
    return [p for p in folder.rglob(".*") if p.name != ".lock"]


def assert_done(
    programs: zygote.Zygote, program: str, line: list[str], place: pathlib.Path
) -> None:
    """Runs the usual command; it ends well, and leaves its output alone."""
    done = programs.run(program, *line, cwd=place)
    assert done.code == 0, done.stderr
    output = COMMANDS[program][1]
    assert not output or (place / output).exists()
    assert hidden(place) == []


def waits(at: str, reached: pathlib.Path) -> str:
    """Code that has a function say that it was reached, and wait."""
    module, _, name = at.partition(":")
    return (
        f"import pathlib, time, {module} as module\n"
        "def wait(*_, **__):\n"
        f"    pathlib.Path({str(reached)!r}).touch()\n"
        "    while True: time.sleep(60)\n"
        f"module.{name} = wait\n"
    )


def error_line(ended: zygote.Ended) -> str:
    """The one line that a refused program wrote beside its progress bars."""
    assert len(ended.lines) == 1, ended.stderr
    assert ended.lines[0].startswith("error: "), ended.stderr
    return ended.lines[0]


def test_the_table_has_all_programs_and_misuses() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = {target.split(":")[0].rpartition(".")[2] for target in scripts.values()}
    assert TABLE.keys() == COMMANDS.keys() == modules
    assert all(row.keys() == set(misuse_table.MISUSES) for row in TABLE.values())
    for row in TABLE.values():  # one test has both
        assert isinstance(row["started twice"], Twice) == isinstance(row["killed midway"], Killed)


@cells(Run)
def test_refused_or_said(
    programs: zygote.Zygote, place: pathlib.Path, program: str, cell: Run, line: list[str]
) -> None:
    if cell.done_before:
        assert_done(programs, program, line, place)
    usual = files(place)
    cell.change(place)
    before = files(place)
    ended = programs.run(program, *line, *cell.words, cwd=place, file_bytes=cell.file_bytes)
    assert ended.code == cell.code, ended.stderr + ended.stdout
    if cell.code:
        assert re.search(cell.says, error_line(ended)), ended.stderr
    else:
        assert ended.lines == []
        assert re.search(cell.says, ended.stdout, re.MULTILINE), ended.stdout
    if not cell.goes_on:
        assert files(place) == before
        return
    for name, content in usual.items():
        (place / name).write_bytes(content)
    assert_done(programs, program, line, place)


@cells(Killed)
def test_started_twice_and_killed_midway_it_goes_on(
    programs: zygote.Zygote,
    place: pathlib.Path,
    tmp_path: pathlib.Path,
    program: str,
    cell: Killed,
    line: list[str],
) -> None:
    reached = tmp_path / "reached"
    first = programs.start(program, *line, cwd=place, before=waits(cell.at, reached))
    first.until(reached.exists, cell.at)
    before = files(place)
    second = programs.run(program, *line, cwd=place)
    twice = TABLE[program]["started twice"]
    assert isinstance(twice, Twice)
    if twice.says:
        assert second.code == 1, second.stdout
        assert re.search(twice.says, error_line(second))
        assert files(place) == before
    else:
        assert second.code == 0, second.stderr
    first.signal(signal.SIGKILL)
    assert first.wait().code == -signal.SIGKILL
    output = COMMANDS[program][1]
    assert not output or not (place / output).exists()
    assert_done(programs, program, line, place)


@cells(Test)
def test_the_other_tests_are_there(program: str, cell: Test) -> None:
    name, _, function = cell.name.partition("::")
    tree = ast.parse((ROOT / name).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@cells(Never)
def test_what_cannot_happen_has_a_reason(program: str, cell: Never) -> None:
    assert cell.reason.endswith(".")


def test_a_killed_server_starts_again_on_its_ports(
    programs: zygote.Zygote, place: pathlib.Path
) -> None:
    ports = [f"--{name}={redis_servers.free_port()}" for name in ("port", "rest_api_port")]
    for last in (signal.SIGKILL, signal.SIGTERM):
        running = programs.start("serve", *misuse_table.words("serve"), *ports, cwd=place)
        running.until(lambda run=running: "ready" in run.read("stdout"), "its ready line")
        running.signal(last)
        assert running.wait().code == (-last if last == signal.SIGKILL else 0)


def test_a_redis_whose_memory_is_full(
    programs: zygote.Zygote, place: pathlib.Path, redis: redis_servers.Server
) -> None:
    line = misuse_table.words("load_redis", redis=redis.url("full"))
    client = redis.client()
    client.config_set("maxmemory", "1kb")
    try:
        refused = programs.run("load_redis", *line, cwd=place)
    finally:
        client.config_set("maxmemory", "0")
    assert refused.code == 1
    assert re.search("used memory > 'maxmemory'.*What is loaded stays", error_line(refused))
    assert_done(programs, "load_redis", line, place)


def test_the_document_has_the_table() -> None:
    text = misuse_table.DOCUMENT.read_text(encoding="utf-8")
    assert text == misuse_table.in_document(text), "run python tests/misuse_table.py --write"


def test_the_document_has_all_programs_and_exit_codes() -> None:
    text = misuse_table.DOCUMENT.read_text(encoding="utf-8")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert re.findall(r"^\| `(qianmo-[a-z-]+)` \|", text, re.MULTILINE) == list(scripts)
    codes = re.findall(r"^    (\d+) +(.+)$", every_program.__doc__ or "", re.MULTILINE)
    assert codes
    for code, meaning in codes:
        assert f"| {code} | {meaning.replace('|', chr(92) + '|')} |" in text
