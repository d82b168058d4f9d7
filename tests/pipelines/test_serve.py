"""The embedded server and its clients, on SavedModels made here; the genuine one where there is."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from absl import flags
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_status_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_log_pb2,
    prediction_service_pb2_grpc,
)

import qianmo.ops.library
from qianmo.layers.schema import Schema
from qianmo.pipelines import predict
from qianmo.pipelines.serving import models as serving_models
from qianmo.pipelines.serving import tensors as serving_tensors
from qianmo.pipelines.serving.clients import Client, RestClient
from qianmo.pipelines.serving.models import Model
from qianmo.pipelines.serving.server import ModelServer
from qianmo.pipelines.serving.signatures import ServingError
from qianmo.pipelines.serving.tensors import string_array, to_proto

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
Saved = dict[int, pathlib.Path]
Expected = dict[int, Arrays]
Data = tuple[pathlib.Path, Arrays]

Code = grpc.StatusCode
FOREVER = np.array([2**62])


class Ranker(tf.Module):
    """Reads each kind of input; `bias` tells its versions apart."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.bias = tf.Variable(bias, dtype=tf.float32)

    @tf.function(
        input_signature=[
            {
                "user": tf.TensorSpec([None], tf.int64, name="user"),
                "name": tf.TensorSpec([None], tf.string, name="name"),
                "history": tf.TensorSpec([None, 4], tf.int64, name="history"),
                "history_length": tf.TensorSpec([None], tf.int64, name="history_length"),
                "age": tf.TensorSpec([None], tf.float32, name="age"),
            }
        ]
    )
    def rank(self, inputs: Any) -> Any:
        length = inputs["history_length"]
        mask = tf.sequence_mask(length, tf.shape(inputs["history"])[1], dtype=tf.float32)
        items = tf.reduce_sum(tf.sin(tf.cast(inputs["history"], tf.float32)) * mask, axis=1)
        hashed = tf.strings.to_hash_bucket_fast(inputs["name"], 1000)
        ids = tf.cast(inputs["user"] % 1000 + hashed, tf.float32)
        return {
            "score": tf.tanh(ids / 1000.0 + items + inputs["age"]) + self.bias,
            "status": tf.cast(length > 0, tf.int32),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="ids")])
    def echo(self, ids: Any) -> Any:
        return {"ids_again": tf.identity(ids)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
    def text(self, text: Any) -> Any:
        return {"plain": tf.identity(text), "as_bytes": tf.identity(text)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="steps")])
    def loop(self, steps: Any) -> Any:
        last = tf.reduce_max(steps)
        count = tf.while_loop(lambda i: i < last, lambda i: [i + 1], [tf.constant(0, tf.int64)])
        return {"count": tf.zeros_like(steps) + count[0]}


def save(folder: pathlib.Path, bias: float) -> None:
    module = Ranker(bias)
    signatures = {
        "serving_default": module.rank,
        "echo": module.echo,
        "text": module.text,
        "loop": module.loop,
    }
    tf.saved_model.save(module, str(folder), signatures=signatures)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """SavedModels to copy versions from, by bias."""
    folders = {}
    for bias in (1, 2):
        folders[bias] = tmp_path_factory.mktemp("saved") / str(bias)
        save(folders[bias], bias)
    return folders


def rows(count: int = 3, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        "user": random.integers(-(2**62), 2**62, count),
        "name": string_array([f"näme {n}".encode() for n in range(count)]),
        "history": random.integers(0, 100, (count, 4)),
        "history_length": random.integers(0, 5, count),
        "age": random.normal(size=count).astype(np.float32),
    }


@pytest.fixture(scope="module")
def expected(saved: Saved) -> Expected:
    """Outputs of TensorFlow's own session for `rows()`, by bias."""
    found = {}
    for bias, folder in saved.items():
        with tf.compat.v1.Session(graph=tf.Graph()) as session:
            meta = tf.compat.v1.saved_model.load(session, ["serve"], str(folder))
            signature = meta.signature_def["serving_default"]
            feeds = {signature.inputs[name].name: array for name, array in rows().items()}
            fetches = {name: info.name for name, info in signature.outputs.items()}
            found[bias] = session.run(fetches, feeds)
    assert not np.array_equal(found[1]["score"], found[2]["score"])
    return found


def publish(saved_model: pathlib.Path, base_path: pathlib.Path, number: int) -> pathlib.Path:
    """Makes a version appear at once, as an exporter does."""
    temporary = base_path / f"making-{number}"
    shutil.copytree(saved_model, temporary)
    return temporary.rename(base_path / str(number))


def wait_for(condition: Callable[[], object], what: str) -> None:
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(f"waited for long, but not: {what}")


def same(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.fixture(scope="module")
def server(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    base_path = tmp_path_factory.mktemp("served")
    publish(saved[1], base_path, 7)
    with ModelServer({"ranker": base_path}, port=0, rest_api_port=0, grpc_max_threads=2) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server: ModelServer) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: ModelServer) -> Iterator[Client]:
    with contextlib.closing(Client(f"127.0.0.1:{server.port}", "ranker")) as made:
        yield made


@pytest.fixture
def rest(server: ModelServer) -> Iterator[RestClient]:
    with contextlib.closing(RestClient(f"127.0.0.1:{server.rest_port}", "ranker")) as made:
        yield made


