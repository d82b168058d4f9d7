"""Paths that cannot be used are refused before any work; others work, whatever they are called."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import shutil

import program_world
import pytest
import zygote

from qianmo.export import paths
from qianmo.export.publishing import drafting
from qianmo.pipelines import program, run_dir

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Program -> flags whose paths TensorFlow reads.
MODEL_PATHS = {
    path.stem: re.findall(r'"(\w+)"', found[1])
    for path in sorted(ROOT.glob("pipelines/*.py"))
    if (found := re.search(r"program\.model_paths\((.+)\)", path.read_text()))
}
OTHERS = {  # required beside them
    "train": ["--config=recipe.py"],
    "compare": ["--single=b"],
    "cold_items": ["--item_id=item", "--items=c"],
    "predict": ["--data=a", "--schema=b"],
}
WEIRD = "we[i]rd *?"


def test_every_flag_of_a_model_is_looked_at() -> None:
    named = {name for flags in MODEL_PATHS.values() for name in flags}
    assert named == {"model_dir", "model_base_path", "online_dir", "single", "output", "lookup"}
    for path in ROOT.glob("pipelines/*.py"):
        for name in ("model_dir", "model_base_path", "online_dir"):
            if f'"{name}", None' in path.read_text() and path.stem != "serve":
                assert name in MODEL_PATHS[path.stem], path


@pytest.mark.parametrize("name", MODEL_PATHS)
def test_a_path_that_tensorflow_takes_for_a_pattern_is_refused(
    programs: zygote.Zygote, world: pathlib.Path, tmp_path: pathlib.Path, name: str
) -> None:
    (tmp_path / "recipe.py").write_text((world / "recipe.py").read_text())
    values = {"model_dir": "m", "model_base_path": "s", "output": "o"}
    for flag in MODEL_PATHS[name]:
        for bad, reason in (
            ("a[1]", "TensorFlow takes `[` in a path for a pattern"),
            ("a/b*", "TensorFlow takes `*`"),
            ("a?b", "TensorFlow takes `?`"),
            ("~/a", "the shell left `~` as it is"),
            ("s3://a/b", "models are kept on local disks"),
        ):
            given = {k: v for k, v in values.items() if k in MODEL_PATHS[name]} | {flag: bad}
            words = [f"--{k}={v}" for k, v in given.items()]
            done = programs.run(name, *OTHERS.get(name, []), *words, cwd=tmp_path)
            assert done.code == program.USAGE
            assert done.stderr.startswith(f"error: --{flag}=")
            assert f"{bad}: " in done.stderr or flag == "single"
            assert reason in done.stderr
            assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.py"]


def test_serve_and_recipes_refuse_them_too(
    programs: zygote.Zygote, world: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    ports = ["--embedded", "--port=0", "--rest_api_port=0"]
    done = programs.run("serve", *ports, "--model_base_path=a[1]", cwd=tmp_path)
    assert done.code == program.REFUSED
    assert done.stderr.startswith("error: a[1]: TensorFlow takes `[`")
    words = [f"--config={world / 'recipe.py'}", "--model_dir=m", "--config.train.start_from=a*"]
    done = programs.run("train", *words, cwd=tmp_path)
    assert done.code == program.REFUSED
    assert done.stderr.startswith("error: a*: TensorFlow takes `*`")
    assert not list(tmp_path.iterdir())


def test_the_library_refuses_them_too(tmp_path: pathlib.Path) -> None:
    for refused in (
        lambda: run_dir.read_recipe(tmp_path / "a[1]"),
        lambda: drafting(tmp_path / "a[1]", 1).__enter__(),
        lambda: paths.check_model_path(tmp_path / "a\\b"),
    ):
        with pytest.raises(ValueError, match=r"takes .* in a path for a pattern"):
            refused()


def test_all_other_paths_may_be_called_so(programs: zygote.Zygote, tmp_path: pathlib.Path) -> None:
    weird = tmp_path / WEIRD
    shutil.copytree(_made(tmp_path), weird)

    def run(name: str, *words: str) -> str:
        done = programs.run(name, *words, cwd=weird)
        assert done.code == 0, done.stderr
        return done.stdout

    train = [f"--config={weird / 'recipe.py'}", "--model_dir=trained", "--config.train.epochs=1"]
    assert "Report: trained/report.html" in run("train", *train)
    assert "Report: trained/report.html" in run("train", *train)  # it is read back
    rows = f"--data={weird / 'data' / 'test.parquet'}"
    run("evaluate", "--model_dir=trained", rows, f"--output={weird / 'metrics.json'}")
    assert (weird / "metrics.json").exists()
    store = ["--form=store", f"--embedding_store={weird / 'embeddings'}"]
    run("export", "--model_dir=trained", "--model_base_path=served", rows, *store)
    assert (weird / "embeddings" / "CURRENT").read_text() == "1\n"
    assert (weird / "served" / "1" / "saved_model.pb").exists()


def _made(folder: pathlib.Path) -> pathlib.Path:
    made = folder / "made"
    made.mkdir()
    program_world.write_data(made / "data")
    (made / "recipe.py").write_text(program_world.RECIPE)
    return made


def test_a_folder_to_write_to_is_looked_at(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    for path, number in (
        (tmp_path / "file", errno.ENOTDIR),
        (tmp_path / "file" / "below" / "it", errno.ENOTDIR),
        (pathlib.Path("/sys/below/it"), None),  # which nobody may write to, not even root
    ):
        with pytest.raises(OSError, match=re.escape(str(path))) as caught:
            paths.check_folder(path)
        assert caught.value.errno in ([number] if number else [errno.EACCES, errno.EROFS])
    paths.check_folder(tmp_path / "new" / "folder")
    paths.check_file(tmp_path / "new" / "file")
    paths.check_file(tmp_path / "file")
    with pytest.raises(IsADirectoryError):
        paths.check_file(tmp_path)
    with pytest.raises(NotADirectoryError, match="file/below"):
        paths.check_file(tmp_path / "file" / "below")
    assert os.listdir(tmp_path) == ["file"]
