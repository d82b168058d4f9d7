"""Adaptation inside the served graph: right scores, in any company, whatever the rows hold."""

import dataclasses
import time

import numpy as np
import pytest
import redis_servers
import tensorflow as tf
import tf_keras
from served import ROUNDING, close
from tensorflow_serving.apis import prediction_log_pb2

from qianmo.export.adapted import (
    ADAPT,
    BAD_SUPPORT,
    COUNT,
    REQUEST_ID,
    by_request_specs,
    export_adapted,
    put_specs,
    rows_by_task,
    support_name,
)
from qianmo.export.saved_model import STATUS, ExportError, export_in_graph, op_types, session
from qianmo.export.shared_support import MIXED_SUPPORT, brought
from qianmo.export.support_rows import ID_BASE, FeatureRows, HiddenRows
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.inner_loop import Support
from qianmo.layers.meta import DIVERGED, NO_SUPPORT
from qianmo.layers.schema import Schema
from qianmo.models import zoo
from qianmo.ops.support_store import (
    BAD_LABEL,
    BAD_TIME,
    BAD_VECTOR,
    UNREACHABLE,
    SupportStore,
)
from qianmo.pipelines.serving.clients import Client
from qianmo.pipelines.serving.server import ModelServer

SCHEMA = Schema(
    features=(
        Categorical(name="item", num_ids=40, dim=8),
        Categorical(name="city", dtype="string", vocabulary=("a", "b"), dim=8),
        Categorical(name="seen", num_ids=40, dim=8, max_length=3),
        Dense(name="price", mean=0.0, variance=1.0),
    ),
    labels=("click", "like"),
    task_id="user",
    timestamp="time",
)
USERS, MOST = 12, 5


def columns(size, seed):
    rng = np.random.default_rng(seed)
    return {
        "item": rng.integers(0, 40, size),
        "city": rng.choice(np.array([b"a", b"b", b"c"], object), size),
        "seen": rng.integers(0, 40, (size, 3)),
        "seen_length": rng.integers(0, 4, size),
        "price": rng.normal(size=size).astype(np.float32),
        "user": rng.integers(0, USERS, size),
    }


SUPPORT = {
    **columns(60, 1),
    "click": np.random.default_rng(2).integers(0, 2, 60).astype(np.float32),
    "like": np.random.default_rng(3).integers(-1, 2, 60).astype(np.float32),
    "time": np.arange(1, 61),
}
SUPPORT["user"] %= USERS - 2  # two users without support
ROWS = columns(80, 4)


CONFIG = {
    "name": "mlp",
    "units": (16,),
    "tower_units": (6,),
    "embedding_stddev": 0.5,
    "meta": {
        "inner": {"steps": 2, "step_size": 0.3, "shrinkage": 1.0, "max_support": MOST},
        "min_support": 2,
    },
}


@pytest.fixture(scope="module")
def model():
    tf_keras.utils.set_random_seed(3)
    made = zoo.build(SCHEMA, CONFIG)
    made.build()
    return made


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    base = tmp_path_factory.mktemp("served") / "ranker"
    folder, worst = export_adapted(model, base, ROWS, SUPPORT)
    assert worst <= 1e-6
    return folder


@pytest.fixture(scope="module")
def run(served):
    def once(signature, rows):
        with session(served) as run:  # which makes its graph the default one
            return run(signature, rows)

    return once


def newest(user):
    """Row numbers of a user's last support rows, oldest first."""
    return np.flatnonzero(SUPPORT["user"] == user)[-MOST:]


def expected(model):
    """Adapted probabilities, by the layers alone, one user at a time."""
    inputs = {k: tf.constant(v) for k, v in ROWS.items() if k != "user"}
    h = model.tower_input(inputs, "model")
    own = {k: tf.constant(SUPPORT[k]) for k in SCHEMA.input_names}
    support_h = model.tower_input(own, "model")
    logits = model.tower(h).logits.numpy()
    for user in range(USERS):
        rows, mine = newest(user), np.flatnonzero(ROWS["user"] == user)
        if len(rows) < 2 or not len(mine):
            continue
        labels = np.stack([SUPPORT[label][rows] for label in SCHEMA.labels], 1)
        weights = (labels >= 0).astype(np.float32)
        support = Support(
            tf.gather(support_h, rows)[None],
            tf.constant(np.maximum(labels, 0))[None],
            tf.constant(weights)[None],
        )
        correction = model.meta.inner.adapt(model.tower, support)
        adapted = model.tower(tf.gather(h, mine)[None], correction=correction).logits[0]
        logits[mine] = np.where(weights.sum(0) >= 2, adapted, logits[mine])
    return 1 / (1 + np.exp(-logits))


