"""Models of several domains on the plain road, by how their parts differ between domains.

In all of them the domain is an ordinary feature of the schema (`Schema.domain`), and rows of an
unknown domain are scored by the shared parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import tf_keras

from qianmo.layers.auxiliary_network import AuxiliaryNetwork
from qianmo.layers.bottom import Bottom
from qianmo.layers.domain_column import DomainColumn
from qianmo.layers.domain_experts import DomainExperts
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.expert_mixture import ExpertMixture
from qianmo.layers.extended import Extended
from qianmo.layers.mlp import MLP
from qianmo.layers.personal_gate import PersonalGate
from qianmo.layers.schema import Schema
from qianmo.layers.seeding import derive_seed, pick_seed
from qianmo.layers.select import Select
from qianmo.layers.star_tower import StarTower
from qianmo.layers.tower import Tower
from qianmo.models.dual_dnn import interaction_layers
from qianmo.models.road import Road

SHARED, OWN, GATE, TOWER = range(4)  # paths of the parts' seeds


def star(
    schema: Schema,
    *,
    units: Sequence[int] = (128, 64, 32),
    dropout: float = 0.0,
    norm: bool = False,
    auxiliary_units: Sequence[int] | None = None,
    **ranker: Any,
) -> Road:
    """STAR: the embedded row, and a tower whose layers are a shared centre and domains' leaves.

    Args:
      schema: what a row holds, its domain among the features.
      units: widths of the tower.
      dropout: of the tower.
      norm: whether the row is normalised by its domain's statistics, see `PartitionedNorm`.
      auxiliary_units: widths of an `AuxiliaryNetwork` that adds to the logits; None for none.
      **ranker: arguments of `Ranker`.
    """
    num_labels = len(schema.labels)
    columns: list[Any] = [DomainColumn(name="domain")]
    if auxiliary_units is not None:
        columns.insert(0, AuxiliaryNetwork(num_labels, auxiliary_units, name="auxiliary"))
    tower = StarTower(
        num_labels,
        schema.num_domains,
        units,
        dropout,
        norm=norm,
        auxiliary=auxiliary_units is not None,
        name="tower",
    )
    return Road(
        schema, Extended(Bottom(flat=True), columns=columns, name="bottom"), tower, **ranker
    )


def own_features(schema: Schema, domain: int) -> list[str]:
    """The features that a model of one domain alone would read: what its rows have and differ in.

    Args:
      schema: all features.
      domain: place of the domain, 1 to P.
    """
    return [
        f.name
        for f in schema.features
        if f.name != schema.domain and (not f.domains or schema.owners(f.domains)[domain])
    ]


def _own_experts(
    reads: Sequence[Select],
    interactions: Mapping[str, Mapping[str, Any]],
    units: Sequence[int],
    dropout: float,
    seed: int,
) -> tf_keras.layers.Layer:
    """All domains' experts, stacked where they are MLPs that read the same features."""
    if not interactions and all(select.features == reads[0].features for select in reads):
        mlp = DomainMLP(len(reads), units, dropout=dropout, seed=seed)
        return Extended(Bottom(networks=[mlp]), [reads[0]])
    return DomainExperts(
        [
            Extended(expert(interactions, units, dropout, derive_seed(seed, p)), [select])
            for p, select in enumerate(reads)
        ]
    )


def expert(
    interactions: Mapping[str, Mapping[str, Any]],
    units: Sequence[int],
    dropout: float,
    seed: int,
) -> Bottom:
    """An expert: interactions by name beside an MLP, as `dual_dnn` names them."""
    fields, flat = interaction_layers(interactions)
    return Bottom(fields, [*flat, MLP(units, dropout=dropout, seed=seed)])


