"""One table of every public layer and model, for the tests they share (`test_conformance.py`).

A new layer or model needs one row. `make` is called under several dtype policies and should give a
small layer with fixed seeds; `inputs` gives what its call takes: an array, or any nesting of arrays
in dicts, tuples and NamedTuples, with the batch on the first axis of each (floats as float32).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tf_keras

from qianmo.layers.auxiliary_network import AuxiliaryNetwork
from qianmo.layers.bi_interaction import BiInteraction
from qianmo.layers.bottom import Bottom
from qianmo.layers.cin import CIN
from qianmo.layers.cross import CrossNetwork
from qianmo.layers.domain_column import DomainColumn
from qianmo.layers.domain_experts import DomainExperts
from qianmo.layers.domain_mlp import DomainMLP
from qianmo.layers.domain_towers import DomainTowers
from qianmo.layers.embed import Embed, Embedded
from qianmo.layers.encode import Encode, Encoded
from qianmo.layers.epnet import EPNet
from qianmo.layers.expert_mixture import ExpertMixture
from qianmo.layers.extended import Extended
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.first_order import FirstOrder
from qianmo.layers.fm import FM
from qianmo.layers.fwfm import FwFM
from qianmo.layers.gate_columns import GateColumns
from qianmo.layers.gated_tower import GatedTower
from qianmo.layers.item_queue import ItemQueue
from qianmo.layers.label_towers import LabelTowers
from qianmo.layers.meta_embedding import MetaEmbedding
from qianmo.layers.mlp import MLP
from qianmo.layers.mmoe import MMoE
from qianmo.layers.partitioned_norm import PartitionedNorm
from qianmo.layers.personal_gate import PersonalGate
from qianmo.layers.ple import PLE
from qianmo.layers.product_tower import ProductTower
from qianmo.layers.schema import Schema
from qianmo.layers.select import Select
from qianmo.layers.star import StarDense
from qianmo.layers.star_tower import StarTower
from qianmo.layers.tower import Tower
from qianmo.models import zoo

BATCH = 6
DOMAIN = np.array([2, 1, 0, 3, 1, 2], np.int64)  # of three, the third row's unknown

# Packages whose layers and models should all be in the table.
PACKAGES = ("qianmo.layers", "qianmo.models")

# Public layers that are not in the table: full class name -> reason.
EXEMPT: dict[str, str] = {
    "qianmo.models.ranker.Ranker": "abstract: says what its heads are",
    "qianmo.layers.inner_loop.InnerLoop": "adapts a tower: is in the models with `meta`",
    "qianmo.layers.meta.Meta": "an objective: is in the models with `meta`",
    "qianmo.layers.star.StarLeaves": "reads another layer's kernel, no row of data: in StarDense",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and something to call it with.

    Attributes:
      make: builds the layer.
      inputs: makes its inputs, `BATCH` rows.
      smooth: False when its gradients cannot be compared with finite differences in float64.
      float32_outputs: places, among its flattened outputs, of those that stay float32 under the
        mixed_bfloat16 policy, as logits do.
    """

    make: Callable[[], tf_keras.layers.Layer]
    inputs: Callable[[], Any]
    smooth: bool = True
    float32_outputs: tuple[int, ...] = ()


def floats(*shape: int) -> Callable[[], npt.NDArray[np.float32]]:
    """Standard normal inputs, [BATCH, *shape]; the same at every call."""
    return lambda: np.random.default_rng(3).normal(size=(BATCH, *shape)).astype(np.float32)


SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=5, dim=3),
        Categorical(name="city", dtype="string", vocabulary=("ab", "cd"), dim=3),
        Categorical(name="tags", hash_buckets=4, max_length=3, dim=3),
        Dense(name="age", mean=0.5, variance=4.0),
    ),
    labels=("click",),
    task_id="member",
    timestamp="time",
)


def raw() -> dict[str, Any]:
    """Rows as `SCHEMA` describes them, some out of range."""
    return {
        "user": np.array([0, 4, 5, -1, 2, 2], np.int64),
        "city": np.array([b"ab", b"cd", b"", b"x", b"ab", b"ab"]),
        "tags": np.arange(BATCH * 3, dtype=np.int64).reshape(BATCH, 3),
        "tags_length": np.array([0, 1, 2, 3, 4, -1], np.int64),
        "age": np.array([0.5, -3.0, 9.0, np.nan, np.inf, 1.0], np.float32),
    }


