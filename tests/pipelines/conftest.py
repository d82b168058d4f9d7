"""What the tests of the programs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zygote


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zygote.Zygote]:
    """Starts programs in processes of their own."""
    with zygote.Zygote(tmp_path_factory.mktemp("programs")) as running:
        yield running