def ask(
    server: ModelServer,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Any]:
    """Status and JSON of one REST request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=30)
    with contextlib.closing(connection):
        text = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, text, headers or {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def test_grpc_and_rest_give_what_the_session_gives(
    client: Client, rest: RestClient, expected: Expected
) -> None:
    same(client.predict(rows()), expected[1])
    same(rest.predict(rows()), expected[1])


def test_row_form_gives_what_the_column_form_gives(server: ModelServer, expected: Expected) -> None:
    columns = {
        name: array.tolist() if array.dtype != object else [v.decode() for v in array]
        for name, array in rows().items()
    }
    instances = [
        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
    ]
    status, found = ask(
        server, "POST", "/v1/models/ranker/versions/7:predict", {"instances": instances}
    )
    assert status == 200
    assert [row["status"] for row in found["predictions"]] == expected[1]["status"].tolist()
    assert [row["score"] for row in found["predictions"]] == expected[1]["score"].tolist()


def test_int64_passes_rest_exactly_and_a_single_input_needs_no_name(server: ModelServer) -> None:
    ids = [2**60 + 1, 2**63 - 1, -(2**63)]
    for key, answer in (("instances", "predictions"), ("inputs", "outputs")):
        body = {"signature_name": "echo", key: ids}
        assert ask(server, "POST", "/v1/models/ranker:predict", body) == (200, {answer: ids})
    body = {"signature_name": "echo", "instances": [{"ids": value} for value in ids]}
    assert ask(server, "POST", "/v1/models/ranker:predict", body) == (200, {"predictions": ids})


def test_strings_pass_rest_as_text_and_as_base64(server: ModelServer, rest: RestClient) -> None:
    body = {"signature_name": "text", "instances": ["é", {"b64": "/w=="}]}
    status, found = ask(server, "POST", "/v1/models/ranker:predict", body)
    assert status == 200
    assert found["predictions"] == [
        {"plain": "é", "as_bytes": {"b64": "w6k="}},
        {"plain": {"b64": "/w=="}, "as_bytes": {"b64": "/w=="}},
    ]
    text = string_array([b"a\0", b"\xff", b""])
    assert rest.predict({"text": text}, "text")["plain"].tolist() == text.tolist()


def changed(**changes: Any) -> Arrays:
    made = {**rows(), **changes}
    return {name: array for name, array in made.items() if array is not None}


BAD_INPUTS = {
    "missing": (changed(age=None), "input `age` is missing"),
    "extra": (changed(height=np.zeros(3)), "input `height` of"),
    "dtype": (changed(age=np.zeros(3, np.int32)), "input `age` should be float32"),
    "string for int": (changed(user=rows()["name"]), "input `user` should be int64"),
    "rank": (changed(history=np.zeros(3, np.int64)), "input `history` should have shape [?, 4]"),
    "one axis more": (changed(age=np.zeros((3, 1), np.float32)), "`age` should have shape [?]"),
    "wider": (changed(history=np.zeros((3, 5), np.int64)), "`history` should have shape [?, 4]"),
    "narrower": (changed(history=np.zeros((3, 1), np.int64)), "`history` should have shape [?, 4]"),
    "empty lists": (changed(history=np.zeros((3, 0), np.int64)), "should have shape [?, 4]"),
    "dim 0": (changed(user=np.zeros(4, np.int64)), "same number of rows"),
}


def predict_raw(channel: Any, inputs: Arrays) -> None:
    """Asks for what no client of this package would send."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "ranker"
    for name, array in inputs.items():
        request.inputs[name].CopyFrom(to_proto(array))
    prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30)