def with_domain(*shape: int) -> Callable[[], Any]:
    """Standard normal inputs, and a domain of three for each row."""
    return lambda: (floats(*shape)(), DOMAIN)


def with_domain_column(*shape: int) -> Callable[[], npt.NDArray[np.float32]]:
    """Standard normal inputs, and their domain as the last column."""
    column = DOMAIN[:, None].astype(np.float32)
    return lambda: np.concatenate([floats(*shape)(), column], 1)


def embedded() -> Embedded:
    """What `Embed` makes of rows of `DOMAIN_SCHEMA`."""
    return Embedded((floats(3, 2)(),), floats(3, 1)(), floats(1)(), DOMAIN)


def expert(seed: int) -> Bottom:
    """An expert on embedded rows."""
    return Bottom(networks=[MLP((4,), seed=seed)])


DOMAIN_SCHEMA = Schema(
    features=(
        Categorical(name="scene", num_ids=3, dim=2),
        Categorical(name="user", num_ids=5, dim=2, side="user"),
        Categorical(name="topic", num_ids=5, dim=2, domains=(1,)),
        Dense(name="age", mean=0.5, variance=4.0),
    ),
    labels=("click", "like"),
    domain="scene",
)


def encoded() -> Encoded:
    """What `Encode` makes of such rows."""
    return Encoded(
        ids={
            "user": np.array([1, 5, 0, 0, 3, 3], np.int64),
            "city": np.array([1, 2, 0, 0, 1, 1], np.int64),
            "tags": np.arange(BATCH * 3, dtype=np.int64).reshape(BATCH, 3) % 5,
        },
        lengths={"tags": np.array([0, 1, 2, 3, 3, 0], np.int64)},
        dense=floats(1)(),
        status=np.zeros(BATCH, np.int32),
    )


def model(**config: Any) -> Case:
    """A model of the zoo; its logits are float32 under every policy."""
    made = functools.partial(zoo.build, SCHEMA, {"embedding_stddev": 0.1, **config})
    heads = 2 if config["name"] == "dual_dnn" else 1
    return Case(make=made, inputs=raw, smooth=False, float32_outputs=tuple(range(heads)))


def raw_of_domains() -> dict[str, Any]:
    """Rows as `DOMAIN_SCHEMA` describes them, one of an unknown domain."""
    return {
        "scene": np.array([1, 0, 7, 2, 0, 1], np.int64),
        "user": np.array([0, 4, 5, -1, 2, 2], np.int64),
        "topic": np.array([0, 4, 5, -1, 2, 2], np.int64),
        "age": np.array([0.5, -3.0, 9.0, np.nan, np.inf, 1.0], np.float32),
    }


def model_of_domains(**config: Any) -> Case:
    """A model of the zoo whose parts differ by domain."""
    made = functools.partial(zoo.build, DOMAIN_SCHEMA, {"embedding_stddev": 0.1, **config})
    return Case(make=made, inputs=raw_of_domains, smooth=False, float32_outputs=(0,))


SIDES_SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=5, dim=2, side="user"),
        Categorical(name="topic", num_ids=5, dim=2, side="item"),
        Dense(name="age", mean=0.5, variance=4.0),
    ),
    labels=("click",),
    task_id="user",
    timestamp="time",
)


# Each item belongs to a domain, and its age is what those of one domain have.
FUSED_SCHEMA = dataclasses.replace(
    SIDES_SCHEMA,
    features=(
        *SIDES_SCHEMA.features[:2],
        Dense(name="age", mean=0.5, variance=4.0, side="item", domains=(2,)),
        Categorical(name="scene", num_ids=3, dim=2, side="item"),
    ),
    domain="scene",
)


def two_tower(schema: Schema = SIDES_SCHEMA, **config: Any) -> Case:
    """A two-tower model."""
    values = {"name": "two_tower", "item_id": "topic", "dim": 3, "embedding_stddev": 0.1, **config}
    made = functools.partial(zoo.build, schema, values)
    names = schema.input_names

    def inputs() -> dict[str, Any]:
        rows = raw_of_domains()
        return {name: rows[name] for name in names}

    return Case(make=made, inputs=inputs, smooth=False, float32_outputs=(0,))


DUAL_DNN = {
    "name": "dual_dnn",
    "interactions": {"cin": {"units": (4, 4)}, "bi_interaction": {}, "cross": {"num_layers": 1}},
    "teacher_units": (6, 5),
    "student_units": (4,),
    "hint_weight": 0.1,
}