def probabilities(answer):
    return np.stack([answer[label] for label in SCHEMA.labels], 1)


def switched(on=True):
    return {**ROWS, ADAPT: np.full(len(ROWS["user"]), on)}


def by_request(rows=ROWS):
    """Inputs of `adapted_by_request` in which every row brings what the table holds."""
    size = len(rows["user"])
    found = {**rows, ADAPT: np.ones(size, bool), REQUEST_ID: np.full(size, 5)}
    index = np.zeros((size, MOST), np.int64)
    count = np.zeros(size, np.int64)
    for i, user in enumerate(rows["user"]):
        own = newest(user)
        index[i, : len(own)], count[i] = own, len(own)
    for name in (*SCHEMA.input_names, *SCHEMA.labels):
        found[support_name(name)] = SUPPORT[name][index]
    return {**found, COUNT: count}


def rows_to_put():
    """Three support rows, as a client puts them."""
    rows = {name: column[:3].copy() for name, column in SUPPORT.items()}
    return {**rows, "event_id": np.zeros(3, np.int64)}


def test_scores_are_those_of_the_layers(model, run):
    answer = run("adapted", switched())
    reference = expected(model)
    close(probabilities(answer), reference)
    known = np.array([len(newest(user)) >= 2 for user in ROWS["user"]])
    np.testing.assert_array_equal(answer[STATUS], np.where(known, 0, NO_SUPPORT))
    plain = run("serving_default", {k: v for k, v in ROWS.items() if k != "user"})
    moved = np.abs(probabilities(plain) - probabilities(answer)).max(1)
    assert (moved[known] > 1e-4).all()
    assert (moved[~known] <= ROUNDING).all()
    assert known.any()
    assert not known.all()


def test_support_in_the_request_gives_the_same(model, run):
    every = by_request()
    close(probabilities(run("adapted_by_request", every)), expected(model))
    # One row of each user brings what all of its rows share.
    specs = by_request_specs(SCHEMA, MOST)
    once = {**switched(), **brought(specs, ROWS["user"], rows_by_task(SCHEMA, SUPPORT))}
    known = np.intersect1d(ROWS["user"], SUPPORT["user"])
    assert (once[COUNT] > 0).sum() == len(known) < len(ROWS["user"])
    answer = run("adapted_by_request", once)
    close(probabilities(answer), expected(model))
    has_enough = np.array([len(newest(user)) >= 2 for user in ROWS["user"]])
    np.testing.assert_array_equal(answer[STATUS], np.where(has_enough, 0, NO_SUPPORT))


def test_a_client_sends_the_support_of_each_task_once(model, served, run):
    support = rows_by_task(SCHEMA, SUPPORT)
    assert max(len(rows["item"]) for rows in support.values()) > MOST  # the newest are sent
    plain = probabilities(run("serving_default", {k: ROWS[k] for k in SCHEMA.input_names}))
    with ModelServer({"ranker": served.parent}, port=0, rest_api_port=0) as server:
        target = f"127.0.0.1:{server.port}"
        for most in (1024, 30):  # in parts each of which brings what its rows need
            client = Client(target, "ranker", max_batch_size=most)
            answer = client.predict_adapted(ROWS, "user", support)
            close(probabilities(answer), expected(model))
            off = client.predict_adapted(switched(False), "user", support)
            close(probabilities(off), plain)
            assert not off[STATUS].any()
            none = client.predict_adapted(ROWS, "user", {})
            close(probabilities(none), plain)
            assert (none[STATUS] == NO_SUPPORT).all()
            with pytest.raises(ValueError, match=r"support of task 3 should have columns of one"):
                client.predict_adapted(ROWS, "user", {3: {"item": np.arange(3)}})
            client.close()


