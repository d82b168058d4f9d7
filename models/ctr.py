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
from qianmo.layers.features import Categorical
from qianmo.layers.fm import FM
from qianmo.layers.mlp import MLP
from qianmo.layers.schema import Schema
from qianmo.layers.tower import Tower
from qianmo.models.road import Road

UNITS = (256, 128, 64)


def road(
    schema: Schema,
    parts: dict[str, Any],
    *,
    seam_dim: int = 0,
    tower_units: Sequence[int] = (),
    **ranker: Any,
) -> Road:
    """Puts the parts of a `Bottom` before a `Tower`, and a centred seam of that width between."""
    bottom = Bottom(**parts, seam_dim=seam_dim, name="bottom")
    num_labels = len(schema.labels)
    linear_dim = num_labels if bottom.linear else 0
    tower = Tower(num_labels, tower_units, name="tower")
    return Road(schema, bottom, tower, linear_dim=linear_dim, **ranker)


def lr(schema: Schema, **ranker: Any) -> Road:
    """Logistic regression: z = w_1 linear + w_2 dense + b."""
    # It reads no vectors, so they take as little room as they can.
    features = [
        dataclasses.replace(f, dim=1) if isinstance(f, Categorical) else f for f in schema.features
    ]
    parts = {"linear": True, "dense": bool(schema.dense)}
    return road(schema.with_features(features), parts, **ranker)


def mlp(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """A plain network on the embedded row: z = w MLP(x) + b."""
    return road(schema, {"networks": [MLP(units, dropout=dropout)]}, **ranker)


def wdl(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """Wide and deep: z = w_1 linear + w MLP(x) + b.

    References: Cheng et al. 2016, Wide & Deep Learning for Recommender Systems. Here the wide part
    has no hand-made crosses, and its weight in the sum is learned.
    """
    parts = {"networks": [MLP(units, dropout=dropout)], "linear": True}
    return road(schema, parts, **ranker)


def deepfm(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """DeepFM: z = w_1 linear + w_2 FM(V) + w MLP(x) + b.

    References: Guo et al. 2017, DeepFM, where the weights of the terms are 1; here they learn.
    """
    networks = [MLP(units, dropout=dropout)]
    parts = {"interactions": [FM()], "networks": networks, "linear": True}
    return road(schema, parts, **ranker)


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
    """xDeepFM: z = w_1 linear + w_2 CIN(V) + w MLP(x) + b.

    References: Lian et al. 2018, xDeepFM.
    """
    networks = [MLP(units, dropout=dropout)]
    parts = {"interactions": [CIN(cin_units, cin_activation)], "networks": networks, "linear": True}
    return road(schema, parts, **ranker)
