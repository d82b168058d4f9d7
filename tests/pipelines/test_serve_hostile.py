"""The embedded server and clients that are slow, send nonsense, or much that takes few bytes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import json
import logging
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis import predict_pb2

from qianmo.pipelines.serving.clients import Client, RestClient
from qianmo.pipelines.serving.server import ModelServer
from qianmo.pipelines.serving.tensors import from_proto, to_proto
from qianmo.pipelines.serving.wire import read_request

PREDICT = "/tensorflow.serving.PredictionService/Predict"
FOREVER = np.array([2**62])


class Model(tf.Module):
    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.int64, name="user"),
            tf.TensorSpec([None], tf.string, name="name"),
            tf.TensorSpec([None, 4], tf.float32, name="list"),
        ]
    )
    def score(self, user: Any, name: Any, list: Any) -> Any:
        whole = tf.cast(user, tf.float32) + tf.cast(tf.strings.length(name), tf.float32)
        return {"score": whole + tf.reduce_sum(list, 1)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="steps")])
    def loop(self, steps: Any) -> Any:
        last = tf.reduce_max(steps)
        count = tf.while_loop(lambda i: i < last, lambda i: [i + 1], [tf.constant(0, tf.int64)])
        return {"count": tf.zeros_like(steps) + count[0]}


ROWS = {
    "user": np.array([1, 2]),
    "name": np.array([b"a", b"bc"], object),
    "list": np.ones((2, 4), np.float32),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    base = tmp_path_factory.mktemp("hostile") / "m"
    model = Model()
    signatures = {"serving_default": model.score, "loop": model.loop}
    tf.saved_model.save(model, str(base / "1"), signatures=signatures)
    return base


@pytest.fixture(scope="module")
def server(saved: pathlib.Path) -> Iterator[ModelServer]:
    with ModelServer(
        {"m": saved}, port=0, rest_api_port=0, grpc_max_threads=2, rest_api_num_threads=4
    ) as running:
        yield running


def status_of(server: ModelServer) -> int:
    """HTTP status of a request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=30)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/v1/models/m")
            return connection.getresponse().status
        except ConnectionError:  # it was the newest, and gave way
            return 0