@pytest.mark.parametrize(("inputs", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_grpc_refuses_bad_input_by_name_and_serves_on(
    channel: Any, client: Client, expected: Expected, inputs: Arrays, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        predict_raw(channel, inputs)
    assert caught.value.code() == Code.INVALID_ARGUMENT
    assert message in caught.value.details()
    same(client.predict(rows()), expected[1])


def test_clients_pad_lists_and_refuse_what_would_fail_others(
    client: Client, rest: RestClient, expected: Expected
) -> None:
    """A server that merges requests finds other types and widths when it has merged them."""
    for asking in (client, rest):
        none = changed(history=np.zeros((3, 0), np.int64), history_length=np.zeros(3, np.int64))
        zeros = changed(history=np.zeros((3, 4), np.int64), history_length=np.zeros(3, np.int64))
        same(asking.predict(none), asking.predict(zeros))
        short = changed(history=rows()["history"][:, :2], history_length=np.full(3, 2))
        full = changed(history_length=np.full(3, 2))
        same(asking.predict(short), asking.predict(full))
        for name in ("dtype", "string for int", "rank", "one axis more", "wider"):
            inputs, message = BAD_INPUTS[name]
            with pytest.raises(ValueError, match=re.escape(message)):
                asking.predict(inputs)
        with pytest.raises(ValueError, match="Cut what is longer: a list at the end that its"):
            asking.predict(BAD_INPUTS["wider"][0])
        text = changed(name=np.array(["näme 0", "näme 1", "näme 2"]))
        same(asking.predict(text), expected[1])


def test_a_request_of_many_rows_is_split_and_its_answers_joined(server: ModelServer) -> None:
    sizes = []
    with server.models["ranker"].use() as version:
        signature = version.signature("")
        run = signature._run
        many = rows(2500)
        parts = [{k: v[i : i + 500] for k, v in many.items()} for i in range(0, 2500, 500)]
        answers = [signature(part) for part in parts]
        whole = {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}

        def counted(arrays: list[Array], timeout: float | None) -> list[Array]:
            sizes.append(len(arrays[0]))
            return run(arrays, timeout)

        signature._run = counted  # type: ignore[method-assign]
        try:
            for asking in (
                Client(f"127.0.0.1:{server.port}", "ranker"),
                RestClient(f"127.0.0.1:{server.rest_port}", "ranker"),
                Client(f"127.0.0.1:{server.port}", "ranker", max_batch_size=1000),
            ):
                found = asking.predict(many)
                np.testing.assert_allclose(found["score"], whole["score"], rtol=1e-6)
                np.testing.assert_array_equal(found["status"], whole["status"])
                asking.close()
        finally:
            signature._run = run  # type: ignore[method-assign]
    assert sizes == [1024, 1024, 452] * 2 + [1000, 1000, 500]


def test_a_client_follows_a_version_of_other_widths(
    saved: Saved, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wider(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 6], tf.int64, name="history")])
        def width(self, history: Any) -> Any:
            return {"width": tf.fill([tf.shape(history)[0]], history.shape[1])}

    class Narrower(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.int64, name="history")])
        def width(self, history: Any) -> Any:
            return {"width": tf.fill([tf.shape(history)[0]], history.shape[1])}

    base = tmp_path / "widths"
    for number, module in ((1, Narrower()), (2, Wider()), (3, Narrower())):
        made = tmp_path / str(number)
        tf.saved_model.save(module, str(made), signatures=module.width)
    publish(tmp_path / "1", base, 1)
    with ModelServer({"widths": base}, port=0, rest_api_port=0) as server:
        asking = (
            Client(f"127.0.0.1:{server.port}", "widths"),
            RestClient(f"127.0.0.1:{server.rest_port}", "widths"),
        )
        for number, width in ((1, 2), (2, 6), (3, 2)):
            if number > 1:
                publish(tmp_path / str(number), base, number)
                server.models["widths"].poll()
            for client in asking:
                assert client.predict({"history": np.array([[7]])})["width"].tolist() == [width]
        for client in asking:
            client.close()


def test_grpc_refuses_protos_that_contradict_themselves(channel: Any) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def refusal(proto: Any) -> str:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "ranker"
        request.model_spec.signature_name = "echo"
        request.inputs["ids"].CopyFrom(proto)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Predict(request, timeout=30)
        assert caught.value.code() == Code.INVALID_ARGUMENT
        assert "input `ids`" in caught.value.details()
        return caught.value.details()

    short = to_proto(np.arange(3))
    short.tensor_content = short.tensor_content[:-1]
    assert "should hold 24 bytes" in refusal(short)
    unknown = to_proto(np.arange(3))
    unknown.tensor_shape.dim[0].size = -1
    assert "fully known" in refusal(unknown)
    long = tf.make_tensor_proto(1, tf.int64, shape=[1])
    long.int64_val.extend([2, 3])
    assert "values do not fit" in refusal(long)
    unknown = to_proto(np.arange(3))
    unknown.dtype = 99
    assert "data type 99" in refusal(unknown)
    deep = to_proto(np.zeros([1] * 17, np.int64))
    assert "should have <= 16 axes" in refusal(deep)
    huge = tf.make_tensor_proto(1, tf.int64)
    huge.tensor_shape.dim.add(size=2**40)
    with pytest.raises(ValueError, match="should hold <= 67108864 bytes"):
        serving_tensors.from_proto(huge)


def test_typed_fields_and_a_repeated_value_are_read() -> None:
    for array in (np.array([1.5, -2], np.float32), np.array([[3], [4]]), np.array([True, False])):
        proto = to_proto(array)
        proto.ClearField("tensor_content")
        field = {"f": "float_val", "i": "int64_val", "b": "bool_val"}[array.dtype.kind]
        getattr(proto, field).extend(array.ravel().tolist())
        np.testing.assert_array_equal(serving_tensors.from_proto(proto), array)
    repeated = tf.make_tensor_proto(5, tf.int64, shape=[3])
    np.testing.assert_array_equal(serving_tensors.from_proto(repeated), [5, 5, 5])


def test_names_not_served_are_not_found_with_the_known_ones(
    server: ModelServer, client: Client, channel: Any
) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    with contextlib.closing(Client(f"127.0.0.1:{server.port}", "other")) as other:
        with pytest.raises(grpc.RpcError) as caught:
            other.predict(rows())
        assert (caught.value.code(), "`ranker`" in caught.value.details()) == (Code.NOT_FOUND, True)
    with pytest.raises(grpc.RpcError) as caught:
        client.predict(rows(), "other")
    assert (caught.value.code(), "`echo`" in caught.value.details()) == (Code.NOT_FOUND, True)
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "ranker"
    request.model_spec.version.value = 6
    with pytest.raises(grpc.RpcError) as caught:
        stub.Predict(request, timeout=30)
    assert (caught.value.code(), "`7`" in caught.value.details()) == (Code.NOT_FOUND, True)
    for path, known in (("other", "`ranker`"), ("ranker/versions/6", "`7`")):
        for method, end in (("POST", ":predict"), ("GET", ""), ("GET", "/metadata")):
            status, found = ask(server, method, f"/v1/models/{path}{end}", {"inputs": []})
            assert status == 404
            assert known in found["error"]


