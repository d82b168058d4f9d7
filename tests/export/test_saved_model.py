"""Exports through the session loader, as TensorFlow Serving loads them."""

import shutil

import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from served import close
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import prediction_log_pb2

from qianmo.export import saved_model
from qianmo.export.saved_model import (
    BAD_SCORE,
    ExportError,
    export_fed,
    export_in_graph,
    op_types,
    session,
)
from qianmo.layers.encode import BAD_DENSE, BAD_LENGTH
from qianmo.layers.features import Categorical, Dense
from qianmo.layers.schema import Schema
from qianmo.models import zoo

SCHEMA = Schema(
    features=(
        Categorical(name="user", num_ids=50, dim=8),
        Categorical(name="item", vocabulary=tuple(range(100, 140)), dim=8),
        Categorical(
            name="seen", vocabulary=tuple(range(100, 140)), dim=8, table="item", max_length=3
        ),
        Categorical(name="city", dtype="string", vocabulary=("oslo", "rome"), dim=8),
        Categorical(name="tag", dtype="string", hash_buckets=9, dim=8),
        Dense(name="price", mean=1.0, variance=2.0),
    ),
    labels=("click", "like"),
)
# Everything that the zoo's graphs may hold. A new op is a decision: does stock serving have it?
STOCK_OPS = frozenset(
    [
        "Add",
        "AddN",
        "AddV2",
        "All",
        "AsString",
        "AssignVariableOp",
        "BatchMatMulV2",
        "BiasAdd",
        "Bitcast",
        "BitwiseOr",
        "BroadcastTo",
        "Cast",
        "ConcatV2",
        "Const",
        "DisableCopyOnRead",
        "Einsum",
        "Equal",
        "ExpandDims",
        "Fill",
        "GatherV2",
        "Greater",
        "GreaterEqual",
        "HashTableV2",
        "Identity",
        "IdentityN",
        "IsFinite",
        "IsNan",
        "Less",
        "LogicalAnd",
        "LogicalOr",
        "LookupTableFindV2",
        "LookupTableImportV2",
        "MatMul",
        "Max",
        "Maximum",
        "MergeV2Checkpoints",
        "Minimum",
        "Mul",
        "Neg",
        "NoOp",
        "NotEqual",
        "OnesLike",
        "Pack",
        "PartitionedCall",
        "Placeholder",
        "Pow",
        "Prod",
        "Range",
        "ReadVariableOp",
        "RealDiv",
        "Relu",
        "Reshape",
        "ResourceGather",
        "RestoreV2",
        "SaveV2",
        "Select",
        "SelectV2",
        "Shape",
        "ShardedFilename",
        "Sigmoid",
        "Size",
        "Split",
        "SplitV",
        "Square",
        "Squeeze",
        "StatefulPartitionedCall",
        "StaticRegexFullMatch",
        "StopGradient",
        "StringJoin",
        "StridedSlice",
        "StringToHashBucketFast",
        "Sub",
        "Sum",
        "Tile",
        "Transpose",
        "Unpack",
        "VarHandleOp",
        "ZerosLike",
    ]
)
MODELS = {
    "dual_dnn": {
        "interactions": {"cin": {"units": (6, 6)}, "fm": {}},
        "teacher_units": (40, 24),
        "student_units": (8,),
    },
    "lr": {},
    "wdl": {"units": (8,)},
    "deepfm": {"units": (8,)},
    "dcn": {"units": (8,)},
    "xdeepfm": {"cin_units": (6, 6), "units": (8,)},
}


def rows(count=200, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "user": rng.integers(-2, 55, count),
        "item": rng.integers(95, 145, count),
        "seen": rng.integers(95, 145, (count, 3)),
        "seen_length": rng.integers(0, 4, count),
        "city": rng.choice([b"oslo", b"rome", b"bonn"], count).astype(object),
        "tag": rng.choice([b"a", b"b", b"c"], count).astype(object),
        "price": rng.normal(size=count).astype(np.float32),
    }


def model(name):
    tf_keras.utils.set_random_seed(1)
    made = zoo.build(SCHEMA, {"name": name, **MODELS[name], "embedding_stddev": 1.0})
    made({k: tf.constant(v) for k, v in rows(2).items()})
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("export", [export_in_graph, export_fed], ids=["in_graph", "fed"])
def test_every_model_is_served_as_keras_scores_it_by_stock_ops(name, export, tmp_path):
    made = model(name)
    folder, worst = export(made, tmp_path / "m", rows(), heads=made.head_names)
    assert folder == tmp_path / "m" / "1"
    assert 0 <= worst <= 1e-6
    folders = [folder, *tmp_path.glob("m_lookup/1")]
    assert len(folders) == (2 if export is export_fed else 1)
    for each in folders:
        assert op_types(each) <= STOCK_OPS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("export", [export_in_graph, export_fed], ids=["in_graph", "fed"])