def test_rows_of_another_request_share_nothing(model, run):
    specs = by_request_specs(SCHEMA, MOST)
    support = rows_by_task(SCHEMA, SUPPORT)
    one, other = (brought(specs, ROWS["user"], held) for held in (support, {}))
    assert one[REQUEST_ID][0] != other[REQUEST_ID][0]
    merged = {k: np.concatenate([v, v]) for k, v in switched().items()}
    merged |= {k: np.concatenate([one[k], other[k]]) for k in one}
    answer = run("adapted_by_request", merged)
    close(probabilities(answer)[:80], expected(model))
    plain = run("serving_default", {k: v for k, v in ROWS.items() if k != "user"})
    close(probabilities(answer)[80:], probabilities(plain))
    assert (answer[STATUS][80:] == NO_SUPPORT).all()


def test_rows_that_bring_different_support_are_told_and_scored_alike_in_any_order(run):
    inputs = by_request()
    alone = probabilities(run("adapted_by_request", inputs))
    user = next(user for user in range(USERS) if (ROWS["user"] == user).sum() > 3)
    mine = np.flatnonzero(ROWS["user"] == user)
    mixed = {k: v.copy() for k, v in inputs.items()}
    mixed[support_name("click")][mine[0]] = 1 - mixed[support_name("click")][mine[0]]
    answer = run("adapted_by_request", mixed)
    is_mine = ROWS["user"] == user
    np.testing.assert_array_equal(answer[STATUS] & MIXED_SUPPORT > 0, is_mine)
    close(probabilities(answer)[~is_mine], alone[~is_mine])
    # What lies behind the count is not read, and makes no other support.
    padded = {k: v.copy() for k, v in inputs.items()}
    short = np.flatnonzero((inputs[COUNT] > 0) & (inputs[COUNT] < MOST))[0]
    padded[support_name("click")][short, -1] = 0.5
    np.testing.assert_array_equal(
        run("adapted_by_request", padded)[STATUS], run("adapted_by_request", inputs)[STATUS]
    )
    # All rows of the user have one support: that of the first row, or that of the others.
    ways = []
    for source in (mine[0], mine[1]):
        same = {k: v.copy() for k, v in mixed.items()}
        for name in mixed:
            if name.startswith("support_"):
                same[name][mine] = mixed[name][source]
        ways.append(probabilities(run("adapted_by_request", same))[mine])
    found = probabilities(answer)[mine]
    assert np.abs(ways[0] - ways[1]).max() > 1e-4
    assert min(np.abs(found - way).max() for way in ways) <= ROUNDING
    order = np.random.default_rng(0).permutation(80)
    shuffled = run("adapted_by_request", {k: v[order] for k, v in mixed.items()})
    close(probabilities(shuffled), probabilities(answer)[order])
    np.testing.assert_array_equal(shuffled[STATUS], answer[STATUS][order])


def test_the_switch_turns_adaptation_off_row_by_row(model, run, tmp_path):
    plain = run("serving_default", {k: v for k, v in ROWS.items() if k != "user"})
    off = run("adapted", switched(False))
    close(probabilities(off), probabilities(plain))
    assert not off[STATUS].any()
    on = probabilities(run("adapted", switched()))
    mixed = {**ROWS, ADAPT: np.arange(len(ROWS["user"])) % 2 == 0}
    found = probabilities(run("adapted", mixed))
    # One kernel and equal shapes: to the bit.
    expected = np.where(mixed[ADAPT][:, None], on, probabilities(off))
    np.testing.assert_array_equal(found, expected)
    folder, _ = export_in_graph(model, tmp_path / "plain", ROWS)
    with session(folder) as other:
        features = {k: v for k, v in ROWS.items() if k != "user"}
        np.testing.assert_allclose(
            probabilities(other("serving_default", features)), probabilities(plain), atol=1e-6
        )


@pytest.mark.parametrize("signature", ["adapted", "adapted_by_request"])
def test_a_row_is_the_same_in_any_company(run, signature):
    inputs = switched() if signature == "adapted" else by_request()
    together = probabilities(run(signature, inputs))
    for i in (0, 7, 79):
        alone = probabilities(run(signature, {k: v[i : i + 1] for k, v in inputs.items()}))
        close(alone[0], together[i])
    order = np.random.default_rng(0).permutation(80)
    shuffled = probabilities(run(signature, {k: v[order] for k, v in inputs.items()}))
    close(shuffled, together[order])
    # Batching fills a batch up with its first row.
    filled = np.r_[np.arange(5), 0, 0, 0]
    repeated = probabilities(run(signature, {k: v[filled] for k, v in inputs.items()}))
    close(repeated, together[filled])