def with_row(**changes: Any) -> dict[str, Any]:
    row = {"user": 1, "name": "a", "history": [1, 2, 0, 0], "history_length": 2, "age": 0.5}
    made = {**row, **changes}
    return {name: value for name, value in made.items() if value is not None}


BAD_BODIES = {
    "not JSON": (b"{", "should be JSON"),
    "deep": (b"[" * 100_000, "should be JSON"),
    "a list": ([], "should be a JSON object"),
    "neither": ({}, "either `instances` or `inputs`"),
    "both": ({"instances": [], "inputs": {}}, "either `instances` or `inputs`"),
    "unknown key": ({"inputs": {}, "input": 1}, "unknown key `input`"),
    "no row": ({"instances": []}, "at least one row"),
    "no name": ({"inputs": [1]}, "by its name: `"),
    "missing": (
        {"instances": [with_row(), with_row(age=None)]},
        "`age` is missing from `instances[1]`",
    ),
    "extra": ({"instances": [with_row(height=1)]}, "input `height` of `instances[0]`"),
    "no object": ({"instances": [with_row(), 3]}, "`instances[1]` should be an object"),
    "ragged": ({"instances": [with_row(), with_row(history=[1])]}, "input `history`: its lists"),
    "depth": ({"instances": [with_row(), with_row(history=1)]}, "input `history`: its lists"),
    "float for int": ({"instances": [with_row(user=1.0)]}, "input `user`: it should hold int64"),
    "bool for int": ({"instances": [with_row(user=True)]}, "input `user`: it should hold int64"),
    "text for int": ({"instances": [with_row(user="1")]}, "input `user`: it should hold int64"),
    "int too large": ({"instances": [with_row(user=2**63)]}, "input `user`: a value is out of"),
    "float too large": ({"instances": [with_row(age=1e300)]}, "input `age`: a value is out of"),
    "null": ({"instances": [with_row(age=[None])]}, "input `age`: it should hold float32"),
    "int for text": ({"instances": [with_row(name=3)]}, "input `name`: it should hold strings"),
    "bad base64": ({"instances": [with_row(name={"b64": "?"})]}, "input `name`: `b64`"),
    "rank": ({"instances": [with_row(history=3)]}, "input `history` should have shape [?, 4]"),
    "narrower": ({"instances": [with_row(history=[3])]}, "`history` should have shape [?, 4]"),
}


@pytest.mark.parametrize(("body", "message"), BAD_BODIES.values(), ids=BAD_BODIES)
def test_rest_refuses_bad_bodies_by_name_and_serves_on(
    server: ModelServer, rest: RestClient, expected: Expected, body: Any, message: str
) -> None:
    status, found = ask(server, "POST", "/v1/models/ranker:predict", body)
    assert status == 400
    assert found.keys() == {"error"}
    assert message in found["error"]
    same(rest.predict(rows()), expected[1])


def test_rest_refuses_bodies_too_large_and_of_unknown_length(server: ModelServer) -> None:
    path = "/v1/models/ranker:predict"
    for body, headers in ((b" " * (17 << 20), {}), (b"", {"Content-Length": str(2**40)})):
        status, found = ask(server, "POST", path, body, headers)
        assert (status, "should hold <= 16777216 bytes" in found["error"]) == (413, True)
    assert ask(server, "POST", path, b"", {"Content-Length": "-1"})[0] == 400
    assert ask(server, "POST", path, b"", {"Transfer-Encoding": "chunked"})[0] == 411
    assert ask(server, "GET", path)[0] == 404
    assert ask(server, "PUT", path, b"")[0] == 501


def test_rest_keeps_its_connection_and_the_client_survives_its_end(
    server: ModelServer, rest: RestClient, expected: Expected
) -> None:
    rest.predict(rows())
    connection = rest._connection.sock
    rest.predict(rows())
    assert rest._connection.sock is connection
    connection.shutdown(socket.SHUT_RDWR)
    same(rest.predict(rows()), expected[1])


def test_status_metadata_and_health(
    server: ModelServer, client: Client, rest: RestClient, channel: Any
) -> None:
    status = {"error_code": "OK", "error_message": ""}
    entry = {"version": "7", "state": "AVAILABLE", "status": status}
    assert ask(server, "GET", "/v1/models/ranker") == (200, {"model_version_status": [entry]})
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "ranker"
    answer = model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(request, timeout=30)
    assert [(v.version, v.state) for v in answer.model_version_status] == [
        (7, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    ]
    assert client.signature_defs() == rest.signature_defs()
    assert set(client.signature_defs()["serving_default"].inputs) == set(rows())
    for service in ("", "PredictionService"):
        checked = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=30
        )
        assert checked.status == health_pb2.HealthCheckResponse.SERVING


