"""By default a program writes its own lines to the terminal, and nothing that libraries log."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
import redis_servers
import zygote


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"qianmo.pipelines.{program}", *arguments]


def settings(**changes: str) -> dict[str, str]:
    """A user's environment, without what the tests set."""
    return {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"} | changes


def test_importing_the_whole_package_is_silent(programs: zygote.Zygote) -> None:
    programs.run("evaluate", "--help")  # it has imported all by then
    assert programs.imported() == ""


def test_a_program_of_its_own_is_silent(world: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = [f"--model_dir={world / 'plain'}", f"--model_base_path={tmp_path / 'm'}"]
    done = subprocess.run(
        command("export", *arguments), capture_output=True, text=True, check=False, env=settings()
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


def test_verbosity_brings_the_lines_back(world: pathlib.Path, tmp_path: pathlib.Path) -> None:
    arguments = [f"--model_dir={world / 'plain'}", f"--model_base_path={tmp_path / 'm'}"]
    done = subprocess.run(
        command("export", "--verbosity=0", *arguments),
        capture_output=True,
        text=True,
        check=False,
        env=settings(),
    )
    assert done.returncode == 0, done.stderr
    # TensorFlow's C++ and its Python both log information.
    assert re.search(r"^I\d+ .*\.cc:\d+\]", done.stderr, re.MULTILINE)
    assert re.search(r"^[IW]\d+ .*\.py:\d+\]", done.stderr, re.MULTILINE)


def test_what_an_import_wrote_is_shown_if_it_fails(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tensorflow.py").write_text(
        "import os\nos.write(2, b'libcuda is broken')\nraise ImportError('cannot load')\n"
    )
    done = subprocess.run(
        command("evaluate", "--model_dir=a"),
        capture_output=True,
        text=True,
        check=False,
        env=settings(PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"),
    )
    assert "libcuda is broken" in done.stderr
    assert "ImportError: cannot load" in done.stderr


@pytest.mark.skipif(redis_servers.MISSING, reason=redis_servers.REASON)
def test_every_program_writes_its_own_lines_alone(
    programs: zygote.Zygote, world: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    base = tmp_path / "served"
    stream = tmp_path / "stream"
    stream.mkdir()
    (stream / "1.parquet").write_bytes((world / "data" / "train.parquet").read_bytes())

    def run(program: str, *arguments: str, lines: int = 0) -> str:
        done = programs.run(program, *arguments)
        assert done.code == 0, done.stderr
        assert len(done.lines) == lines, done.stderr
        return done.stdout

    run("prepare", "--dataset=movielens_1m", f"--source={world / 'ml-1m'}",
        f"--output={tmp_path / 'rows'}")  # fmt: skip
    run("train", f"--config={world / 'recipe.py'}:meta", f"--model_dir={tmp_path / 'trained'}")
    run("evaluate", f"--model_dir={tmp_path / 'trained'}")
    run("adapted", f"--model_dir={world / 'meta'}")
    singles = ",".join(str(world / f"single_{n}") for n in (1, 2))
    fused = f"--model_dir={world / 'plain'}"
    run("compare", fused, f"--single={singles}", f"--output={tmp_path / 'c.html'}")
    run("cold_items", fused, "--item_id=item", f"--items={world / 'data' / 'items.parquet'}",
        f"--output={tmp_path / 'filled'}")  # fmt: skip
    dual = f"--model_dir={world / 'dual'}"
    run("export", f"--model_dir={world / 'meta'}", f"--model_base_path={base / 'meta'}",
        "--form=adapted")  # fmt: skip
    run("export", dual, f"--model_base_path={base / 'fed'}", "--form=fed")
    run("export", dual, f"--model_base_path={base / 'dual'}", "--form=store")
    run("online", dual, f"--model_base_path={base / 'dual'}", f"--folder={stream}",
        f"--online_dir={tmp_path / 'online'}", "--stop_at_end")  # fmt: skip
    with redis_servers.server(tmp_path) as redis:
        run("load_redis", f"--store={base / 'dual_embeddings'}", f"--redis={redis.url()}")
    serve = ["--embedded", "--port=0", "--rest_api_port=0", f"--model_base_path={base / 'dual'}"]
    server = programs.start("serve", *serve)
    server.until(lambda: "\n" in server.read("stdout"), "its ready line")
    _, _, grpc, _, rest, *_ = server.read("stdout").replace(",", "").split()
    ask = [f"--data={world / 'data' / 'test.parquet'}", "--rows=3",
           f"--schema={world / 'dual' / 'recipe.json'}"]  # fmt: skip
    assert run("predict", f"--server={grpc}", *ask).count("\n") == 3
    rest = rest.removeprefix("http://")
    assert run("predict", "--rest", f"--server={rest}", *ask).count("\n") == 3
    server.signal(2)
    ended = server.wait()
    assert (ended.code, ended.stderr) == (0, "")
