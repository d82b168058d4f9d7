"""Models whose parts are scaled row by row: PPNet, POSO and EPNet.

Gates of hidden units read some of the features, by default the domain, if a feature tells it, and
those of the user; gates of the embedded row those that tell the domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tf_keras

from qianmo.layers.bottom import Bottom
from qianmo.layers.epnet import EPNet
from qianmo.layers.extended import Extended
from qianmo.layers.gate_columns import GateColumns
from qianmo.layers.gated_tower import GatedTower
from qianmo.layers.label_towers import LabelTowers
from qianmo.layers.schema import Schema
from qianmo.layers.select import Select
from qianmo.layers.tower import Tower
from qianmo.models.road import Road


def _gate_columns(schema: Schema, named: Sequence[str]) -> GateColumns:
    """What gates of hidden units read, by default the domain and the user's features."""
    users = [f.name for f in schema.features if f.side == "user"]
    tells = [schema.domain_feature.name] if schema.domain_feature else []
    names = list(named) or [*tells, *(name for name in users if name not in tells)]
    if not names:
        raise ValueError('`gate_features` should name features: none is of the side "user".')
    return GateColumns(schema, names, name="gate_input")


def _domain_features(schema: Schema, named: Sequence[str], key: str) -> list[str]:
    """What an EPNet's gate reads besides the row."""
    found = list(named) or [f.name for f in [schema.domain_feature] if f]
    if not found:
        raise ValueError(f"`{key}` should name features: none tells the domain.")
    return found


def ppnet(
    schema: Schema,
    *,
    units: Sequence[int] = (128, 64, 32),
    gate_features: Sequence[str] = (),
    gate_units: int = 32,
    dropout: float = 0.0,
    epnet: bool = False,
    domain_features: Sequence[str] = (),
    **ranker: Any,
) -> Road:
    """PPNet: a network for each label, its hidden units scaled by gates of the row.

    With `epnet` it is PEPNet: an `EPNet` scales the embedded row first, by what tells the domain.

    Args:
      schema: what a row holds.
      units: widths of each network.
      gate_features: features that the gates of hidden units read besides the embedded row, which
        they do not teach.
      gate_units: width of the gates' hidden layers.
      dropout: of the networks.
      epnet: whether an `EPNet` scales the embedded row first.
      domain_features: features that the EPNet's gate reads besides the row. Default: the domain.
      **ranker: arguments of `Ranker`.

    Raises:
      ValueError: gates without a feature to read.

    References: Chang et al. 2023, PEPNet. There the gates of hidden units read ids of the user, the
    item and its author; here, by default, the domain and the user's features.
    """
    if domain_features and not epnet:
        raise ValueError("`domain_features` are read by the EPNet; set `epnet`.")
    columns = _gate_columns(schema, gate_features)
    bottom: tf_keras.layers.Layer = Bottom(flat=True)
    if epnet:
        names = _domain_features(schema, domain_features, "domain_features")
        # What the towers' gates read is not scaled.
        bottom = Extended(bottom, [EPNet(Select(schema, names), gate_units, name="epnet")])
    width = columns.columns.width
    towers = [
        GatedTower(1, width, units, gate_units, True, dropout, name=f"tower_{k}")
        for k in range(len(schema.labels))
    ]
    whole = Extended(bottom, columns=[columns], name="bottom")
    return Road(schema, whole, LabelTowers(towers, name="tower"), **ranker)


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
    columns = _gate_columns(schema, gate_features)
    tower = GatedTower(
        len(schema.labels), columns.columns.width, units, gate_units, False, dropout, name="tower"
    )
    return Road(
        schema, Extended(Bottom(flat=True), columns=[columns], name="bottom"), tower, **ranker
    )


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
    names = _domain_features(schema, gate_features, "gate_features")
    gate = EPNet(Select(schema, names), gate_units, name="epnet")
    bottom = Extended(Bottom(flat=True), [gate], name="bottom")
    return Road(schema, bottom, Tower(len(schema.labels), units, dropout, name="tower"), **ranker)
