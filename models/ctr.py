"""Click-through models, each a bottom and a tower on the plain road.

All take the arguments of `road`: by default the tower is linear and nothing stands at the seam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qianmo.layers.bottom import Bottom
from qianmo.layers.cin import CIN
from qianmo.layers.cross import CrossNetwork
from qianmo.layers.extended import Extended
from qianmo.layers.features import Categorical
from qianmo.layers.first_order import FirstOrder
from qianmo.layers.fm import FM
from qianmo.layers.mlp import MLP
from qianmo.layers.schema import Schema
from qianmo.layers.tower import Tower
from qianmo.models.road import Road

UNITS = (256, 128, 64)


def road(
    schema: Schema,
    parts: dict[str, Any],
    first_order: FirstOrder | None = None,
    *,
    seam_dim: int = 0,
    tower_units: Sequence[int] = (),
    **ranker: Any,
) -> Road:
    """Puts the parts of a `Bottom` before a `Tower`, and a centred seam of that width between.

    First-order terms join the logits, past the seam and the tower's layers.
    """
    bottom = Bottom(**parts, seam_dim=seam_dim, name="bottom")
    num_labels = len(schema.labels)
    if first_order is None:
        return Road(schema, bottom, Tower(num_labels, tower_units, name="tower"), **ranker)
    whole = Extended(bottom, columns=[first_order], name="bottom")
    tower = Tower(num_labels, tower_units, auxiliary=True, name="tower")
    return Road(schema, whole, tower, **{"linear_dim": num_labels, **ranker})


def _first_order(schema: Schema, dense: bool = True) -> FirstOrder:
    return FirstOrder(len(schema.labels), dense, name="first_order")


def lr(schema: Schema, **ranker: Any) -> Road:
    """Logistic regression: z = s + b, with s the first-order terms of ids and dense features.

    Those of dense features are weights of the tower, so that they adapt with `meta`.
    """
    # It reads no vectors, so they take as little room as they can.
    features = [
        dataclasses.replace(f, dim=1) if isinstance(f, Categorical) else f for f in schema.features
    ]
    first_order = _first_order(schema, dense=False)
    return road(schema.with_features(features), {"dense": True}, first_order, **ranker)


def mlp(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """A plain network on the embedded row: z = w MLP(x) + b."""
    return road(schema, {"networks": [MLP(units, dropout=dropout)]}, **ranker)


def wdl(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """Wide and deep: z = s + w MLP(x) + b, with s the first-order terms, one for each label.

    References: Cheng et al. 2016, Wide & Deep Learning for Recommender Systems. Here the wide part
    has no hand-made crosses, and one optimiser trains both parts.
    """
    parts = {"networks": [MLP(units, dropout=dropout)]}
    return road(schema, parts, _first_order(schema), **ranker)


def deepfm(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """DeepFM: z = s + w_1 FM(V) + w MLP(x) + b, with s the first-order terms, one for each label.

    References: Guo et al. 2017, DeepFM, where w_1 is 1; here it learns, as several labels share V.
    V has no vectors of dense features: these take part in s and x.
    """
    parts = {"interactions": [FM()], "networks": [MLP(units, dropout=dropout)]}
    return road(schema, parts, _first_order(schema), **ranker)


def dcn(
    schema: Schema,
    *,
    num_cross_layers: int = 2,
    projection_dim: int | None = None,
    units: Sequence[int] = UNITS,
    dropout: float = 0.0,
    **ranker: Any,
) -> Road:
    """Deep and cross: z = w [Cross(x) ; MLP(x)] + b.

    With `projection_dim` the cross layers' matrices are products of two of that rank.

    References: Wang et al. 2021, DCN V2.
    """
    networks = [CrossNetwork(num_cross_layers, projection_dim), MLP(units, dropout=dropout)]
    return road(schema, {"networks": networks}, **ranker)


def xdeepfm(
    schema: Schema,
    *,
    cin_units: Sequence[int] = (64, 64),
    cin_activation: str = "linear",
    units: Sequence[int] = UNITS,
    dropout: float = 0.0,
    **ranker: Any,
) -> Road:
    """xDeepFM: z = s + w_1 CIN(V) + w MLP(x) + b, with s the first-order terms, one for each label.

    References: Lian et al. 2018, xDeepFM. V has no vectors of dense features: these take part in s
    and x.
    """
    networks = [MLP(units, dropout=dropout)]
    parts = {"interactions": [CIN(cin_units, cin_activation)], "networks": networks}
    return road(schema, parts, _first_order(schema), **ranker)
