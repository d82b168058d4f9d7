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

from qianmo.layers.bi_interaction import BiInteraction
from qianmo.layers.bottom import Bottom
from qianmo.layers.cin import CIN
from qianmo.layers.cross import CrossNetwork
from qianmo.layers.embed import Embed, Embedded
from qianmo.layers.encode import Encode, Encoded
from qianmo.layers.features import Categorical, Dense, Schema
from qianmo.layers.fm import FM
from qianmo.layers.fwfm import FwFM
from qianmo.layers.mlp import MLP
from qianmo.layers.tower import Tower
from qianmo.models import zoo

BATCH = 6
DOMAIN = np.array([2, 1, 0, 3, 1, 2], np.int64)  # of three, the third row's unknown

# Packages whose layers and models should all be in the table.
PACKAGES = ("qianmo.layers", "qianmo.models")

# Public layers that are not in the table: full class name -> reason.
EXEMPT: dict[str, str] = {"qianmo.models.ranker.Ranker": "abstract: says what its heads are"}


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
        make=lambda: Bottom([FM()], [MLP((4,), seed=1)], linear=True, flat=True),
        inputs=lambda: Embedded((floats(3, 2)(),), floats(3, 1)(), floats(2)(), DOMAIN),
    ),
    # Its logits are float32 under every policy: too coarse for finite differences.
    "Tower": Case(
        make=lambda: Tower(2, (4, 3)), inputs=floats(5), smooth=False, float32_outputs=(0,)
    ),
    **{
        f"model {name}": model(name=name)
        for name in ("lr", "mlp", "wdl", "deepfm", "dcn", "xdeepfm")
    },
    "model dual_dnn": model(**DUAL_DNN),
    "model teacher_alone": model(name="teacher_alone", interactions={"fwfm": {}}),
}
