"""Click-through models, each a bottom and a linear tower on the plain road."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qianmo.layers.bottom import Bottom
from qianmo.layers.cin import CIN
from qianmo.layers.cross import CrossNetwork
from qianmo.layers.features import Categorical, Schema
from qianmo.layers.fm import FM
from qianmo.layers.mlp import MLP
from qianmo.layers.tower import Tower
from qianmo.models.road import Road

UNITS = (256, 128, 64)


def _road(schema: Schema, bottom: Bottom, ranker: dict[str, Any]) -> Road:
    num_labels = len(schema.labels)
    linear_dim = num_labels if bottom.linear else 0
    return Road(schema, bottom, Tower(num_labels, name="tower"), linear_dim=linear_dim, **ranker)


def lr(schema: Schema, **ranker: Any) -> Road:
    """Logistic regression: z = w_1 linear + w_2 dense + b."""
    # It reads no vectors, so they take as little room as they can.
    features = [
        dataclasses.replace(f, dim=1) if isinstance(f, Categorical) else f for f in schema.features
    ]
    bottom = Bottom(linear=True, dense=bool(schema.dense), name="bottom")
    return _road(schema.with_features(features), bottom, ranker)


def mlp(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """A plain network on the embedded row: z = w MLP(x) + b."""
    return _road(schema, Bottom(networks=[MLP(units, dropout=dropout)], name="bottom"), ranker)


def wdl(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """Wide and deep: z = w_1 linear + w MLP(x) + b.

    References: Cheng et al. 2016, Wide & Deep Learning for Recommender Systems. Here the wide part
    has no hand-made crosses, and its weight in the sum is learned.
    """
    bottom = Bottom(networks=[MLP(units, dropout=dropout)], linear=True, name="bottom")
    return _road(schema, bottom, ranker)


def deepfm(
    schema: Schema, *, units: Sequence[int] = UNITS, dropout: float = 0.0, **ranker: Any
) -> Road:
    """DeepFM: z = w_1 linear + w_2 FM(V) + w MLP(x) + b.

    References: Guo et al. 2017, DeepFM, where the weights of the terms are 1; here they learn.
    """
    bottom = Bottom([FM()], [MLP(units, dropout=dropout)], linear=True, name="bottom")
    return _road(schema, bottom, ranker)


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
    return _road(schema, Bottom(networks=networks, name="bottom"), ranker)


def xdeepfm(
    schema: Schema,
    *,
    cin_units: Sequence[int] = (64, 64),
    units: Sequence[int] = UNITS,
    dropout: float = 0.0,
    **ranker: Any,
) -> Road:
    """xDeepFM: z = w_1 linear + w_2 CIN(V) + w MLP(x) + b.

    References: Lian et al. 2018, xDeepFM.
    """
    bottom = Bottom([CIN(cin_units)], [MLP(units, dropout=dropout)], linear=True, name="bottom")
    return _road(schema, bottom, ranker)