CASES: dict[str, Case] = {
    "MLP": Case(make=lambda: MLP((7, 3), l2=0.1, dropout=0.5, seed=1), inputs=floats(5)),
    "MLP identity": Case(make=lambda: MLP(()), inputs=floats(5)),
    "FM": Case(make=FM, inputs=floats(4, 3)),
    "FwFM": Case(make=FwFM, inputs=floats(4, 3)),
    "FwFM per dim": Case(make=lambda: FwFM(per_dim=True), inputs=floats(4, 3)),
    "BiInteraction": Case(make=BiInteraction, inputs=floats(4, 3)),
    "CIN": Case(make=lambda: CIN((6, 4, 3), seed=1), inputs=floats(4, 3)),
    "CIN whole": Case(
        make=lambda: CIN((5, 4), activation="tanh", split_half=False, seed=1), inputs=floats(4, 3)
    ),
    "CrossNetwork": Case(make=lambda: CrossNetwork(3, seed=1), inputs=floats(5)),
    "CrossNetwork of low rank": Case(
        make=lambda: CrossNetwork(2, projection_dim=2, seed=1), inputs=floats(5)
    ),
    "Encode": Case(make=lambda: Encode(SCHEMA), inputs=raw, smooth=False),
    "Embed": Case(make=lambda: Embed(SCHEMA, linear_dim=1), inputs=encoded),
    "Bottom": Case(
        make=lambda: Bottom([FM()], [MLP((4,), seed=1)], dense=True, flat=True),
        inputs=lambda: Embedded((floats(3, 2)(),), floats(3, 1)(), floats(2)(), DOMAIN),
    ),
    "Extended": Case(
        make=lambda: Extended(
            expert(1), [Select(DOMAIN_SCHEMA, ["user", "age"])], [DomainColumn()]
        ),
        inputs=embedded,
    ),
    "Select": Case(make=lambda: Select(DOMAIN_SCHEMA, ["scene", "age"]), inputs=embedded),
    "FirstOrder": Case(make=lambda: FirstOrder(1), inputs=embedded),
    "GateColumns": Case(make=lambda: GateColumns(DOMAIN_SCHEMA, ["user", "age"]), inputs=embedded),
    "DomainColumn": Case(make=DomainColumn, inputs=embedded, smooth=False),
    "DomainExperts": Case(
        make=lambda: DomainExperts([MLP((4,), seed=p) for p in range(3)]), inputs=with_domain(5)
    ),
    "DomainMLP": Case(
        make=lambda: DomainMLP(3, (5, 4), dropout=0.5, seed=1), inputs=with_domain(5)
    ),
    "PersonalGate": Case(
        make=lambda: PersonalGate(4, num_gates=2, units=(3,), seed=1),
        inputs=lambda: (floats(5)(), floats(4, 3)()),
    ),
    "ExpertMixture": Case(
        make=lambda: ExpertMixture(
            [expert(1), expert(2)],
            Bottom(networks=[DomainMLP(3, (4,), seed=3)]),
            PersonalGate(3, seed=1),
            Select(DOMAIN_SCHEMA, ["scene", "user"]),
        ),
        inputs=embedded,
    ),
    "MMoE": Case(make=lambda: MMoE([expert(1), expert(2)], 3, seed=1), inputs=embedded),
    "MMoE by domain": Case(
        make=lambda: MMoE([expert(1), expert(2)], 4, by_domain=True, seed=1), inputs=embedded
    ),
    "PLE": Case(make=lambda: PLE(2, [[4], [3]], num_own=2, num_shared=2, seed=1), inputs=embedded),
    "PLE by domain": Case(
        make=lambda: PLE(3, [[4], [3]], num_shared=2, by_domain=True, seed=1), inputs=embedded
    ),
    "AuxiliaryNetwork": Case(make=lambda: AuxiliaryNetwork(2, (3,), seed=1), inputs=embedded),
    "EPNet": Case(
        make=lambda: EPNet(Select(DOMAIN_SCHEMA, ["scene"]), units=4, seed=1),
        inputs=embedded,
        smooth=False,  # it stops gradients
    ),
    "PartitionedNorm": Case(make=lambda: PartitionedNorm(3), inputs=with_domain(5)),
    "StarDense": Case(make=lambda: StarDense(4, 3, seed=1), inputs=with_domain(5)),
    "StarTower": Case(
        make=lambda: StarTower(2, 3, (4, 3), norm=True, auxiliary=True, seed=1),
        inputs=with_domain_column(7),
        smooth=False,
        float32_outputs=(0,),
    ),
    "DomainTowers": Case(
        make=lambda: DomainTowers(2, 3, (4, 3), seed=1),
        inputs=with_domain_column(5),
        smooth=False,
        float32_outputs=(0,),
    ),
    "LabelTowers": Case(
        make=lambda: LabelTowers([Tower(1, (4,), seed=k) for k in (1, 2)], split=True),
        inputs=floats(6),
        smooth=False,
        float32_outputs=(0,),
    ),
    "LabelTowers of gated towers": Case(
        make=lambda: LabelTowers([GatedTower(1, 3, (4,), seed=k) for k in (1, 2)]),
        inputs=floats(8),
        smooth=False,
        float32_outputs=(0,),
    ),
    "GatedTower": Case(
        make=lambda: GatedTower(2, 3, (4, 3), gate_units=5, seed=1),
        inputs=floats(8),
        smooth=False,
        float32_outputs=(0,),
    ),
    "Bottom with a seam": Case(
        make=lambda: Bottom(networks=[MLP((4,), seed=1)], seam_dim=3, seed=2), inputs=embedded
    ),
    "Tower with auxiliary logits": Case(
        make=lambda: Tower(2, (4, 3), auxiliary=True),
        inputs=floats(5),
        smooth=False,
        float32_outputs=(0,),
    ),
    # Its logits are float32 under every policy: too coarse for finite differences.
    "Tower": Case(
        make=lambda: Tower(2, (4, 3)), inputs=floats(5), smooth=False, float32_outputs=(0,)
    ),
    **{
        f"model {name}": model(name=name)
        for name in ("lr", "mlp", "wdl", "deepfm", "dcn", "xdeepfm")
    },
    "model mlp with meta": model(
        name="mlp",
        units=(5,),
        seam_dim=4,
        tower_units=(3,),
        meta={"inner": {"rates": "rank_one", "shrinkage": 3.0}},
    ),
    "model dual_dnn": model(**DUAL_DNN),
    "model teacher_alone": model(name="teacher_alone", interactions={"fwfm": {}}),
    "model star": model_of_domains(name="star", units=(4,), norm=True, auxiliary_units=(3,)),
    "model cross_domain": model_of_domains(
        name="cross_domain", expert_units=(4, 3), interactions={"fm": {}}, tower_units=(3,)
    ),
    **{
        f"model {name} of {tasks}": model_of_domains(name=name, tasks=tasks, tower_units=(3,))
        for name, tasks in (("shared_bottom", "domains"), ("mmoe", "labels"), ("ple", "domains"))
    },
    "MetaEmbedding": Case(make=lambda: MetaEmbedding(3, seed=1), inputs=floats(5)),
    "ItemQueue": Case(
        make=lambda: ItemQueue(4, 3, 7), inputs=floats(3), smooth=False, float32_outputs=(0,)
    ),
    # Without anything in the queue; its products with negatives are in the models' tests.
    "ProductTower": Case(
        make=lambda: ProductTower(Tower(3, (4,), seed=1), ItemQueue(4, 3, 7), 0.5),
        inputs=floats(8),
        smooth=False,
        float32_outputs=(0, 2),
    ),
    "ProductTower of domains": Case(
        make=lambda: ProductTower(Tower(3, (4,), seed=1), ItemQueue(4, 3, 7), num_domains=3),
        inputs=lambda: np.concatenate([with_domain_column(5)(), floats(3)()], 1),
        smooth=False,
        float32_outputs=(0, 2),
    ),
    "model two_tower": two_tower(units=(4,), item_units=(5,)),
    "model two_tower fused": two_tower(FUSED_SCHEMA, units=(4,), item_units=(5,), num_shared=1),
    "model two_tower with meta": two_tower(seam_dim=4, tower_units=(3,), meta={"inner": {}}),
    "model distilled": dataclasses.replace(
        model_of_domains(
            name="distilled",
            teacher={"name": "cross_domain", "expert_units": (4,), "tower_units": (3,)},
            student={"name": "mlp", "units": (4,), "tower_units": (3,)},
            hint_weight=0.1,
        ),
        float32_outputs=(0, 1),
    ),
    "model ppnet": model_of_domains(name="ppnet", units=(4, 3), epnet=True),
}