def until(condition: Any, seconds: float = 60.0) -> float:
    """Waits for a condition; how long it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() < begin + seconds
        time.sleep(0.05)
    return time.monotonic() - begin


def test_connections_beyond_the_bound_are_refused_while_all_are_answered(
    saved: pathlib.Path,
) -> None:
    with (
        ModelServer({"m": saved}, port=0, rest_api_port=0, rest_api_num_threads=2) as server,
        contextlib.ExitStack() as stack,
    ):
        body = json.dumps({"signature_name": "loop", "instances": FOREVER.tolist()}).encode()
        head = f"POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        for _ in range(2):
            busy = stack.enter_context(socket.create_connection(("127.0.0.1", server.rest_port)))
            busy.sendall(head.encode() + body)
        until(lambda: status_of(server) == 429)
        assert [status_of(server) for _ in range(20)] == [429] * 20
        server.stop(grace=0.1)


def test_idle_connections_give_way_to_new_ones(server: ModelServer) -> None:
    with contextlib.ExitStack() as stack:
        held = []
        for _ in range(4):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.rest_port)))
            one.sendall(b"GET /v1/models/m HTTP/1.1\r\n\r\n")
            assert one.recv(15) == b"HTTP/1.1 200 OK"
            held.append(one)
        assert [status_of(server) for _ in range(10)] == [200] * 10
        client = RestClient(f"127.0.0.1:{server.rest_port}", "m")
        expected = client.predict(ROWS)
        for _ in range(8):
            status_of(server)
        # A client whose connection gave way connects again.
        np.testing.assert_array_equal(client.predict(ROWS)["score"], expected["score"])
        client.close()


@pytest.mark.parametrize("head", [b"GET /v1/", b"POST /v1/models/m:predict HTTP/1.1\r\nContent-"])
def test_connections_that_send_a_byte_now_and_then_lock_nobody_out(
    server: ModelServer, head: bytes
) -> None:
    enough = threading.Event()

    def drip() -> None:
        """Sends slowly, and begins again when it is cut off."""
        while not enough.is_set():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", server.rest_port)) as slow,
            ):
                slow.sendall(head)
                while not enough.wait(0.05):
                    slow.sendall(b"x")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(drip) for _ in range(8)]  # twice as many as there are places
        try:
            time.sleep(0.5)
            for _ in range(5):
                assert until(lambda: status_of(server) == 200) < 30
        finally:
            enough.set()
        for future in slow:
            future.result()


def test_a_request_that_takes_too_long_to_arrive_is_ended(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qianmo.pipelines.serving import rest

    monkeypatch.setattr(rest, "MOVE_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=30) as slow:
        slow.sendall(b"POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: 100\r\n\r\n")
        begin = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < begin + 30:
                slow.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() < begin + 20


def test_grpc_calls_whose_request_does_not_arrive_lock_nobody_out(server: ModelServer) -> None:
    target, enough = f"127.0.0.1:{server.port}", threading.Event()

    def never() -> Iterator[bytes]:
        enough.wait()
        yield from ()

    with grpc.insecure_channel(target) as slow:
        send = slow.stream_unary(PREDICT, request_serializer=None, response_deserializer=None)
        calls = [send.future(never()) for _ in range(18)]  # as many as there are places
        client = Client(target, "m")
        refused = set()

        def answered() -> bool:
            try:
                return bool(client.predict(ROWS))
            except grpc.RpcError as error:
                refused.add(error.code())
                return False

        try:
            until(answered)
            for call in calls:
                assert call.code() in (
                    grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED
                )  # fmt: skip
            for _ in range(20):
                assert answered()
            assert refused <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
        finally:
            enough.set()
            client.close()


def test_a_grpc_request_that_cannot_be_parsed_is_a_line_of_the_log(
    server: ModelServer, caplog: pytest.LogCaptureFixture
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for method in (PREDICT, "/tensorflow.serving.ModelService/GetModelStatus"):
            caplog.clear()
            with caplog.at_level(logging.INFO), pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(method)(b"\xff" * 1000, timeout=30)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "the request is malformed" in caught.value.details()
            (record,) = caplog.records
            assert f"{method}: malformed request from ipv4:127.0.0.1" in record.getMessage()
            assert record.exc_info is None
            assert "\n" not in record.getMessage()
        stub = health_pb2_grpc.HealthStub(channel)
        checked = stub.Check(health_pb2.HealthCheckRequest(service="PredictionService"), timeout=30)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError, match="service `other` is not served"):
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=30)


def test_a_request_has_no_more_rows_than_a_server_merges(server: ModelServer) -> None:
    many = {name: np.repeat(column[:1], 1025, 0) for name, column in ROWS.items()}
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    for name, column in many.items():
        request.inputs[name].CopyFrom(to_proto(column))
    message = "a request should have <= 1024 rows. Received: 1025. Split it"
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        send = channel.unary_unary(PREDICT)
        with pytest.raises(grpc.RpcError, match=re.escape(message)):
            send(request.SerializeToString(), timeout=30)
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=30)
    with contextlib.closing(connection):
        columns = {"user": [1] * 1025, "name": ["a"] * 1025, "list": [[1.0] * 4] * 1025}
        connection.request("POST", "/v1/models/m:predict", json.dumps({"inputs": columns}))
        answer = connection.getresponse()
        assert answer.status == 400
        assert message in json.loads(answer.read())["error"]


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def tensor(dtype: int, shape: tuple[int, ...], values: bytes) -> bytes:
    dims = b"".join(field(2, b"\x08" + varint(size)) for size in shape)
    return b"\x08" + varint(dtype) + field(2, dims) + values


def request_of(inputs: dict[str, bytes]) -> bytes:
    entries = (field(2, field(1, k.encode()) + field(2, v)) for k, v in inputs.items())
    return field(1, field(1, b"m")) + b"".join(entries)


MANY = 600_000  # in 1.2 MB of the wire
GOOD = {
    "user": tensor(9, (2,), field(10, b"\x01\x02")),
    "name": tensor(7, (2,), field(8, b"a") * 2),
    "list": tensor(1, (2, 4), field(5, b"\0\0\x80?")),
}
FEW_BYTES_FOR_MUCH = {
    "axes": request_of({**GOOD, "user": b"\x08\x09" + field(2, field(2, b"") * MANY)}),
    "empty strings": request_of({**GOOD, "name": tensor(7, (MANY,), field(8, b"") * MANY)}),
    "small numbers": request_of({**GOOD, "user": tensor(9, (MANY,), field(10, b"\x01" * MANY))}),
    "variants": request_of({**GOOD, "user": tensor(9, (2,), field(15, field(3, b"") * MANY))}),
    "resources": request_of({**GOOD, "user": tensor(9, (2,), field(14, b"") * MANY)}),
    "one value for all": request_of(
        {
            "user": tensor(9, (1 << 23,), field(10, b"\x01")),
            "name": tensor(7, (1 << 23,), field(8, b"a")),
            "list": tensor(1, (1 << 23, 4), field(5, b"\0\0\x80?")),
        }
    ),
    "inputs": request_of(GOOD) + field(2, b"") * MANY,
    "output names": request_of(GOOD) + field(3, b"") * MANY,
}


def test_memory_of_a_request_is_bounded_by_its_size(saved: pathlib.Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qianmo.pipelines.serve", "--embedded", f"--model_base_path={saved}",
         "--model_name=m", "--port=0", "--rest_api_port=0"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    memory = pathlib.Path(f"/proc/{process.pid}/status")

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", memory.read_text())[1]) >> 10

    with process:
        try:
            target = re.search(r"gRPC (\S+),", process.stdout.readline())[1]
            with grpc.insecure_channel(target) as channel:
                send = channel.unary_unary(PREDICT)
                answer = predict_pb2.PredictResponse.FromString(send(request_of(GOOD), timeout=60))
                assert from_proto(answer.outputs["score"]).tolist() == [6, 7]
                before = peak()
                for name, data in FEW_BYTES_FOR_MUCH.items():
                    with pytest.raises(grpc.RpcError) as caught:
                        send(data, timeout=60)
                    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
                    assert len(caught.value.details()) < 1000
                    assert peak() - before < 100, name  # MiB; of 1.2 MB each
                send(request_of(GOOD), timeout=60)
        finally:
            process.terminate()
            assert process.wait(timeout=60) == 0


def test_all_forms_of_a_tensor_are_read_as_tensorflow_reads_them() -> None:
    arrays = [
        np.array([[1, -2], [3, 2**60]]), np.array([1.5, -2], np.float32), np.array([0.1, 2e300]),
        np.array([1, -128], np.int8), np.array([1, 65535], np.uint16), np.array([-5, 6], np.int32),
        np.array([1, 2**63], np.uint64), np.array([1, 2**31], np.uint32), np.array([True, False]),
        np.array([1.5, -2], np.float16), np.array([1.5, -2], tf.bfloat16.as_numpy_dtype),
        np.array([b"a", b""], object), np.zeros((0, 3), np.float32), np.array(7),
    ]  # fmt: skip
    for array in arrays:
        one = array.ravel()[:1]
        for proto, expected in (
            (to_proto(array), array),
            (tf.make_tensor_proto(array), array),
            # One value for all of them, which is no raw content.
            (tf.make_tensor_proto(one, shape=[3 * len(one)]), np.repeat(one, 3)),
        ):
            request = predict_pb2.PredictRequest()
            request.inputs["x"].CopyFrom(proto)
            read = read_request(request.SerializeToString()).inputs["x"]
            assert read.shape == expected.shape
            assert read.dtype == proto.dtype
            found = from_proto(proto)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(tf.make_ndarray(proto), expected)
            assert found.dtype == (object if expected.dtype == object else expected.dtype)