def test_output_filter_selects_and_refuses(channel: Any, expected: Expected) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    request = predict_pb2.PredictRequest(output_filter=["status"])
    request.model_spec.name = "ranker"
    for name, array in rows().items():
        request.inputs[name].CopyFrom(to_proto(array))
    response = stub.Predict(request, timeout=30)
    assert list(response.outputs) == ["status"]
    assert response.model_spec.version.value == 7
    np.testing.assert_array_equal(
        tf.make_ndarray(response.outputs["status"]), expected[1]["status"]
    )
    request.output_filter.append("other")
    with pytest.raises(grpc.RpcError, match="output `other` is not in the signature"):
        stub.Predict(request, timeout=30)


def loop_request(steps: Array) -> Any:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "ranker"
    request.model_spec.signature_name = "loop"
    request.inputs["steps"].CopyFrom(to_proto(steps))
    return request


def test_a_flood_is_refused_and_a_passed_deadline_ends_the_run(
    server: ModelServer, client: Client, channel: Any, expected: Expected
) -> None:
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    calls = [stub.Predict.future(loop_request(FOREVER), timeout=2) for _ in range(60)]
    codes = [call.code() for call in calls]
    # Two run, sixteen wait; what ran is stopped by the server, or the loop would never end.
    assert codes.count(Code.RESOURCE_EXHAUSTED) == 42
    assert codes.count(Code.DEADLINE_EXCEEDED) == 18
    wait_for(lambda: client_answers(client), "an answer after the flood")
    with server.models["ranker"].use() as version:
        wait_for(lambda: version.users == 1, "the end of every run")
    same(client.predict(rows()), expected[1])


def client_answers(client: Client) -> bool:
    try:
        return bool(client.predict(rows()))
    except grpc.RpcError:
        return False


def test_stop_gives_up_what_does_not_end(saved: Saved, tmp_path: pathlib.Path) -> None:
    publish(saved[1], tmp_path, 1)
    with ModelServer({"ranker": tmp_path}, port=0, rest_api_port=0) as server:
        with server.models["ranker"].use() as version:
            pass
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            call = stub.Predict.future(loop_request(FOREVER))
            wait_for(lambda: version.users == 1, "the request to run")
            server.stop(grace=0.2)
            assert call.code() != Code.OK
    assert version.is_closed
    wait_for(lambda: version.users == 0, "the run to be given up")


def test_a_port_in_use_is_an_error(
    server: ModelServer, saved: Saved, tmp_path: pathlib.Path
) -> None:
    publish(saved[1], tmp_path, 1)
    with pytest.raises(RuntimeError):
        ModelServer({"ranker": tmp_path}, port=server.port, rest_api_port=0)
    with pytest.raises(OSError, match="in use"):
        ModelServer({"ranker": tmp_path}, port=0, rest_api_port=server.rest_port)


def test_binds_loopback_unless_told_otherwise(server: ModelServer) -> None:
    for port in (server.port, server.rest_port):
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):  # what is bound to all would answer here
            socket.create_connection(("127.0.0.2", port)).close()


def test_a_switch_under_load_fails_no_request(
    saved: Saved, expected: Expected, tmp_path: pathlib.Path
) -> None:
    publish(saved[1], tmp_path, 1)
    seen: list[set[int]] = [set() for _ in range(5)]
    enough = threading.Event()

    def load(number: int, server: ModelServer) -> None:
        kind, port = (RestClient, server.rest_port) if number == 4 else (Client, server.port)
        with contextlib.closing(kind(f"127.0.0.1:{port}", "ranker")) as asking:
            while not enough.is_set():
                found = asking.predict(rows())
                seen[number].add(1 if np.array_equal(found["score"], expected[1]["score"]) else 2)
                if 2 in seen[number]:
                    same(found, expected[2])

    with (
        ModelServer({"ranker": tmp_path}, port=0, rest_api_port=0) as server,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
    ):
        model = server.models["ranker"]
        futures = [pool.submit(load, number, server) for number in range(5)]
        try:
            wait_for(lambda: all(1 in s for s in seen) or any(f.done() for f in futures), "load")
            with model.use() as old:
                publish(saved[2], tmp_path, 2)
                wait_for(lambda: all(2 in s for s in seen) or any(f.done() for f in futures), "2")
                # Held by this block, as by a request that takes long: it still answers.
                states = {v.version: v.state for v in model.status().model_version_status}
                state = get_model_status_pb2.ModelVersionStatus
                assert states == {1: state.UNLOADING, 2: state.AVAILABLE}
                time.sleep(1.5)
                assert not old.is_closed
                same(old.signature("")(rows()), expected[1])
            wait_for(lambda: old.is_closed, "the old session to be closed")
        finally:
            enough.set()
        for future in futures:
            future.result()
    assert seen == [{1, 2}] * 5


def truncate(folder: pathlib.Path) -> None:
    (folder / "saved_model.pb").write_bytes((folder / "saved_model.pb").read_bytes()[:1000])


def lose_variables(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "variables")


