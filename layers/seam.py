"""What a tower reads of h beside its hidden state, and whether the bottom puts it there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

DOMAIN, AUXILIARY, GATES = "domain", "auxiliary logits", "gates"
_MADE_BY = {
    DOMAIN: "DomainColumn()",
    AUXILIARY: "AuxiliaryNetwork(num_labels)",
    GATES: "GateColumns(schema, features)",
}


class Columns(NamedTuple):
    """Columns at the end of h that mean the same: what they hold, and how many they are."""

    name: str
    width: int


def check_seam(bottom: Any, tower: Any) -> None:
    """Refuses a bottom whose h a tower would misread, as towers take columns by their positions.

    A bottom says what stands at the end of its h by `given_columns`, a sequence of `Columns`, and
    how many hidden states stand side by side before it by `num_states`; a tower says what it takes
    for these by `read_columns` and `num_states`. Without them h is one hidden state.

    Args:
      bottom: layer `Embedded` -> h.
      tower: layer h -> `TowerOutput`.

    Raises:
      ValueError: they differ.
    """
    given = tuple(getattr(bottom, "given_columns", ()))
    read = tuple(getattr(tower, "read_columns", ()))
    if given != read:
        made = ", ".join(_MADE_BY.get(columns.name, columns.name) for columns in read)
        raise ValueError(
            f"`{tower.name}` ({type(tower).__name__}) should find at the end of h {_shown(read)}. "
            f"Received from `{bottom.name}` ({type(bottom).__name__}): {_shown(given)}. Give "
            f"`Extended` the columns=[{made}]."
        )
    states = (getattr(bottom, "num_states", 1), getattr(tower, "num_states", 1))
    if states[1] > 1 and states[0] != states[1]:
        raise ValueError(
            f"`{tower.name}` ({type(tower).__name__}) should get {states[1]} hidden states side by "
            f"side. Received from `{bottom.name}` ({type(bottom).__name__}): {states[0]}."
        )


def _shown(columns: Iterable[Columns]) -> str:
    return ", ".join(f"{c.name} ({c.width})" for c in columns) or "nothing but its hidden state"