def test_what_cannot_be_read_touches_no_neighbour(run):
    inputs = by_request()
    together = probabilities(run("adapted_by_request", inputs))
    mine = np.flatnonzero((inputs[COUNT] >= 3) & (np.arange(80) > 3))[:4]
    bad = {k: v.copy() for k, v in inputs.items()}
    bad[REQUEST_ID][mine] = np.arange(4)  # of requests of their own
    bad[support_name("price")][mine[0], 0] = np.nan
    bad[support_name("click")][mine[1], 1] = 7.0
    bad[COUNT][mine[2]] = 99
    bad[support_name("price")][mine[3], 0] = 1e25  # finite, but no step from it is
    answer = run("adapted_by_request", bad)
    assert answer[STATUS][mine].tolist() == [BAD_SUPPORT, BAD_SUPPORT, BAD_SUPPORT, DIVERGED]
    others = np.setdiff1d(np.arange(80), mine)
    close(probabilities(answer)[others], together[others])
    assert np.isfinite(probabilities(answer)).all()
    plain = run("serving_default", {k: v for k, v in ROWS.items() if k != "user"})
    close(probabilities(answer)[mine[3]], probabilities(plain)[mine[3]])


def test_one_class_in_the_support_and_no_rows_at_all(run):
    inputs = by_request()
    inputs[support_name("click")][:] = 1.0
    answer = run("adapted_by_request", inputs)
    assert np.isfinite(probabilities(answer)).all()
    inputs[COUNT][:] = 0
    answer = run("adapted_by_request", inputs)
    plain = run("serving_default", {k: v for k, v in ROWS.items() if k != "user"})
    close(probabilities(answer), probabilities(plain))
    assert (answer[STATUS] == NO_SUPPORT).all()


def test_rows_that_are_put_count_at_once_and_only_once(served):
    user = USERS - 1  # had no support
    mine = {k: v[:1] for k, v in switched().items()} | {"user": np.array([user])}
    put = {**rows_to_put(), "user": np.full(3, user)}
    put["like"][:] = 1
    with session(served) as run:
        before = run("stats", {"user": np.array([user])})["stats"]
        plain = probabilities(run("adapted", mine))
        assert run("put_support", put)[STATUS].tolist() == [0, 0, 0]
        first = run("adapted", mine)
        assert first[STATUS].tolist() == [0]
        assert np.abs(probabilities(first) - plain).max() > 1e-4
        twice = {k: np.concatenate([v, v[:1], v[:1]]) for k, v in put.items()}
        run("put_support", twice)  # as batching repeats rows; of five rows, a last bit may differ
        stored = probabilities(run("adapted", mine))
        close(stored, probabilities(first))
        # One task more, asked for once before it was there, and twice since.
        after = run("stats", {"user": np.array([user])})["stats"]
        assert (after - before).tolist() == [[1, 2, 1]]
        bad = {k: v.copy() for k, v in put.items()}
        bad["time"][0], bad["price"][1], bad["click"][2] = 0, np.nan, np.nan
        assert run("put_support", bad)[STATUS].tolist() == [BAD_TIME, BAD_VECTOR, BAD_LABEL]
        np.testing.assert_array_equal(probabilities(run("adapted", mine)), stored)


