"""Models whose parts are scaled row by row: PPNet, POSO and EPNet.

The gates read some of the features, by default the domain, if a feature tells it, and those of the
user.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qianmo.layers.bottom import Bottom
from qianmo.layers.epnet import EPNet
from qianmo.layers.extended import Extended
from qianmo.layers.gate_columns import GateColumns
from qianmo.layers.gated_tower import GatedTower
from qianmo.layers.schema import Schema
from qianmo.layers.select import Select
from qianmo.layers.tower import Tower
from qianmo.models.road import Road


def _gate_features(schema: Schema, named: Sequence[str]) -> list[str]:
    users = [f.name for f in schema.features if f.side == "user"]
    tells = [schema.domain_feature.name] if schema.domain_feature else []
    found = list(named) or [*tells, *(name for name in users if name not in tells)]
    if not found:
        raise ValueError('`gate_features` should name features: none is of the side "user".')
    return found


def _gated(
    schema: Schema,
    gate_features: Sequence[str],
    units: Sequence[int],
    gate_units: int,
    dropout: float,
    reads_input: bool,
    epnet: bool,
    ranker: dict[str, Any],
) -> Road:
    names = _gate_features(schema, gate_features)
    of_gate = GateColumns(schema, names, name="gate_input")
    before = []
    if epnet:
        before.append(EPNet(Select(schema, names), gate_units, name="epnet"))
    # What the tower's gates read is not scaled.
    scaled = Extended(Bottom(flat=True), before) if before else Bottom(flat=True)
    bottom = Extended(scaled, columns=[of_gate], name="bottom")
    tower = GatedTower(
        len(schema.labels),
        of_gate.columns.width,
        units,
        gate_units,
        reads_input,
        dropout,
        name="tower",
    )
    return Road(schema, bottom, tower, **ranker)


def ppnet(
    schema: Schema,
    *,
    units: Sequence[int] = (128, 64, 32),
    gate_features: Sequence[str] = (),
    gate_units: int = 32,
    dropout: float = 0.0,
    epnet: bool = False,
    **ranker: Any,
) -> Road:
    """PPNet: a network whose hidden units are scaled by gates of the row; PEPNet with `epnet`.

    Args:
      schema: what a row holds.
      units: widths of the network.
      gate_features: features that the gates read besides the embedded row, which they do not teach.
      gate_units: width of the gates' hidden layers.
      dropout: of the network.
      epnet: whether an `EPNet` scales the embedded row first.
      **ranker: arguments of `Ranker`.

    References: Chang et al. 2023, PEPNet.
    """
    return _gated(schema, gate_features, units, gate_units, dropout, True, epnet, ranker)


def poso(
    schema: Schema,
    *,
    units: Sequence[int] = (128, 64, 32),
    gate_features: Sequence[str] = (),
    gate_units: int = 32,
    dropout: float = 0.0,
    **ranker: Any,
) -> Road:
    """POSO: a network whose hidden units are scaled by gates of the named features alone.

    Args:
      schema: what a row holds.
      units: widths of the network.
      gate_features: features that the gates read, such as those that tell new users.
      gate_units: width of the gates' hidden layers.
      dropout: of the network.
      **ranker: arguments of `Ranker`.

    References: Dai et al. 2021, POSO.
    """
    return _gated(schema, gate_features, units, gate_units, dropout, False, False, ranker)


def epnet(
    schema: Schema,
    *,
    units: Sequence[int] = (128, 64, 32),
    gate_features: Sequence[str] = (),
    gate_units: int = 64,
    dropout: float = 0.0,
    **ranker: Any,
) -> Road:
    """EPNet: the embedded row, scaled by a gate of the row, and a plain network.

    Args:
      schema: what a row holds.
      units: widths of the network.
      gate_features: features that the gate reads besides the embedded row. Default: the domain.
      gate_units: width of the gate's hidden layer.
      dropout: of the network.
      **ranker: arguments of `Ranker`.

    References: Chang et al. 2023, PEPNet.
    """
    names = list(gate_features)
    if not names and schema.domain_feature:
        names = [schema.domain_feature.name]
    if not names:
        raise ValueError("`gate_features` should name features: none tells the domain.")
    gate = EPNet(Select(schema, names), gate_units, name="epnet")
    bottom = Extended(Bottom(flat=True), [gate], name="bottom")
    return Road(schema, bottom, Tower(len(schema.labels), units, dropout, name="tower"), **ranker)
