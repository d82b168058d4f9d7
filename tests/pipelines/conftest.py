"""What the tests of the programs share."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import program_world
import pytest
import zygote


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zygote.Zygote]:
    """Starts programs in processes of their own."""
    with zygote.Zygote(tmp_path_factory.mktemp("programs")) as running:
        yield running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of data, recipes and models, for programs that only read; see `program_world`."""
    folder = tmp_path_factory.mktemp("world") / "world"
    folder.mkdir()
    program_world.make(folder)
    return folder