def test_a_model_of_mixed_precision_is_served_in_that_of_its_weights(name, export, tmp_path):
    wide = model(name)
    features = {k: tf.constant(v) for k, v in rows().items()}
    expected = tf.sigmoid(wide(features)[wide.serving_head]).numpy()
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        mixed = model(name)
        for variable, value in zip(mixed.weights, wide.weights, strict=True):
            variable.assign(value)
        before = mixed(features)[mixed.serving_head].numpy()
        folder, worst = export(mixed, tmp_path / "m", rows())
        after = mixed(features)[mixed.serving_head].numpy()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    assert worst <= 1e-6
    np.testing.assert_array_equal(after, before)  # training goes on as it was
    assert np.abs(1 / (1 + np.exp(-before)) - expected).max() > 1e-5
    inputs = rows()
    if export is export_fed:
        ids = {name: column for name, column in inputs.items() if name != "price"}
        with session(tmp_path / "m_lookup" / "1") as run:
            vectors = dict(run("serving_default", ids))
        del vectors["status"]
        inputs = {**vectors, "price": inputs["price"]}
    with session(folder) as run:
        answer = run("serving_default", inputs)
    close(np.stack([answer["click"], answer["like"]], 1), expected)
    assert {tf.bfloat16.as_datatype_enum} & dtypes(folder) == set()


def dtypes(folder):
    proto = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return {value.type for node in nodes for value in node.attr.values()}


def test_served_scores_and_signatures(tmp_path):
    made = model("dual_dnn")
    folder, _ = export_in_graph(made, tmp_path / "m", rows(), heads=("student", "teacher"))
    fresh = rows(seed=1)
    logits = made({k: tf.constant(v) for k, v in fresh.items()})
    with session(folder) as run:
        answers = {s: run(s, fresh) for s in ("serving_default", "student", "teacher")}
    for name, head in (("serving_default", "student"), ("student",) * 2, ("teacher",) * 2):
        assert set(answers[name]) == {"click", "like", "status"}
        expected = tf.sigmoid(logits[head]).numpy()
        np.testing.assert_allclose(answers[name]["click"], expected[:, 0], atol=1e-6)
        np.testing.assert_allclose(answers[name]["like"], expected[:, 1], atol=1e-6)
    assert np.ptp(answers["teacher"]["click"]) > 0.1  # the scores say something


def test_a_bad_row_gets_a_status_and_its_neighbours_their_scores(tmp_path):
    folder, _ = export_in_graph(model("dual_dnn"), tmp_path / "m", rows())
    good = rows(4)
    bad = {k: v.copy() for k, v in good.items()}
    bad["price"][1] = np.nan
    bad["seen_length"][2] = 7
    with session(folder) as run:
        before, after = run("serving_default", good), run("serving_default", bad)
    assert after["status"].tolist() == [0, BAD_DENSE, BAD_LENGTH, 0]
    for row in (0, 3):
        assert after["click"][row] == before["click"][row]
    assert np.isfinite(after["click"]).all()


def test_a_score_that_is_not_finite_is_answered_as_0_with_a_status():
    nan = float("nan")
    logits = tf.constant([[0.0, 1.0], [nan, 1.0], [0.0, nan], [nan, nan], [1e30, -1e30]])
    answer = saved_model.answer(SCHEMA, logits, tf.constant([0, 0, BAD_DENSE, 0, 0]))
    high = 1 / (1 + np.exp(-1))
    close(answer["click"], [0.5, 0, 0.5, 0, 1])
    close(answer["like"], [high, high, 0, 0, 0])
    bad = BAD_SCORE
    assert answer["status"].numpy().tolist() == [0, bad, bad | BAD_DENSE, bad, 0]


def test_rows_do_not_depend_on_their_batch(tmp_path):
    folder, _ = export_in_graph(model("dual_dnn"), tmp_path / "m", rows())
    batch = rows(64)
    with session(folder) as run:
        together = run("serving_default", batch)["click"]
        alone = [
            run("serving_default", {k: v[i : i + 1] for k, v in batch.items()})["click"][0]
            for i in range(64)
        ]
    close(alone, together)


def test_lists_are_as_wide_as_the_schema_says(tmp_path):
    narrow = rows()
    narrow["seen"], narrow["seen_length"] = narrow["seen"][:, :2], narrow["seen_length"] % 3
    folder, worst = export_in_graph(model("deepfm"), tmp_path / "m", narrow)  # it pads
    assert worst <= 1e-6
    wide = {**rows(), "seen": np.zeros((200, 4), np.int64)}
    with session(folder) as run, pytest.raises(ValueError, match=r"\(200, 4\).*seen"):
        run("serving_default", wide)
    with pytest.raises(
        ExportError, match=r"input `seen` should have shape \[\?, 3\]. Received: \["
    ):
        export_in_graph(model("deepfm"), tmp_path / "m", wide)


def variables(folder):
    return {
        name: shape for name, shape in tf.train.list_variables(str(folder / "variables/variables"))
    }


