"""How every program starts, shows its help, refuses and ends."""

from __future__ import annotations

import ast
import errno
import pathlib
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable

import grpc
import pytest
import tensorflow as tf
import tf_keras
import zygote

from qianmo.layers.domain_column import read_domain
from qianmo.layers.mlp import MLP
from qianmo.layers.schema import Schema
from qianmo.pipelines import errors, program
from qianmo.pipelines.data.readers import DataError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    path.stem for path in ROOT.glob("pipelines/*.py") if "program.start(" in path.read_text()
)
RECIPE = """from qianmo.configs.base import base_config


def get_config():
    config = base_config()
    config.data.train = "nowhere.parquet"
    config.schema = {"features": [{"name": "user", "dim": 4}], "labels": ["click"]}
    config.model = {"name": "mlp", "units": (4,)}
    return config
"""


def only_line(ended: zygote.Ended, code: int) -> str:
    """The one line that a refused program wrote."""
    assert ended.code == code, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: ")
    return ended.stderr.strip()


def test_every_script_of_the_package_is_such_a_program() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    modules = {target.split(":")[0].rpartition(".")[2] for target in scripts.values()}
    assert modules == set(PROGRAMS) - {"demo", "cold_items"}  # which have no script


def test_nothing_else_ends_the_process() -> None:
    rooms = ("configs", "export", "layers", "models", "ops", "pipelines")
    sources = [path for room in rooms for path in ROOT.glob(f"{room}/**/*.py")]
    ends = {path.name for path in sources if re.search(r"sys\.exit|SystemExit", path.read_text())}
    assert ends == {"program.py"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_teaches_and_imports_nothing_that_is_slow(name: str) -> None:
    code = (
        "import sys\n"
        f"from qianmo.pipelines import {name}\n"
        "try:\n"
        f"    {name}.main()\n"
        "finally:\n"
        "    slow = {'tensorflow', 'numpy', 'pyarrow', 'grpc', 'typeguard', 'tqdm'}\n"
        "    print(*sorted(slow & sys.modules.keys()), file=sys.stderr)\n"
    )
    doc = ast.get_docstring(ast.parse((ROOT / "pipelines" / f"{name}.py").read_text())) or ""
    for flag in ("--help", "--helpfull"):
        done = subprocess.run(
            [sys.executable, "-c", code, flag], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == ""
        assert doc.strip() in done.stdout
        assert re.search(r"^    (qianmo-|python -m qianmo\.)", done.stdout, re.MULTILINE)
        assert ("--flagfile" in done.stdout) == (flag == "--helpfull")


def test_help_has_every_flag_below_a_heading(programs: zygote.Zygote) -> None:
    done = programs.run("online", "--help")
    groups = {part.split(":\n")[0] for part in done.stdout.split("\n\n") if ":\n  --" in part}
    assert groups == {
        "What it reads and writes", "The stream of rows", "What is published", "Steps and pace"
    }  # fmt: skip
    assert "  --form=in_graph|store\n      What is published." in done.stdout
    assert "  --model_dir=...\n      Required. Directory of a trained dual DNN." in done.stdout
    assert "  --checkpoint_rows=N\n      Rows between checkpoints. Default: 65536." in done.stdout
    for flag in ("folder", "redis_group", "[no]stop_at_end", "publish_minutes"):
        assert f"\n  --{flag}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modeldir=a"], "--modeldir is no flag of this program; did you mean --model_dir?"),
        (["--xyzzy"], "--xyzzy is no flag of this program; --help lists them."),
        ([], "--model_dir should be given; see --help."),
        (["--model_dir=a", "b"], "unexpected argument 'b'; flags begin with --; see --help."),
    ],
)
def test_a_wrong_flag(programs: zygote.Zygote, arguments: list[str], message: str) -> None:
    assert only_line(programs.run("evaluate", *arguments), program.USAGE) == f"error: {message}"


def test_flags_that_exclude_each_other(programs: zygote.Zygote) -> None:
    both = ["--model_dir=a", "--model_base_path=b", "--folder=c", "--redis=redis://d"]
    line = only_line(programs.run("online", *both), program.USAGE)
    assert line == "error: give either --folder or --redis; see --help."
    line = only_line(programs.run("export", "--model_dir=a", "--rows=0"), program.USAGE)
    assert line.startswith("error: --rows=0: ")


