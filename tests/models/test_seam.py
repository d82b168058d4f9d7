"""Towers take columns of h by their positions, so a bottom without them is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tf_keras

from qianmo.layers.auxiliary_network import AuxiliaryNetwork
from qianmo.layers.bottom import Bottom
from qianmo.layers.domain_column import DomainColumn
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.domain_towers import DomainTowers
from qianmo.layers.extended import Extended
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.gate_columns import GateColumns
from qianmo.layers.gated_tower import GatedTower
from qianmo.layers.item_queue import ItemQueue
from qianmo.layers.label_towers import LabelTowers
from qianmo.layers.mlp import MLP
from qianmo.layers.mmoe import MMoE
from qianmo.layers.ple import PLE
from qianmo.layers.product_tower import ProductTower
from qianmo.layers.schema import Schema
from qianmo.layers.star_tower import StarTower
from qianmo.layers.tower import Tower
from qianmo.models.dual_dnn import DualDNN
from qianmo.models.road import Road
from qianmo.models.two_tower import TwoTower

SCHEMA = Schema(
    features=(
        Categorical(name="scene", num_ids=3, dim=2, side="item"),
        Categorical(name="user", num_ids=5, dim=2, side="user"),
        Categorical(name="item", num_ids=5, dim=2, side="item"),
        Dense(name="age", mean=0.0, variance=1.0, side="user"),
    ),
    labels=("click", "like"),
    domain="scene",
)


def plain() -> Bottom:
    return Bottom(networks=[MLP((4,), seed=1)], name="bottom")


def with_columns(*columns: Any) -> Extended:
    return Extended(plain(), columns=columns, name="whole")


def auxiliary(num_labels: int = 2) -> AuxiliaryNetwork:
    return AuxiliaryNetwork(num_labels, (3,), seed=1)


def star(**arguments: Any) -> StarTower:
    return StarTower(2, 3, (4,), name="tower", **arguments)


def mmoe(tasks: int, by_domain: bool = False) -> MMoE:
    return MMoE([plain(), plain()], tasks, by_domain, seed=1)


def label_towers(**arguments: Any) -> LabelTowers:
    return LabelTowers([Tower(1), Tower(1)], **arguments)


GATES = GatedTower(2, 3, (4,), name="tower")
FITTING = {
    "plain": (plain(), Tower(2)),
    "star": (with_columns(DomainColumn()), star()),
    "star with auxiliary": (with_columns(auxiliary(), DomainColumn()), star(auxiliary=True)),
    "columns in two steps": (
        Extended(with_columns(auxiliary()), columns=[DomainColumn()]),
        star(auxiliary=True),
    ),
    "gates": (with_columns(GateColumns(SCHEMA, ["user", "age"])), GATES),
    "gates of each label": (
        with_columns(GateColumns(SCHEMA, ["user", "age"])),
        LabelTowers([GatedTower(1, 3, (4,)), GatedTower(1, 3, (4,))]),
    ),
    "towers of domains": (with_columns(DomainColumn()), DomainTowers(2, 3)),
    "towers of labels on one state": (plain(), label_towers()),
    "towers of labels on a state each": (mmoe(2), label_towers(split=True)),
    "the same with PLE": (PLE(2, [[4]]), label_towers(split=True)),
    "one tower on the states of all tasks": (mmoe(2), Tower(2)),
    "towers of domains on MMoE": (
        Extended(mmoe(4, by_domain=True), columns=[DomainColumn()]),
        DomainTowers(2, 3),
    ),
}
WRONG = {
    "star without the domain": (
        (plain(), star()),
        r"`tower` \(StarTower\) should find at the end of h domain \(1\)\. Received from `bottom` "
        r"\(Bottom\): nothing but its hidden state\. Give `Extended` the columns="
        r"\[DomainColumn\(\)\]\.",
    ),
    "star without auxiliary logits": (
        (with_columns(DomainColumn()), star(auxiliary=True)),
        r"auxiliary logits \(2\), domain \(1\)\. Received from `whole` \(Extended\): domain \(1\)",
    ),
    "auxiliary logits that the star does not read": (
        (with_columns(auxiliary(), DomainColumn()), star()),
        r"domain \(1\)\. Received from `whole` \(Extended\): auxiliary logits \(2\), domain \(1\)",
    ),
    "another order": (
        (with_columns(DomainColumn(), auxiliary()), star(auxiliary=True)),
        r"Received from `whole` \(Extended\): domain \(1\), auxiliary logits \(2\)",
    ),
    "auxiliary logits of other labels": (
        (with_columns(auxiliary(3), DomainColumn()), star(auxiliary=True)),
        r"auxiliary logits \(2\), domain \(1\)\. Received .*: auxiliary logits \(3\)",
    ),
    "no gates": ((plain(), GATES), r"gates \(3\)\..*columns=\[GateColumns\(schema, features\)\]"),
    "other gates": (
        (with_columns(GateColumns(SCHEMA, ["user"])), GATES),
        r"gates \(3\)\. Received .*: gates \(2\)",
    ),
    "towers of domains without the domain": (
        (plain(), DomainTowers(2, 3, name="tower")),
        r"`tower` \(DomainTowers\) should find at the end of h domain \(1\)",
    ),
    "a plain tower that would read the domain as a number": (
        (with_columns(DomainColumn()), Tower(2, name="tower")),
        r"`tower` \(Tower\) should find at the end of h nothing but its hidden state\. Received .*"
        r"domain \(1\)",
    ),
    "a state for each of other tasks": (
        (mmoe(4), label_towers(split=True, name="tower")),
        r"`tower` \(LabelTowers\) should get 2 hidden states side by side\. Received .*\): 4\.",
    ),
    "one state for towers that split": (
        (plain(), label_towers(split=True, name="tower")),
        r"should get 2 hidden states side by side\. Received from `bottom` \(Bottom\): 1\.",
    ),
}


@pytest.mark.parametrize("name", FITTING)
def test_bottoms_and_towers_that_fit(name: str) -> None:
    model = Road(SCHEMA, *FITTING[name])
    model.build()
    assert model.built


@pytest.mark.parametrize("name", WRONG)
def test_a_tower_that_would_misread_h_is_refused(name: str) -> None:
    (bottom, tower), message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Road(SCHEMA, bottom, tower)
    with pytest.raises(ValueError, match=message):
        DualDNN(SCHEMA, plain(), Tower(2), bottom, tower)
    with pytest.raises(ValueError, match=message):
        DualDNN(SCHEMA, bottom, tower, plain(), Tower(2))


def test_both_sides_of_a_two_tower_model_are_checked() -> None:
    schema = Schema(features=SCHEMA.features, labels=("click",), domain="scene")
    product = ProductTower(Tower(4), ItemQueue(4, 4, 6), num_domains=3, name="tower")
    with pytest.raises(ValueError, match=r"`tower` \(ProductTower\) should find .* domain \(1\)"):
        TwoTower(schema, plain(), plain(), product, Tower(4), item_id="item")
    extended = with_columns(DomainColumn())
    with pytest.raises(ValueError, match=r"nothing but its hidden state.* Received from `whole`"):
        TwoTower(schema, extended, with_columns(DomainColumn()), product, Tower(4), item_id="item")
    TwoTower(schema, extended, plain(), product, Tower(4), item_id="item").build()


@pytest.mark.parametrize(
    ("bottom", "tower", "name"),
    [
        (with_columns(DomainColumn()), StarTower(2, 2, (4,)), "StarTower"),
        (with_columns(DomainColumn()), DomainTowers(2, 4), "DomainTowers"),
        (Bottom(networks=[DomainMLP(5, (4,))]), Tower(2), "DomainMLP"),
    ],
)
def test_layers_of_another_number_of_domains_are_refused(
    bottom: Any, tower: Any, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"\({name}\) should have `num_domains` 3, those of"):
        Road(SCHEMA, bottom, tower).build()


def test_towers_of_labels_read_the_same_columns() -> None:
    for towers, split in (
        ([GatedTower(1, 3, (4,)), GatedTower(1, 2, (4,))], False),
        ([GatedTower(1, 3, (4,)), GatedTower(1, 3, (4,))], True),
    ):
        with pytest.raises(ValueError, match="should all read the same columns of h"):
            LabelTowers(towers, split=split)
    with pytest.raises(ValueError, match="`towers` should hold one for each label"):
        LabelTowers([])


def test_columns_that_do_not_say_what_they_are_are_refused() -> None:
    with pytest.raises(ValueError, match="Dense should have an attribute `columns`"):
        Extended(plain(), columns=[tf_keras.layers.Dense(2)])