def test_a_student_ships_without_any_part_of_its_teacher(tmp_path):
    made = model("dual_dnn")
    student, _ = export_in_graph(made, tmp_path / "s", rows())
    both, _ = export_in_graph(made, tmp_path / "b", rows(), heads=("student", "teacher"))
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((student / "saved_model.pb").read_bytes())
    text = str(proto)
    assert "teacher" not in text
    assert "CIN" not in text
    assert "cin" not in text.split('"')
    assert "teacher" in str(
        saved_model_pb2.SavedModel.FromString((both / "saved_model.pb").read_bytes())
    )
    shapes = sorted(tuple(s) for n, s in variables(student).items() if n.startswith("used"))
    tables = made.embed.tables["8"].shape
    width = sum(f.dim for f in SCHEMA.categorical) + 1
    assert shapes == sorted([tuple(tables), (width, 8), (8,), (8, 2), (2,)])


def test_fed_holds_no_tables(tmp_path):
    made = model("dual_dnn")
    folder, _ = export_fed(made, tmp_path / "m", rows())
    assert not {op for op in op_types(folder) if op.startswith("HashTable")}
    tables = tuple(made.embed.tables["8"].shape)
    assert tables not in {tuple(s) for s in variables(folder).values()}
    assert tables in {tuple(s) for s in variables(tmp_path / "m_lookup" / "1").values()}
    # A client's way: look up, then score.
    fresh = rows(seed=2)
    ids = {k: v for k, v in fresh.items() if k != "price"}
    with session(tmp_path / "m_lookup" / "1") as lookup:
        vectors = dict(lookup("serving_default", ids))
    assert vectors.pop("status").tolist() == [0] * 200
    with session(folder) as run:
        served = run("serving_default", {**vectors, "price": fresh["price"]})
    expected = tf.sigmoid(made({k: tf.constant(v) for k, v in fresh.items()})["student"]).numpy()
    np.testing.assert_allclose(served["click"], expected[:, 0], atol=1e-6)


def test_each_signature_has_a_warm_up_record_that_runs(tmp_path):
    folder, _ = export_in_graph(
        model("dual_dnn"), tmp_path / "m", rows(), heads=("student", "teacher")
    )
    path = folder / "assets.extra/tf_serving_warmup_requests"
    records = list(tf.data.TFRecordDataset(str(path)))
    seen = []
    with session(folder) as run:
        for record in records:
            log = prediction_log_pb2.PredictionLog.FromString(record.numpy())
            request = log.predict_log.request
            assert request.model_spec.name == "m"
            seen.append(request.model_spec.signature_name)
            run(seen[-1], {k: tf.make_ndarray(v) for k, v in request.inputs.items()})
    assert seen == ["serving_default", "student", "teacher"]


def test_every_input_and_output_has_the_batch_as_its_first_dim(tmp_path):
    folder, _ = export_in_graph(model("dual_dnn"), tmp_path / "m", rows())
    meta = saved_model_pb2.SavedModel.FromString(
        (folder / "saved_model.pb").read_bytes()
    ).meta_graphs[0]
    tensors = [
        t
        for name, s in meta.signature_def.items()
        if name != "__saved_model_init_op"
        for t in (*s.inputs.values(), *s.outputs.values())
    ]
    assert len(tensors) == 2 * (7 + 3)
    for tensor in tensors:
        assert tensor.tensor_shape.dim[0].size == -1


def test_a_graph_that_scores_otherwise_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    made = model("deepfm")
    honest = saved_model.answer

    def off_for_user_7(schema, logits, status):
        return honest(schema, logits + 1e-4, status)

    monkeypatch.setattr(saved_model, "answer", off_for_user_7)
    with pytest.raises(ExportError, match=r"rows differ from the Keras model.*row 0: .*'user'"):
        export_in_graph(made, tmp_path / "m", rows())
    assert list((tmp_path / "m").iterdir()) == []


def test_python_ops_are_refused(tmp_path, monkeypatch):
    made = model("lr")
    honest = saved_model.answer

    def by_python(schema, logits, status):
        logits = tf.ensure_shape(tf.numpy_function(lambda z: z, [logits], tf.float32), [None, 2])
        return honest(schema, logits, status)

    monkeypatch.setattr(saved_model, "answer", by_python)
    with pytest.raises(ExportError, match=r"lacks: \['PyFunc'\]"):
        export_in_graph(made, tmp_path / "m", rows())
    assert list((tmp_path / "m").iterdir()) == []


def test_versions(tmp_path):
    made = model("lr")
    assert export_in_graph(made, tmp_path / "m", rows())[0].name == "1"
    assert export_in_graph(made, tmp_path / "m", rows(), version=7)[0].name == "7"
    assert export_in_graph(made, tmp_path / "m", rows())[0].name == "8"
    with pytest.raises(ExportError, match="exists; give another version"):
        export_in_graph(made, tmp_path / "m", rows(), version=7)
    with pytest.raises(ExportError, match=r"`heads` should be some of .*Received: \['teacher'\]"):
        export_in_graph(made, tmp_path / "m", rows(), heads=("teacher",))
    assert "base_path" in (tmp_path / "m" / "models.config").read_text()
    shutil.rmtree(tmp_path / "m")
