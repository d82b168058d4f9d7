"""Builds `qianmo`, whose package root is this folder. The static metadata is in pyproject.toml."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import re
import shutil
import sys
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.modified import newer_group

ROOT = pathlib.Path(__file__).resolve().parent
os.chdir(ROOT)

ROOMS = ("configs", "export", "layers", "models", "ops", "pipelines")
ROOT_FILES = ("__init__.py", "py.typed")
OP_SOURCES = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("ops/cc/**/*.cc")
    if not path.name.endswith("_test.cc")
)
# Besides the sources: what else makes them worth compiling again.
DEPENDS = ["setup.py", *(str(path.relative_to(ROOT)) for path in ROOT.glob("ops/cc/**/*.h"))]


def version() -> str:
    """Reads `__version__` without importing the package."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError('__init__.py should hold a line `__version__ = "..."`.')
    return found[1]


def packages() -> list[str]:
    """Names `qianmo` and every folder of its rooms that has an __init__.py."""
    inits = [init for room in ROOMS for init in ROOT.glob(f"{room}/**/__init__.py")]
    folders = sorted(init.parent.relative_to(ROOT).parts for init in inits)
    return ["qianmo", *(".".join(("qianmo", *folder)) for folder in folders)]


def package_dir() -> dict[str, str]:
    """Maps `qianmo` to the root; for an editable install, to the same files through links.

    The links .dev/qianmo/<room> -> ../../<room> form an ordinary source tree, for which setuptools
    writes a .pth file. Otherwise it writes an import hook, which mypy does not follow.
    """
    if "editable_wheel" not in sys.argv:
        return {"qianmo": "."}
    tree = ROOT / ".dev" / "qianmo"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in (*ROOMS, *ROOT_FILES):
        (tree / name).symlink_to(pathlib.Path("..", "..", name))
    return {"": ".dev"}


class BuildPackage(build_py):
    """Ships only ROOT_FILES from the root, and nothing that an earlier build left behind."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(pathlib.Path(self.build_lib, "qianmo"), ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package == "qianmo":
            modules = [module for module in modules if f"{module[1]}.py" in ROOT_FILES]
        return modules


class BuildOps(build_ext):
    """Compiles the custom ops with the flags of the installed TensorFlow."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # loaded by TensorFlow: no Python ABI tag

    def build_extension(self, ext: Extension) -> None:
        import tensorflow as tf

        # As system headers, TensorFlow's own do not drown the warnings on ours.
        flags = [re.sub("^-I", "-isystem", flag) for flag in tf.sysconfig.get_compile_flags()]
        # -O3 vectorises loops of unknown length; a square root that sets errno could not be.
        flags += ["-iquote", str(ROOT), "-O3", "-fno-math-errno", "-g0", "-Wall", "-Wextra"]
        ext.extra_compile_args = flags
        ext.extra_link_args = tf.sysconfig.get_link_flags()
        compile_all = self.compiler.compile

        def compile_new(sources: list[str], output_dir: str, **options: Any) -> list[str]:
            """Compiles what is out of date, side by side: a file takes ten seconds."""

            def compile_one(source: str) -> str:
                (made,) = self.compiler.object_filenames([source], output_dir=output_dir)
                if newer_group([source, *ext.depends], made):
                    compile_all([source], output_dir=output_dir, **options)
                return made

            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(pool.map(compile_one, sources))

        self.compiler.compile = compile_new
        super().build_extension(ext)

    def copy_file(self, source: str, target: str, *args: Any, **options: Any) -> tuple[str, bool]:
        """Puts the library in place by a rename: a running process may have the old one mapped."""
        made = super().copy_file(source, f"{target}.new", *args, **options)
        if not self.dry_run:
            os.replace(f"{target}.new", target)
        return target, made[1]


class Wheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the ops bind TensorFlow's ABI, not Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    version=version(),
    package_dir=package_dir(),
    packages=packages(),
    include_package_data=False,
    package_data={"qianmo": ["py.typed"], "qianmo.pipelines": ["sample/*"]},
    ext_modules=[Extension("qianmo.ops._qianmo_ops", OP_SOURCES, depends=DEPENDS, language="c++")],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildOps, "bdist_wheel": Wheel},
    zip_safe=False,
)
