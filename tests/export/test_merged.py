"""Requests merged as TensorFlow Serving merges them: a bad one harms none of those beside it.

Each form's every signature is asked 15 good requests and a bad one, which has an extreme value in
one of its inputs; each input and each extreme of its type takes its turn.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tf_keras
from served import Answer, Request, Rows, batching, close
from tensorflow.core.protobuf import saved_model_pb2

from qianmo.export import retrieval
from qianmo.export.adapted import (
    ADAPT,
    BAD_SUPPORT,
    COUNT,
    REQUEST_ID,
    by_request_specs,
    export_adapted,
    rows_by_task,
)
from qianmo.export.personal_towers import BAD_TOWER, WEIGHTS, export_personal
from qianmo.export.retrieval import export_retrieval
from qianmo.export.saved_model import BAD_EMBEDDING, STATUS, export_fed, export_in_graph, session
from qianmo.export.shared_support import brought
from qianmo.export.store import export_fed_store, export_store
from qianmo.export.support_rows import kept
from qianmo.layers.encode import BAD_DENSE, BAD_LENGTH
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import tower_size
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.ops.library import library
from qianmo.ops.support_store import BAD_LABEL, BAD_TIME, BAD_VECTOR, SupportStore

SCHEMA = Schema(
    features=(
        Categorical(name="item", num_ids=40, dim=8),
        Categorical(name="city", dtype="string", vocabulary=("a", "b"), dim=8),
        Categorical(name="tag", dtype="string", hash_buckets=9, dim=8),
        Categorical(name="seen", num_ids=40, dim=8, max_length=3, table="item"),
        Categorical(name="scene", num_ids=3, dim=8),
        Dense(name="price", mean=0.0, variance=1.0),
        Dense(name="bid", mean=0.0, variance=1.0, domains=(1,)),
    ),
    labels=("click", "like"),
    task_id="user",
    timestamp="time",
    domain="scene",
)
RETRIEVAL = Schema(
    features=(
        Categorical(name="user", num_ids=30, dim=8, side="user"),
        Categorical(name="last", num_ids=40, dim=8, max_length=4, table="item", side="user"),
        Categorical(name="item", num_ids=40, dim=8, side="item"),
    ),
    labels=("click",),
    task_id="user",
    timestamp="time",
)
ITEM_SIDE = Dense(name="price", mean=0.0, variance=1.0, side="item")
USERS, MOST, ROWS = 12, 5, 60
INNER = {"steps": 2, "step_size": 0.3, "shrinkage": 1.0, "max_support": MOST}


def columns(size: int = ROWS, seed: int = 1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "item": random.integers(0, 40, size),
        "city": random.choice(np.array([b"a", b"b", b"c"], object), size),
        "tag": random.choice(np.array([b"x", b"y"], object), size),
        "seen": random.integers(0, 40, (size, 3)),
        "seen_length": random.integers(0, 4, size),
        "last": random.integers(0, 40, (size, 4)),
        "last_length": random.integers(1, 5, size),
        "scene": random.integers(0, 3, size),
        "price": random.normal(size=size).astype(np.float32),
        "bid": random.normal(size=size).astype(np.float32),
        "user": np.arange(size) % USERS,
        "time": np.arange(1, size + 1),
        "event_id": np.zeros(size, np.int64),
        "click": random.integers(0, 2, size).astype(np.float32),
        "like": random.integers(0, 2, size).astype(np.float32),
    }


def ranker() -> Any:
    tf_keras.utils.set_random_seed(3)
    config = {"name": "mlp", "units": (16,), "tower_units": (6,), "embedding_stddev": 0.5}
    made = zoo.build(SCHEMA, {**config, "meta": {"inner": INNER}})
    made.build()
    return made


def two_tower(support_feature: str = "") -> Any:
    tf_keras.utils.set_random_seed(3)
    schema = RETRIEVAL
    if not support_feature:
        schema = schema.with_features([*schema.features, ITEM_SIDE])
    config = {"name": "two_tower", "item_id": "item", "dim": 8, "units": (16,), "item_units": (8,)}
    config |= {"meta": {"inner": INNER}, "seam_dim": 8, "embedding_stddev": 0.5}
    made = zoo.build(schema, {**config, "support_feature": support_feature})
    made.build()
    return made


Made = list[tuple[pathlib.Path, Rows]]  # versions, and rows for all of their inputs


def in_graph(base: pathlib.Path) -> Made:
    return [(export_in_graph(ranker(), base, columns())[0], columns())]


def fed(base: pathlib.Path) -> Made:
    graph, _ = export_fed(ranker(), base, columns())
    lookup = base.with_name("served_lookup") / "1"
    names = ("item", "city", "tag", "seen", "seen_length", "scene")
    with session(lookup) as run:
        vectors = dict(run("serving_default", {name: columns()[name] for name in names}))
    return [(lookup, columns()), (graph, {**columns(), "scene_id": columns()["scene"], **vectors})]


def store(base: pathlib.Path) -> Made:
    return [(export_store(ranker(), base, columns())[0], columns())]


def fed_store(base: pathlib.Path) -> Made:
    export_fed_store(ranker(), base, columns())
    return [(base.with_name("served_lookup") / "1", columns())]


def with_support(specs: Mapping[str, Any], support: Mapping[Any, Rows]) -> Rows:
    """Rows that are a request each and bring their support, so that they can be cut anywhere."""
    rows = columns()
    own = {row: support[user] for row, user in enumerate(rows["user"].tolist())}
    given = {**rows, ADAPT: np.ones(ROWS, bool), **brought(specs, np.arange(ROWS), own)}
    return {**given, REQUEST_ID: np.arange(ROWS)}


def adapted_table(base: pathlib.Path) -> Made:
    rows = with_support(by_request_specs(SCHEMA, MOST), rows_by_task(SCHEMA, columns()))
    return [(export_adapted(ranker(), base, columns(), columns())[0], rows)]


def adapted_store(base: pathlib.Path) -> Made:
    model = ranker()
    held = SupportStore("test_merged", kept(model, "features").dim, 2, MOST)
    folder, _ = export_adapted(model, base, columns(), columns(), store=held, keep="features")
    return [(folder, with_support(by_request_specs(SCHEMA, MOST), rows_by_task(SCHEMA, columns())))]


def retrieval_by_request(base: pathlib.Path) -> Made:
    model = two_tower()
    items = {"item": np.arange(40), "price": np.linspace(-1, 1, 40, dtype=np.float32)}
    folder, _ = export_retrieval(model, base, columns(), items, best=5)
    support = {u: {k: v[3 * u : 3 * u + 3] for k, v in items.items()} for u in range(USERS)}
    return [(folder, with_support(retrieval.by_request_specs(model), support))]


def retrieval_by_list(base: pathlib.Path) -> Made:
    rows = {**columns(), ADAPT: np.ones(ROWS, bool)}
    items = {"item": np.arange(40)}
    return [(export_retrieval(two_tower("last"), base, rows, items, best=5)[0], rows)]


def personal(base: pathlib.Path) -> Made:
    model = ranker()
    h = model.tower_input({k: columns()[k][:1] for k in SCHEMA.input_names}, "model")
    size = tower_size(model.tower_of("model").dense_shapes(h.shape[-1]))
    towers = 0.1 * np.random.default_rng(5).normal(size=(USERS - 2, size)).astype(np.float32)
    folder, _ = export_personal(model, base, columns(), np.arange(USERS - 2), towers)
    return [(folder, {**columns(), WEIGHTS: towers[columns()["user"] % (USERS - 2)]})]


FORMS: list[Callable[[pathlib.Path], Made]] = [
    in_graph, fed, store, fed_store, adapted_table, adapted_store, retrieval_by_request,
    retrieval_by_list, personal,
]  # fmt: skip
INT64 = np.iinfo(np.int64)
EXTREMES: Mapping[str, tuple[Any, ...]] = {
    "float32": (np.nan, np.inf, -np.inf, 3e38, -3e38, -7.0),
    "int64": (INT64.min, -1, 6, INT64.max),
    "object": (b"", b"\xff\x00", b"x" * 10_000),
    "bool": (False,),
}


def signatures(version: pathlib.Path) -> dict[str, Any]:
    proto = saved_model_pb2.SavedModel.FromString((version / "saved_model.pb").read_bytes())
    found = dict(proto.meta_graphs[0].signature_def)
    return {name: found[name] for name in found if not name.startswith("__")}


def expected_status(signature: str, name: str, value: Any) -> int:
    """The bits that an extreme value must set."""
    puts = signature == "put_support"
    finite = not isinstance(value, float) or np.isfinite(value)
    support = name.startswith("support_")
    bare = name.removeprefix("support_")
    if bare in ("click", "like") and (puts or support):
        bad = not finite or value < -1 or value > 1
        return (BAD_LABEL if puts else BAD_SUPPORT) * bad
    if name == COUNT:
        return BAD_SUPPORT
    if support:
        bad = (bare == "price" and not finite) or bare == "seen_length"
        return BAD_SUPPORT * bad
    if name == "time" and puts:
        return BAD_TIME * (value <= 0)
    if name == WEIGHTS:
        return BAD_TOWER * (not finite)
    if puts:
        return BAD_VECTOR * ((bare == "price" and not finite) or bare == "seen_length")
    if name == "price":
        return BAD_DENSE * (not finite)
    if name in ("seen_length", "last_length"):
        return BAD_LENGTH
    if isinstance(value, float) and name in ("item", "city", "tag", "seen", "scene"):
        return BAD_EMBEDDING * (not finite)
    return 0


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: form.__name__)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    library()
    return request.param(tmp_path_factory.mktemp("made") / "served")


def test_only_the_rows_of_a_request_are_counted_by_it(made: Made) -> None:
    for version, _ in made:
        for signature in signatures(version).values():
            for info in (*signature.inputs.values(), *signature.outputs.values()):
                first, *others = [dim.size for dim in info.tensor_shape.dim]
                assert first == -1
                assert min(others, default=1) > 0
        for file in version.parent.parent.glob("*/batching_parameters.txt"):
            assert file.read_text() == (
                "max_batch_size { value: 1024 }\nbatch_timeout_micros { value: 1000 }\n"
                "max_enqueued_batches { value: 256 }\nnum_batch_threads { value: 4 }\n"
            )
        assert (version.parent / "batching_parameters.txt").exists()


def test_a_bad_request_harms_none_beside_it(made: Made) -> None:
    for version, rows in made:
        with batching(version, allowed_batch_sizes=(64, 128)) as ask:
            for name, definition in signatures(version).items():
                inputs = {column: rows[column] for column in definition.inputs}
                check_signature(ask, name, inputs)


def check_signature(
    ask: Callable[[list[Request]], list[Answer]], signature: str, inputs: Rows
) -> None:
    good = cut(signature, inputs)
    ask(good)  # what writes has written then, and repeats itself
    alone = [ask([request])[0] for request in good]
    own = {name: column[-2:] for name, column in inputs.items()}
    if signature == "put_support":  # not to push out rows of others
        own |= {"user": np.array([900, 901]), "time": np.array([1, 1])}
    cases = [(name, value) for name in own for value in EXTREMES[str(own[name].dtype)]]
    for number, (name, value) in enumerate(cases):
        bad = {**own, name: own[name].copy()}
        bad[name][0] = value
        at = 15 if number % 2 else 7  # of the last one the first row is repeated
        answers = ask([*good[:at], (signature, bad), *good[at:]])
        where = f"{signature} {name} {value!r}"
        answer = answers.pop(at)
        check(answers, alone, where)
        assert not isinstance(answer, Exception), where
        if STATUS in answer:
            wanted = expected_status(signature, name, value)
            assert answer[STATUS][0] & wanted == wanted, (where, answer[STATUS])
        if not signature.startswith(("put_", "expire_")):
            check([answer], ask([(signature, bad)]), where)


def cut(signature: str, inputs: Rows) -> list[Request]:
    """15 requests of one to three rows."""
    found, first = [], 0
    for number in range(15):
        size = 1 + number % 3
        rows = {name: column[first : first + size] for name, column in inputs.items()}
        found.append((signature, rows))
        first += size
    return found


def check(answers: list[Answer], expected: list[Answer], where: str) -> None:
    """Asserts that nothing failed, that status is equal and that numbers are up to rounding."""
    for answer, wanted in zip(answers, expected, strict=True):
        assert not isinstance(answer, Exception), (where, answer)
        assert not isinstance(wanted, Exception), (where, wanted)
        for name, column in wanted.items():
            if name in ("stats", "towers"):  # counts that go on
                assert answer[name].shape == column.shape, where
            elif column.dtype == np.float32:
                assert np.isfinite(answer[name]).all(), where
                close(answer[name], column)
            elif name == STATUS:  # items whose scores differ by rounding alone may change places
                np.testing.assert_array_equal(answer[name], column, err_msg=where)