@pytest.mark.parametrize(
    ("text", "arguments", "code", "message"),
    [
        (None, [], 1, r"--config=recipe\.py: there is no such file; give the path of a recipe"),
        ("x = (1", [], 1, r"recipe\.py, line 1: SyntaxError: '\(' was never closed\."),
        ("import nothing_such", [], 1, r"recipe\.py, line 1: ModuleNotFoundError: No module named"),
        ("x = 1", [], 1, r"recipe\.py: it should define get_config\(\)"),
        ("def get_config():\n  return 3", [], 1, r"should return the ConfigDict .*Received: int"),
        ("def get_config():\n\n  return x", [], 1, r"recipe\.py, line 3: NameError: name 'x'"),
        ("def get_config():\n  open('no')", [], 1, r"recipe\.py, line 2: FileNotFoundError: "),
        (RECIPE.replace("train =", "trian ="), [], 1, r"unknown key `trian`; did you mean `train`"),
        (RECIPE, ["--config.train.Epoks=1"], 2, r"no key .*did you mean --config\.train\.epochs\?"),
        (RECIPE, ["--config.dta.train=a"], 2, r"no key of .*did you mean --config\.data\?"),
        (RECIPE, ["--config.train.epochs=many"], 2, r"--config\.train\.epochs=many: .*int"),
        (RECIPE, ["--config.train.epochs=0"], 1, r"`train\.epochs` should be >= 1\. Received: 0"),
        (RECIPE, ["--config.model.name=MLPs"], 1, r"did you mean `mlp`\? Received: 'MLPs'"),
        (RECIPE, ["--config.data.catalogue=a"], 1, r"`train\.monitor` should be ndcg_10"),
    ],
)  # fmt: skip
def test_a_wrong_recipe(
    programs: zygote.Zygote,
    tmp_path: pathlib.Path,
    text: str | None,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    if text is not None:
        (tmp_path / "recipe.py").write_text(text)
    words = ["--config=recipe.py", "--model_dir=model", *arguments]
    line = only_line(programs.run("train", *words, cwd=tmp_path), code)
    assert re.search(message, line), line
    assert not (tmp_path / "model").exists()


def test_a_recipe_of_another_name_or_variant(
    programs: zygote.Zygote, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "recipe.py").write_text(RECIPE)

    def line(recipe: str) -> str:
        words = [f"--config={recipe}", "--model_dir=model"]
        return only_line(programs.run("train", *words, cwd=tmp_path), 1)

    assert "no such file; did you mean recipe.py?" in line("Recpie.py")
    assert line("recipe.py:dual").endswith("recipe.py has no variants; leave `:dual` out.")
    unknown = line(f"{ROOT / 'configs' / 'kuairand_fused.py'}:nothing")
    assert re.search(r"kuairand_fused\.py, line \d+: ValueError: The variant should be", unknown)


class Status(grpc.RpcError):
    """What a call raises."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "failed to connect"


def opened(path: pathlib.Path) -> BaseException:
    """What TensorFlow raises where it cannot write."""
    with pytest.raises(tf.errors.OpError) as caught:
        tf.io.write_file(str(path), "")
    return caught.value


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "", "a/b"), "a/b: No space left on device. Free space there, and"),
        (OSError(errno.EROFS, "", "a"), "a: Read-only file system. Give a path that can be"),
        (PermissionError(errno.EACCES, "", "a"), "a: Permission denied. Give a path that this"),
        (NotADirectoryError(errno.ENOTDIR, "", "a/b"), "a/b: Not a directory. A part of the path"),
        (IsADirectoryError(errno.EISDIR, "", "a"), "a: Is a directory. It is a folder"),
        (FileNotFoundError(errno.ENOENT, "", "a"), "a: No such file or directory. Check the"),
        (OSError(errno.EADDRINUSE, "", "h:1"), "h:1: Address already in use. Another process"),
        (OSError("odd"), "odd"),
        (OSError(-2, "Name or service not known", "h:1"), "h:1: Name or service not known."),
        (MemoryError("of 8 GB"), "The memory was not enough: of 8 GB. Give the machine more"),
        (tf.errors.ResourceExhaustedError(None, None, "OOM at [9]"), "not enough: OOM at [9]."),
        (tf.errors.ResourceExhaustedError(None, None, "a/b; No space left on device"),
         "a/b: No space left on device. Free space"),
        (tf.errors.PermissionDeniedError(None, None, "a; Permission denied"), "a: Permission den"),
        (tf.errors.DataLossError(None, None, "a: cut\n[[node]]"), "a: cut."),
        (tf.errors.UnimplementedError(None, None, "File system scheme 's3'"), "scheme 's3'."),
        (Status(), "UNAVAILABLE: failed to connect"),
    ],
)  # fmt: skip
def test_errors_from_outside_are_one_sentence(error: BaseException, message: str) -> None:
    sentence = errors.sentence(error)
    assert sentence is not None
    assert message in sentence
    assert "\n" not in sentence


def test_what_tensorflow_cannot_write_names_the_path(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    assert errors.sentence(opened(tmp_path / "file" / "b")) == (
        f"{tmp_path}/file/b: Not a directory. A part of the path is a file; give another path."
    )


def test_a_refusal_is_told_from_a_fault() -> None:
    def raised(make: Callable[[], object]) -> BaseException:
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            make()
        return caught.value

    assert errors.sentence(DataError("bad row")) == "bad row"
    assert errors.sentence(raised(lambda: MLP((0,)))) == (
        "`units` should be widths >= 1. Received: (0,)"
    )
    # Keras puts the names of its layers around the message.
    layer = tf_keras.layers.Lambda(lambda column: read_domain(column, 1000), dtype="bfloat16")
    wrapped = raised(lambda: layer(tf.zeros([2], tf.bfloat16)))
    assert "Exception encountered" in str(wrapped)
    assert str(errors.sentence(wrapped)).startswith("1000 domains cannot cross")
    for fault in (
        lambda: Schema.from_config(3),
        lambda: int("x"),
        lambda: tf.reshape(tf.zeros([3]), [2]),
        lambda: MLP(3),
        lambda: {}["key"],
    ):
        assert errors.sentence(raised(fault)) is None


def test_a_fault_of_the_package_shows_its_traceback(programs: zygote.Zygote) -> None:
    fault = "from qianmo.pipelines import run_dir; run_dir.load = lambda folder: {}[folder]"
    done = programs.run("evaluate", "--model_dir=a", before=fault)
    assert done.code == program.INTERNAL
    assert done.stderr.startswith("Traceback (most recent call last):")
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: KeyError: 'a'. This is an error of qianmo")
    assert "report it" in last


def test_a_refusal_shows_its_traceback_when_asked(programs: zygote.Zygote) -> None:
    done = programs.run("evaluate", "--model_dir=a", "--verbosity=1")
    assert done.code == program.REFUSED
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("error: a holds no recipe.json")


def test_a_reader_that_goes_away_ends_the_program_without_a_line() -> None:
    command = [sys.executable, "-m", "qianmo.pipelines.export", "--helpfull"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == program.BROKEN_PIPE


@pytest.fixture
def unreadable(tmp_path: pathlib.Path) -> str:
    """The flag of a model that cannot be loaded."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").touch()
    return f"--model_base_path={tmp_path}"


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_a_port_in_use_is_said_before_a_model_is_loaded(
    programs: zygote.Zygote, unreadable: str, flag: str
) -> None:
    ports = {"port": 0, "rest_api_port": 0}
    with socket.create_server(("127.0.0.1", 0)) as other:
        ports[flag] = other.getsockname()[1]
        words = [f"--{name}={port}" for name, port in ports.items()]
        done = programs.run("serve", "--embedded", unreadable, *words)
    assert only_line(done, program.REFUSED) == (
        f"error: 127.0.0.1:{ports[flag]} (--{flag}): Address already in use. Another process "
        "listens there; stop it, or give another port."
    )


def test_an_address_of_another_machine(programs: zygote.Zygote, unreadable: str) -> None:
    words = ["--embedded", unreadable, "--host=192.0.2.1"]
    line = only_line(programs.run("serve", *words), program.REFUSED)
    assert line.startswith("error: 192.0.2.1:8500 (--port): Cannot assign requested address")