@pytest.mark.parametrize("where", ["table", "store"])
@pytest.mark.parametrize("column", ["", "impression"])
def test_support_rows_of_one_time_are_all_kept(model, tmp_path, where, column, monkeypatch):
    # As in a log of whole seconds, where a user sees many items in one.
    ties = {**SUPPORT, "time": 1 + np.arange(60) // 7}
    if column:
        ties[column] = np.random.default_rng(1).permutation(60) - 30
        monkeypatch.setattr(model, "schema", dataclasses.replace(SCHEMA, event_id=column))
    store = None
    if where == "store":
        store = SupportStore(f"test_adapted_ties{column}", 16, 2, MOST)
    folder, _ = export_adapted(model, tmp_path / "ranker", ROWS, ties, store=store)
    order = np.lexsort((ties.get(column, np.arange(60)), ties["time"]))
    in_order = {name: values[order] for name, values in ties.items()}
    tied = [len(set(in_order["time"][in_order["user"] == u])) < 5 for u in range(USERS - 2)]
    assert any(tied)
    specs = by_request_specs(SCHEMA, MOST)
    own = brought(specs, ROWS["user"], rows_by_task(SCHEMA, in_order))
    with session(folder) as run:
        by_store = run("adapted", switched())
        by_request = run("adapted_by_request", {**switched(), **own})
    close(probabilities(by_store), probabilities(by_request))
    np.testing.assert_array_equal(by_store[STATUS], by_request[STATUS])
    if store is not None:  # the same file again is the same rows
        version = HiddenRows(model).version
        before = store.get(np.arange(USERS), version)
        assert before.count.numpy().sum() > 40
        export_adapted(model, tmp_path / "ranker", ROWS, ties, store=store)
        for part, again in zip(before, store.get(np.arange(USERS), version), strict=True):
            np.testing.assert_array_equal(part, again)
        store.close()


def test_an_event_id_needs_a_name_of_its_own():
    named = Categorical(name="event_id", num_ids=3, dim=2)
    features = (*SCHEMA.features, named)
    with pytest.raises(ValueError, match="`event_id` is a feature and `event_id` is the input for"):
        SCHEMA.with_features(features)
    schema = dataclasses.replace(SCHEMA, features=features, event_id="event_id")
    assert put_specs(schema)["event_id"].dtype == tf.int64


def test_support_that_is_too_old_is_not_used(model, tmp_path):
    folder, _ = export_adapted(model, tmp_path / "ranker", ROWS, SUPPORT, ttl_seconds=1e-3)
    with session(folder) as run:
        answer = run("adapted", switched())
        assert (answer[STATUS] == NO_SUPPORT).all()


def test_it_is_made_of_stock_ops_and_warms_up_every_signature(served):
    assert not [op for op in op_types(served) if ">" in op]
    path = served / "assets.extra" / "tf_serving_warmup_requests"
    assert sum(1 for _ in tf.data.TFRecordDataset(str(path))) == 5


def test_a_model_of_mixed_precision_adapts_in_that_of_its_weights(model, tmp_path):
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        mixed = zoo.build(SCHEMA, CONFIG)
        mixed.build()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    for variable, value in zip(mixed.weights, model.weights, strict=True):
        variable.assign(value)
    folder, _ = export_adapted(mixed, tmp_path / "ranker", ROWS, SUPPORT)
    reference = expected(model)
    with session(folder) as run:
        close(probabilities(run("adapted", switched())), reference)
        close(probabilities(run("adapted_by_request", by_request())), reference)
    assert mixed.tower.compute_dtype == "bfloat16"


def test_a_model_without_meta_is_refused(tmp_path):
    plain = zoo.build(SCHEMA, {"name": "mlp", "units": (4,)})
    plain.build()
    with pytest.raises(ExportError, match="no `meta`"):
        export_adapted(plain, tmp_path / "ranker", ROWS, SUPPORT)
    assert not list(tmp_path.iterdir())


def test_a_store_outlives_a_version_and_knows_its_bottom(model, tmp_path):
    store = SupportStore("test_adapted", 16, 2, MOST)
    base = tmp_path / "ranker"
    first, worst = export_adapted(model, base, ROWS, SUPPORT, store=store)
    assert worst <= 1e-6
    nothing = {k: v[:1] for k, v in SUPPORT.items()}
    second, _ = export_adapted(model, base, ROWS, nothing, store=store)
    mine = {k: v[:1] for k, v in switched().items()} | {"user": np.array([USERS - 1])}
    put = {**rows_to_put(), "user": np.full(3, USERS - 1)}
    reference = expected(model)
    with session(first) as run:
        close(probabilities(run("adapted", switched())), reference)
        assert not run("put_support", put)[STATUS].any()
        before = run("adapted", mine)
    with session(second) as run:  # what one version wrote, the next one reads
        close(probabilities(run("adapted", mine)), probabilities(before))
        assert run("adapted", mine)[STATUS].tolist() == [0]
    kernel = model.bottom.trainable_variables[0]
    was = kernel.numpy()
    kernel.assign(was + 0.01)
    third, _ = export_adapted(model, base, ROWS, nothing, store=store)
    kernel.assign(was)
    with session(third) as run:  # rows of another bottom are not used
        assert run("adapted", mine)[STATUS].tolist() == [NO_SUPPORT]
    store.close()


def test_loading_a_version_leaves_the_store_as_it_was(model, tmp_path):
    store = SupportStore("test_adapted_warm_up", 16, 2, MOST)
    support = {k: v[-20:] for k, v in SUPPORT.items()}
    folder, _ = export_adapted(model, tmp_path / "ranker", ROWS, support, store=store)
    store.export_rows(tmp_path / "before")  # with their times of writing
    path = folder / "assets.extra" / "tf_serving_warmup_requests"
    statuses = {}
    with session(folder) as run:
        for record in tf.compat.v1.io.tf_record_iterator(str(path)):
            log = prediction_log_pb2.PredictionLog.FromString(record)
            request = log.predict_log.request
            signature = request.model_spec.signature_name
            rows = {name: tf.make_ndarray(value) for name, value in request.inputs.items()}
            statuses[signature] = run(signature, rows).get(STATUS)
    assert statuses["put_support"].tolist() == [BAD_TIME]
    store.export_rows(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    store.close()


@pytest.mark.skipif(redis_servers.MISSING, reason=redis_servers.REASON)
def test_a_redis_that_dies_leaves_the_plain_score(model, tmp_path):
    with redis_servers.server(tmp_path, "--appendonly", "yes", "--appendfsync", "always") as redis:
        store = SupportStore("test_adapted_redis", 16, 2, MOST, path=redis.url())
        folder, worst = export_adapted(model, tmp_path / "ranker", ROWS, SUPPORT, store=store)
        store.close()
        assert worst <= 1e-6
        put = {**rows_to_put(), "user": np.full(3, USERS - 1)}
        reference = expected(model)
        with session(folder) as run:
            before = run("adapted", switched())
            close(probabilities(before), reference)
            redis.kill()
            answer = run("adapted", switched())
            plain = run("serving_default", {k: v for k, v in ROWS.items() if k != "user"})
            close(probabilities(answer), probabilities(plain))
            assert (answer[STATUS] == NO_SUPPORT).all()
            put["click"][1] = np.nan
            bad = run("put_support", put)[STATUS]
            assert bad.tolist() == [UNREACHABLE, BAD_LABEL, UNREACHABLE]
            redis.start()
            for _ in range(200):
                after = run("adapted", switched())
                if not (after[STATUS] == NO_SUPPORT).all():
                    break
                time.sleep(0.05)
            np.testing.assert_array_equal(probabilities(after), probabilities(before))


def test_a_store_of_other_sizes_is_refused(model, tmp_path):
    store = SupportStore("test_adapted_sizes", 3, 2, MOST)
    with pytest.raises(ExportError, match=r"rows of 16 numbers and 2 labels\. Received: 3 and 2"):
        export_adapted(model, tmp_path / "ranker", ROWS, SUPPORT, store=store)
    store.close()


def test_support_that_cannot_be_stored_stops_the_export_and_names_the_row(model, tmp_path):
    price = SUPPORT["price"].copy()
    price[17] = np.nan
    user = SUPPORT["user"][17]
    with pytest.raises(ExportError, match=f"support row 17 of task {user} cannot be stored"):
        export_adapted(model, tmp_path / "ranker", ROWS, {**SUPPORT, "price": price})
    assert not list(tmp_path.glob("ranker/*"))


def test_rows_of_features_outlive_the_weights_that_were_there(model, tmp_path):
    store = SupportStore("test_adapted_features", 12, 2, MOST)
    base = tmp_path / "ranker"
    _, worst = export_adapted(model, base, ROWS, SUPPORT, store=store, keep="features")
    assert worst <= 1e-6
    kernel = model.bottom.trainable_variables[0]
    was = kernel.numpy()
    kernel.assign(was + 0.01)
    nothing = {k: v[:1] for k, v in SUPPORT.items()}
    second, _ = export_adapted(model, base, ROWS, nothing, store=store, keep="features")
    reference = expected(model)
    kernel.assign(was)
    with session(second) as run:
        answer = run("adapted", switched())
    close(probabilities(answer), reference)
    store.close()


def test_ids_of_features_are_kept_exactly():
    schema = Schema(
        features=(Categorical(name="id", num_ids=2**40, dim=1),), labels=("y",), task_id="id"
    )
    made = zoo.build(schema, {"name": "mlp", "units": ()})
    ids = tf.constant([0, 1, 2**20 - 2, 2**24, 2**24 + 1, 2**39 + 12345], tf.int64)
    rows, _ = FeatureRows(made).pack({"id": ids})
    assert rows.dtype == tf.float32
    found = tf.cast(rows[:, 0], tf.int64) * ID_BASE + tf.cast(rows[:, 1], tf.int64)
    np.testing.assert_array_equal(found, ids + 1)