def expert_mixture(
    schema: Schema,
    given: Schema,
    gate_features: Sequence[str],
    *,
    num_shared: int,
    units: Sequence[int],
    interactions: Mapping[str, Mapping[str, Any]] | None = None,
    gate_units: Sequence[int] = (),
    dropout: float,
    seed: int,
    name: str,
) -> ExpertMixture:
    """Shared experts, and for each domain its own.

    Shared experts read all features, so that domains that own one together learn together from it;
    where a row lacks one they read zeros. A domain's own expert reads what its rows have.

    Args:
      schema: what a row holds; tells who owns what.
      given: what the mixture is given of it, such as `Select.selected`.
      gate_features: what the gate reads.
      num_shared: shared experts.
      units: widths of each expert's MLP.
      interactions: name -> arguments of the interactions in each expert beside its MLP.
      gate_units: widths of the gate's hidden layers.
      dropout: of the experts.
      seed: of all parts.
      name: of the layer.
    """
    names = [f.name for f in given.features]
    own = [
        [feature for feature in own_features(schema, p) if feature in names]
        for p in range(1, schema.num_domains + 1)
    ]
    reads = [Select(given, features) for features in own]
    crossings = interactions or {}
    return ExpertMixture(
        [
            expert(crossings, units, dropout, derive_seed(seed, SHARED, i))
            for i in range(num_shared)
        ],
        _own_experts(reads, crossings, units, dropout, derive_seed(seed, OWN)),
        PersonalGate(num_shared + 1, units=gate_units, seed=derive_seed(seed, GATE)),
        Select(given, gate_features),
        name=name,
    )


def cross_domain(
    schema: Schema,
    *,
    num_shared: int = 1,
    expert_units: Sequence[int] = (128, 64),
    interactions: Mapping[str, Mapping[str, Any]] | None = None,
    gate_features: Sequence[str] = (),
    gate_units: Sequence[int] = (),
    tower_units: Sequence[int] = (32,),
    dropout: float = 0.0,
    star_tower: bool = True,
    **ranker: Any,
) -> Road:
    """The cross-domain assembly: shared and own experts, a personal gate, star towers.

    Every row passes the shared experts, which read all features, zeros for those that its domain
    lacks, and the one of its own domain, which reads what a model of that domain alone would: not
    what its rows lack, nor which domain it is.

    Args:
      schema: what a row holds, its domain among the features.
      num_shared: shared experts.
      expert_units: widths of each expert's MLP.
      interactions: name -> arguments of the interactions in each expert beside its MLP.
      gate_features: what the gate reads. Default: the domain and the user's shared features.
      gate_units: widths of the gate's hidden layers.
      tower_units: widths of the tower's hidden layers.
      dropout: of the experts and the tower.
      star_tower: whether the tower's layers have leaves of each domain.
      **ranker: arguments of `Ranker`.
    """
    num_domains = schema.num_domains
    seed = pick_seed(None)
    if not gate_features:
        users = [f.name for f in schema.features if f.side == "user" and not f.domains]
        gate_features = [schema.domain, *(name for name in users if name != schema.domain)]
    mixture = expert_mixture(
        schema,
        schema,
        gate_features,
        num_shared=num_shared,
        units=expert_units,
        interactions=interactions,
        gate_units=gate_units,
        dropout=dropout,
        seed=seed,
        name="mixture",
    )
    num_labels = len(schema.labels)
    of_tower: dict[str, Any] = {"seed": derive_seed(seed, TOWER), "name": "tower"}
    if not star_tower:
        return Road(schema, mixture, Tower(num_labels, tower_units, dropout, **of_tower), **ranker)
    if num_labels == 1:
        warnings.warn(
            f"`star_tower`: {num_domains} domains share the one objective `{schema.labels[0]}`. "
            "The method's authors advise one shared tower there: leaves split the rows that teach "
            "it, and there is no second objective to tell apart. Set star_tower=False, or measure "
            "both.",
            stacklevel=2,
        )
    return Road(
        schema,
        Extended(mixture, columns=[DomainColumn(name="domain")], name="bottom"),
        StarTower(num_labels, num_domains, tower_units, dropout, **of_tower),
        **ranker,
    )
