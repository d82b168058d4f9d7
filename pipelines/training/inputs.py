"""The data sets of a run, known by their identities from its first step to its report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from qianmo.layers.schema import Schema
from qianmo.pipelines.data import identity
from qianmo.pipelines.data.identity import Identity
from qianmo.pipelines.evaluation.retrieval import item_schema
from qianmo.pipelines.recipe import Recipe

ROLES = ("train", "valid", "valid_support", "test", "test_support", "catalogue")


def schema_of(recipe: Recipe, role: str) -> Schema:
    """What the rows of a data set hold."""
    return item_schema(recipe.schema) if role == "catalogue" else recipe.schema


class Inputs:
    """The data sets that a recipe names, while a run uses them; made by `opened`.

    Args:
      taken: role -> the data set, whose files a thread hashes.
    """

    def __init__(self, taken: Mapping[str, identity.Taking]) -> None:
        self._taken = taken

    def identities(self) -> dict[str, Identity]:
        """The data sets' identities by role; waits for the thread that hashes."""
        return {role: taken.result() for role, taken in self._taken.items()}

    def check_unchanged(self) -> None:
        """Looks whether all files are still those that were hashed.

        Raises:
          DataError: one was replaced or removed.
        """
        for taken in self._taken.values():
            taken.check_unchanged()


@contextlib.contextmanager
def opened(recipe: Recipe) -> Iterator[Inputs]:
    """Checks the columns of all data sets of a recipe, and begins to hash their files.

    Raises:
      DataError: a data set that is not there, is empty, or lacks a column.
    """
    with contextlib.ExitStack() as stack:
        yield Inputs(
            {
                role: stack.enter_context(
                    identity.taking(schema_of(recipe, role), path, targets=role != "catalogue")
                )
                for role in ROLES
                if (path := getattr(recipe.data, role))
            }
        )