def break_warm_up(folder: pathlib.Path) -> None:
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.model_spec.name = "ranker"
    for name, array in rows().items():
        if name != "age":
            log.predict_log.request.inputs[name].CopyFrom(to_proto(array))
    path = folder / serving_models.WARM_UP_FILE
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        writer.write(log.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "saved_model"),
        (lose_variables, "variables"),
        (break_warm_up, "warm-up record 0 failed: input `age` is missing"),
    ],
)
def test_a_broken_version_is_not_served(
    saved: Saved,
    expected: Expected,
    tmp_path: pathlib.Path,
    damage: Callable[[pathlib.Path], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[int] = []
    real = serving_models.Version

    def load(number: int, path: pathlib.Path, config: Any) -> serving_models.Version:
        tried.append(number)
        return real(number, path, config)

    monkeypatch.setattr(serving_models, "Version", load)
    publish(saved[1], tmp_path, 1)
    with contextlib.closing(Model("ranker", tmp_path)) as model:
        broken = shutil.copytree(saved[2], tmp_path / "making")
        damage(broken)
        broken.rename(tmp_path / "2")
        for _ in range(3):
            model.poll()
        assert tried == [1, 2]  # not again and again
        with model.use() as version:
            same(version.signature("")(rows()), expected[1])
        (entry,) = model.status(2).model_version_status
        assert entry.state == get_model_status_pb2.ModelVersionStatus.END
        assert reason in entry.status.error_message
        with monkeypatch.context() as later:
            later.setattr(serving_models, "RETRY_SECONDS", 0.0)
            model.poll()
        assert tried == [1, 2, 2]
        shutil.rmtree(tmp_path / "2")
        publish(saved[2], tmp_path, 2)
        model.poll()
        with model.use() as version:
            same(version.signature("")(rows()), expected[2])


def test_a_version_taken_away_gives_way_to_the_one_before(
    saved: Saved, tmp_path: pathlib.Path
) -> None:
    for number in (1, 10, 9):  # 10 is the highest, though not the last by name
        publish(saved[1], tmp_path, number)
    with contextlib.closing(Model("ranker", tmp_path)) as model:
        with model.use() as version:
            assert version.number == 10
        shutil.rmtree(tmp_path / "10")
        model.poll()
        with model.use() as version:
            assert version.number == 9
        shutil.rmtree(tmp_path)
        model.poll()
        with model.use() as version:
            assert version.number == 9
    with pytest.raises(ServingError, match="shut down"), model.use():
        pass


def test_no_version_at_the_start_is_an_error_with_the_path(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} should hold a folder"):
        ModelServer({"ranker": tmp_path}, port=0, rest_api_port=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A schema, its rows as Parquet, and the same as inputs."""
    folder = tmp_path_factory.mktemp("data")
    schema = {
        "features": [
            {"name": "user", "num_ids": 10},
            {"name": "name", "dtype": "string", "hash_buckets": 10},
            {"name": "history", "num_ids": 100, "max_length": 4},
            {"kind": "dense", "name": "age"},
        ],
        "labels": ["click"],
    }
    (folder / "schema.json").write_text(json.dumps(Schema.from_config(schema).to_config()))
    inputs = rows(10)
    inputs["user"] = np.arange(10)
    lengths = inputs["history_length"]
    inputs["history"] *= np.arange(4) < lengths[:, None]
    lists = [row[:length].tolist() for row, length in zip(inputs["history"], lengths, strict=True)]
    table = {**inputs, "name": [v.decode() for v in inputs["name"]], "history": lists}
    del table["history_length"]
    pq.write_table(pa.table({**table, "click": np.zeros(10)}), folder / "rows.parquet")
    return folder, inputs


def check_scores(text: str, client: Client, inputs: Arrays, count: int) -> None:
    wanted = client.predict({name: array[:count] for name, array in inputs.items()})
    found = [json.loads(line) for line in text.splitlines()]
    assert len(found) == count
    np.testing.assert_allclose([row["score"] for row in found], wanted["score"], rtol=1e-6)
    assert [row["status"] for row in found] == wanted["status"].tolist()


@contextlib.contextmanager
def predict_flags(*arguments: str) -> Iterator[flags.FlagValues]:
    before = set(flags.FLAGS)
    predict.define_flags()
    try:
        flags.FLAGS(["predict", *arguments])
        yield flags.FLAGS
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("over_rest", [False, True])
def test_predict_writes_a_line_for_each_row(
    server: ModelServer,
    client: Client,
    data: Data,
    tmp_path: pathlib.Path,
    over_rest: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, inputs = data
    output = tmp_path / "scores.jsonl"
    common = (
        f"--server=127.0.0.1:{server.rest_port if over_rest else server.port}",
        f"--data={folder / 'rows.parquet'}",
        f"--schema={folder / 'schema.json'}",
        f"--rest={over_rest}",
        "--batch_size=3",
    )
    with predict_flags(*common, "--model_name=ranker", "--rows=7", f"--output={output}"):
        predict.run([])
    check_scores(output.read_text(), client, inputs, 7)
    with predict_flags(*common, "--model_name=ranker"):
        predict.run([])
    check_scores(capsys.readouterr().out, client, inputs, 10)
    for arguments, message in (
        (["--model_name=ranker", "--signature_name=loop"], "input `steps` is not a column"),
        (["--model_name=ranker", "--signature_name=no"], "Its signatures: .*serving_default"),
        (["--model_name=no"], "model `no` is not served"),
        (["--schema=/missing"], "/missing should be the JSON of a schema"),
    ):
        with (
            predict_flags(*common, *arguments),
            pytest.raises((ValueError, ConnectionError), match=message),
        ):
            predict.run([])


def start(*arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qianmo.pipelines.serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **(environment or {})},
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def test_serve_ends_by_sigterm_with_requests_answered(
    saved: Saved, expected: Expected, tmp_path: pathlib.Path
) -> None:
    entries = []
    for name, bias in (("ranker", 1), ("second", 2)):
        (tmp_path / name).mkdir()
        publish(saved[bias], tmp_path / name, 1)
        entries.append(
            f'config {{ name: "{name}" base_path: "{tmp_path / name}" '
            'model_platform: "tensorflow" }'
        )
    config = tmp_path / "models.config"
    config.write_text(f"model_config_list {{ {' '.join(entries)} }}")
    process = start("--embedded", f"--model_config_file={config}", "--port=0", "--rest_api_port=0")
    with process:
        try:
            ready = first_line(process)
            assert ready.startswith("ready: gRPC 127.0.0.1:"), process.communicate()
            target, rest_target = (
                part.split(",")[0].removeprefix("http://") for part in ready.split()[2:5:2]
            )
            with contextlib.closing(Client(target, "second")) as second:
                same(second.predict(rows()), expected[2])
            with contextlib.closing(Client(target, "ranker")) as client:
                same(client.predict(rows()), expected[1])
                rest = RestClient(rest_target, "ranker")
                same(rest.predict(rows()), expected[1])
                # As many steps as keep this machine busy when the signal comes.
                steps = np.array([50_000])
                with concurrent.futures.ThreadPoolExecutor(2) as pool:
                    while True:
                        calls = [
                            pool.submit(client.predict, {"steps": steps}, "loop"),
                            pool.submit(rest.predict, {"steps": steps}, "loop"),
                        ]
                        time.sleep(0.4)
                        if not any(call.done() for call in calls):
                            break
                        for call in calls:
                            call.result()
                        steps = steps * 2
                    process.send_signal(signal.SIGTERM)
                    for call in calls:
                        np.testing.assert_array_equal(call.result()["count"], steps)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()


@pytest.fixture
def stand_in(tmp_path: pathlib.Path) -> pathlib.Path:
    """A program that writes down its arguments, in the place of tensorflow_model_server."""
    program = tmp_path / "stand_in"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\nexit 3\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_the_command_line_for_the_genuine_server(
    stand_in: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def arguments(*given: str) -> list[str]:
        process = start(*given, environment={"QIANMO_MODEL_SERVER": str(stand_in)})
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors  # its own exit status
        assert "binds gRPC and REST on all interfaces" in errors
        return (tmp_path / "arguments").read_text().splitlines()

    base_path = tmp_path / "ranker"
    (base_path / "1").mkdir(parents=True)
    (base_path / "1" / "saved_model.pb").write_bytes(b"a graph")
    for name in ("m.config", "b"):
        (tmp_path / name).touch()
    grpc_port, rest_port = free_port(), free_port()
    ports = [f"--port={grpc_port}", f"--rest_api_port={rest_port}"]
    common = [
        "--rest_api_num_threads=64",
        "--grpc_max_threads=256",
        "--max_num_load_retries=1",
        "--tensorflow_intra_op_parallelism=0",
        "--tensorflow_inter_op_parallelism=0",
        "--enable_grpc_healthcheck_service=true",
    ]
    relative = os.path.relpath(base_path)
    assert arguments(f"--model_base_path={relative}", "--model_name=ranker", *ports) == [
        *ports,
        *common,
        "--model_name=ranker",
        f"--model_base_path={base_path}",
    ]
    batching = base_path / "batching_parameters.txt"
    batching.write_text("max_batch_size { value: 8 }\n")
    assert arguments(f"--model_base_path={base_path}", *ports)[-2:] == [
        "--enable_batching=true",
        f"--batching_parameters_file={batching}",
    ]
    config, batches = (tmp_path / name for name in ("m.config", "b"))
    given = [f"--model_config_file={config}", f"--batching_parameters_file={batches}"]
    found = arguments(*given, "--port=0", "--rest_api_port=0")
    assert found[0].startswith("--port=")
    assert found[0] != "--port=0"  # which would turn gRPC off there
    assert found[8:] == [
        f"--model_config_file={config}",
        "--enable_batching=true",
        f"--batching_parameters_file={batches}",
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("linked_in", [False, True])
def test_a_model_that_needs_our_ops_is_refused_for_a_server_without_them(
    tmp_path: pathlib.Path, linked_in: bool
) -> None:
    program = tmp_path / "server"
    compiled = pathlib.Path(shutil.which("true") or "").read_bytes()
    program.write_bytes(compiled + b"Qianmo>EmbeddingLookup" * linked_in)
    program.chmod(0o755)
    for number, text in ((1, b"stock ops"), (2, b"op: Qianmo>EmbeddingLookup")):
        (tmp_path / "m" / str(number)).mkdir(parents=True)
        (tmp_path / "m" / str(number) / "saved_model.pb").write_bytes(text)
    words = (f"--model_base_path={tmp_path / 'm'}", "--port=0", "--rest_api_port=0")
    process = start(*words, environment={"QIANMO_MODEL_SERVER": str(program)})
    errors = process.communicate(timeout=60)[1]
    assert (process.returncode == 0) == linked_in  # the program is `true`
    refusal = f"error: {tmp_path / 'm' / '2'} holds ops of this package, which {program} has not"
    assert (refusal in errors) != linked_in
    shutil.rmtree(tmp_path / "m" / "2")  # version 1 needs none
    process = start(*words, environment={"QIANMO_MODEL_SERVER": str(program)})
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
@pytest.mark.parametrize("genuine", [False, True])
def test_a_port_in_use_is_told_before_anything_is_loaded(
    stand_in: pathlib.Path, tmp_path: pathlib.Path, flag: str, genuine: bool
) -> None:
    (tmp_path / "m" / "1").mkdir(parents=True)
    (tmp_path / "m" / "1" / "saved_model.pb").write_bytes(b"which nobody can load")
    words = [f"--model_base_path={tmp_path / 'm'}", *(() if genuine else ["--embedded"])]
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        ports = {"port": 0, "rest_api_port": 0, flag: port}
        words += [f"--{name}={value}" for name, value in ports.items()]
        process = start(*words, environment={"QIANMO_MODEL_SERVER": str(stand_in)})
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "Address already in use" in line
    assert f"{'*' if genuine else '127.0.0.1'}:{port} (--{flag})" in line
    assert not (tmp_path / "arguments").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model_base_path or --model_config_file"),
        (["--model_base_path=a"], "QIANMO_MODEL_SERVER should name a program"),
        (
            ["--embedded", "--model_config_file=missing"],
            "=missing should name a file. There is none",
        ),
        (
            ["--embedded", f"--model_config_file={__file__}"],
            "should be a ModelServerConfig as text",
        ),
        (
            ["--embedded", "--model_base_path=m"],
            "=m should hold a folder named by a version number",
        ),
        (
            ["--embedded", "--port=7", "--rest_api_port=7", "--model_base_path=gs://m"],
            "(--rest_api_port)",
        ),
        (
            ["--embedded", "--model_base_path=m", "--custom_op_path=missing.so"],
            "--custom_op_path=missing.so should name a file. There is none",
        ),
    ],
)
def test_serve_says_what_is_wrong_with_its_flags(arguments: list[str], message: str) -> None:
    process = start(*arguments, environment={"QIANMO_MODEL_SERVER": "/missing"})
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if arguments else 2)
    assert message in printed + errors


def test_a_library_of_ops_that_is_named_takes_the_place_of_the_own(tmp_path: pathlib.Path) -> None:
    built = pathlib.Path(qianmo.ops.library.__file__).with_name("_qianmo_ops.so")
    shutil.copy(built, tmp_path / "elsewhere.so")
    program = (
        "import sys\n"
        "from tensorflow.python.framework import op_def_registry\n"
        "from qianmo.pipelines.serve import load_custom_ops\n"
        "load_custom_ops(sys.argv[1:])\n"
        "assert op_def_registry.get('Qianmo>EmbeddingLookup')\n"
        "print(open('/proc/self/maps').read())\n"
    )
    for paths in ([tmp_path / "elsewhere.so"], []):
        done = subprocess.run(
            [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("elsewhere.so" in done.stdout, "_qianmo_ops.so" in done.stdout) == (
            bool(paths),
            not paths,
        )


@pytest.mark.skipif(
    "QIANMO_MODEL_SERVER" not in os.environ,
    reason="QIANMO_MODEL_SERVER should name a tensorflow_model_server",
)
def test_the_genuine_server_gives_what_the_embedded_one_gives(
    saved: Saved, expected: Expected, tmp_path: pathlib.Path
) -> None:
    publish(saved[1], tmp_path, 1)
    process = start(f"--model_base_path={tmp_path}", "--model_name=ranker", "--port=0",
                    "--rest_api_port=0")  # fmt: skip
    with process:
        try:
            line = first_line(process).split()
            ports = {flag: value for flag, _, value in (word.partition("=") for word in line)}
            drain = threading.Thread(target=process.communicate, daemon=True)
            drain.start()  # a full pipe would stop it
            target = f"127.0.0.1:{ports['--port']}"
            with grpc.insecure_channel(target) as channel:
                grpc.channel_ready_future(channel).result(timeout=60)
                health = health_pb2_grpc.HealthStub(channel)
                checked = health.Check(
                    health_pb2.HealthCheckRequest(service="PredictionService"), timeout=30
                )
                assert checked.status == health_pb2.HealthCheckResponse.SERVING
            with (
                contextlib.closing(Client(target, "ranker")) as client,
                contextlib.closing(
                    RestClient(f"127.0.0.1:{ports['--rest_api_port']}", "ranker")
                ) as rest,
            ):
                same(client.predict(rows()), expected[1])
                same(rest.predict(rows()), expected[1])
                text = string_array([b"a\0", b""])
                assert client.predict({"text": text}, "text")["plain"].tolist() == text.tolist()
                with grpc.insecure_channel(target) as channel:
                    for name in ("missing", "extra", "dtype"):
                        with pytest.raises(grpc.RpcError) as caught:
                            predict_raw(channel, BAD_INPUTS[name][0])
                        assert caught.value.code() == Code.INVALID_ARGUMENT
                publish(saved[2], tmp_path, 2)
                wait_for(
                    lambda: np.array_equal(client.predict(rows())["score"], expected[2]["score"]),
                    "the second version",
                )
        finally:
            process.terminate()
            process.wait(timeout=30)
