"""The REST side of the embedded server: the paths and JSON forms of TF Serving."""

from __future__ import annotations

import collections
import contextlib
import http
import http.server
import io
import json
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import grpc
from absl import logging
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2

from qianmo.pipelines.serving.grpc_api import find_model, metadata
from qianmo.pipelines.serving.models import Model
from qianmo.pipelines.serving.signatures import ServingError, Signature, refuse
from qianmo.pipelines.serving.tensors import MAX_MESSAGE_BYTES, Array, from_json, to_json

MAX_BODY_BYTES = 16 << 20
# JSON read into memory takes many times its bytes, so few bodies are read into it at a time.
MAX_RUNNING = 8
TIMEOUT_SECONDS = 30.0
MOVE_SECONDS = 10.0  # in which a request should arrive, and its answer leave
HURRIED_SECONDS = 1.0  # after it such a connection gives way to a new one, if there is no place

_PATH = re.compile(
    r"/v1/models/(?P<name>[^/:]+)(?:/versions/(?P<version>[0-9]{1,18}))?(?P<verb>:predict|/metadata)?"
)
# What TF Serving answers; all others are 500.
_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def predict(model: Model, version_number: int | None, body: Any) -> dict[str, Any]:
    """Answers the JSON body of a predict request: `instances` (rows) or `inputs` (columns).

    Raises:
      ServingError: the body or an input in it is wrong.
    """
    if not isinstance(body, dict):
        raise refuse("the body should be a JSON object.")
    unknown = body.keys() - {"signature_name", "instances", "inputs"}
    if unknown:
        raise refuse(f"the body has an unknown key `{min(unknown)}`.")
    if ("instances" in body) == ("inputs" in body):
        raise refuse("the body should hold either `instances` or `inputs`.")
    name = body.get("signature_name", "")
    if not isinstance(name, str):
        raise refuse(f"`signature_name` should be a string. Received: {name!r}")
    with model.use(version_number) as version:
        signature = version.signature(name)
        if "inputs" in body:
            outputs = signature(
                _arrays(signature, _columns(signature, body["inputs"])), TIMEOUT_SECONDS
            )
            columns = {name: _json(name, array) for name, array in outputs.items()}
            return {"outputs": columns if len(columns) > 1 else next(iter(columns.values()))}
        rows = _rows(signature, body["instances"])
        outputs = signature(_arrays(signature, rows), TIMEOUT_SECONDS)
    sizes = {name: array.shape[:1] for name, array in outputs.items()}
    if len(set(sizes.values())) > 1 or () in sizes.values():
        raise refuse("the outputs do not have one value for each row; use `inputs`.")
    columns = {name: _json(name, array) for name, array in outputs.items()}
    if len(columns) == 1:
        return {"predictions": next(iter(columns.values()))}
    rows_out = zip(*columns.values(), strict=True)
    return {"predictions": [dict(zip(columns, row, strict=True)) for row in rows_out]}


def _json(name: str, array: Array) -> Any:
    return to_json(array, as_bytes=name.endswith("_bytes"))


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() != {"b64"}


def _only_input(signature: Signature) -> str:
    if len(signature.inputs) != 1:
        names = ", ".join(f"`{name}`" for name in signature.inputs)
        raise refuse(f"each of the inputs should be given by its name: {names}")
    return next(iter(signature.inputs))


def _columns(signature: Signature, inputs: Any) -> dict[str, Any]:
    columns = inputs if _is_named(inputs) else {_only_input(signature): inputs}
    signature.check_names(columns, "`inputs`")
    return columns


def _rows(signature: Signature, instances: Any) -> dict[str, Any]:
    if not isinstance(instances, list) or not instances:
        raise refuse("`instances` should be a list of at least one row.")
    if not _is_named(instances[0]):
        return {_only_input(signature): instances}
    for number, row in enumerate(instances):
        if not isinstance(row, dict):
            raise refuse(f"`instances[{number}]` should be an object, as the first row is.")
        if row.keys() != signature.inputs.keys():
            signature.check_names(row, f"`instances[{number}]`")
    return {name: [row[name] for row in instances] for name in signature.inputs}


def _arrays(signature: Signature, values: Mapping[str, Any]) -> dict[str, Array]:
    arrays = {}
    for name, value in values.items():
        try:
            arrays[name] = from_json(value, signature.inputs[name].dtype)
        except ValueError as error:
            raise refuse(f"input `{name}`: {error}") from error
    return arrays


def _message_json(message: Any) -> Any:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


# What a connection does: it waits for a request; a request arrives, or an answer leaves; a request
# is answered.
_IDLE, _MOVING, _ANSWERED = range(3)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _HttpServer
    protocol_version = "HTTP/1.1"
    server_version = "qianmo"
    sys_version = ""
    timeout = TIMEOUT_SECONDS
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def handle_one_request(self) -> None:
        """Waits for a request, which the server may end; then reads and answers it."""
        try:
            is_there = cast(io.BufferedReader, self.rfile).peek(1)
        except (ConnectionError, TimeoutError):
            is_there = b""
        if not is_there:
            self.close_connection = True
            return
        self.server.note(self.connection, _MOVING)
        super().handle_one_request()
        self.server.note(self.connection, _IDLE)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.close_connection = True
        self._reply(code, {"error": message or http.HTTPStatus(code).phrase})

    def log_message(self, format: str, *args: Any) -> None:
        logging.debug(format, *args)

    def _answer(self) -> None:
        with self.server.answering():
            try:
                body = self._body()
                self.server.note(self.connection, _ANSWERED)
                status, value = 200, self._value(body)
            except ServingError as error:
                status, value = _HTTP_STATUS.get(error.code, 500), {"error": str(error)}
            except _BadRequest as error:
                status, value = error.status, {"error": str(error)}
                self.close_connection = True  # the rest of the body has not been read
            except (ConnectionError, TimeoutError):
                self.close_connection = True
                return
            except Exception:
                logging.exception("%s %s failed", self.command, self.path)
                status, value = 500, {"error": "internal error; the server's log tells more."}
            self._reply(status, value)

    def _body(self) -> bytes:
        if "Transfer-Encoding" in self.headers:
            raise _BadRequest(411, "a request should give its Content-Length.")
        given = self.headers.get("Content-Length", "0")
        if not re.fullmatch(r"[0-9]{1,18}", given):
            raise _BadRequest(400, f"`Content-Length` should be a number. Received: {given!r}")
        length = int(given)
        if length > MAX_BODY_BYTES:
            # Many clients read no answer before they have sent all, so a little more is taken.
            left = length if length <= MAX_MESSAGE_BYTES else 0
            while left and (part := self.rfile.read(min(left, 1 << 16))):
                left -= len(part)
            raise _BadRequest(
                413, f"a body should hold <= {MAX_BODY_BYTES} bytes. Received: {length}"
            )
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionError("the client closed before the body's end")
        return body

    def _value(self, body: bytes) -> Any:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        match = _PATH.fullmatch(path)
        wanted = "POST" if path.endswith(":predict") else "GET"
        if match is None or self.command != wanted:
            raise ServingError(
                grpc.StatusCode.NOT_FOUND,
                f"{self.command} {path} is not served. Served: POST /v1/models/NAME:predict, "
                "GET /v1/models/NAME, GET /v1/models/NAME/metadata; each also with "
                "/versions/NUMBER after NAME.",
            )
        model = find_model(self.server.models, match["name"])
        number = int(match["version"]) if match["version"] else None
        if match["verb"] == ":predict":
            with self.server.running():
                try:
                    parsed = json.loads(body)
                except (ValueError, RecursionError) as error:
                    raise refuse(f"the body should be JSON: {error}") from error
                return predict(model, number, parsed)
        if match["verb"] is None:
            return _message_json(model.status(number))
        response = metadata(model, number)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return {
            "model_spec": _message_json(response.model_spec),
            "metadata": {"signature_def": _message_json(signatures)},
        }

    def _reply(self, status: int, value: Any) -> None:
        self.server.note(self.connection, _MOVING)
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection or self.server.is_stopping:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


class _BadRequest(Exception):
    """A request whose body is not read."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _HttpServer(http.server.ThreadingHTTPServer):
    """One thread for each connection, up to a bound, and a stop that lets requests finish.

    A connection whose request is answered keeps its place. One that is idle, or whose client is
    slow to send or to read, gives way to a new one when all places are taken.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, models: Mapping[str, Model], address: tuple[str, int], num: int) -> None:
        super().__init__(address, _Handler)
        self.models = models
        self.is_stopping = False
        self._free = threading.BoundedSemaphore(num)
        self._places = threading.BoundedSemaphore(MAX_RUNNING)
        self._refused: collections.deque[socket.socket] = collections.deque(maxlen=64)
        self._changed = threading.Condition()
        self._connections: dict[socket.socket, tuple[int, float]] = {}  # what, and since when
        self._num_answering = 0

    def note(self, connection: socket.socket, what: int) -> None:
        """Notes what a connection does from now on."""
        with self._changed:
            if connection in self._connections:
                self._connections[connection] = (what, time.monotonic())

    def service_actions(self) -> None:
        """Ends connections whose clients are too slow; runs ten times a second."""
        self._end(lambda what, seconds: what == _MOVING and seconds > MOVE_SECONDS)

    def _end(self, chosen: Callable[[int, float], bool], most: int | None = None) -> int:
        """Ends connections, those that have waited for longest first; returns how many."""
        with self._changed:
            now = time.monotonic()
            waits = sorted(self._connections.items(), key=lambda item: item[1][1])
            ended = [one for one, (what, since) in waits if chosen(what, now - since)][:most]
            for connection in ended:
                del self._connections[connection]
        for connection in ended:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        return len(ended)

    def _make_room(self) -> bool:
        """Takes a place for a new connection; whether there was one."""
        if self._free.acquire(blocking=False):
            return True
        ended = self._end(
            lambda what, seconds: what == _IDLE or (what == _MOVING and seconds > HURRIED_SECONDS),
            most=1,
        )
        # The one that ended leaves its place at once.
        return bool(ended) and self._free.acquire(timeout=1.0)

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Counts the requests under way."""
        with self._changed:
            self._num_answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_answering -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Waits for one of the places to run in.

        Raises:
          ServingError: none got free.
        """
        if not self._places.acquire(timeout=TIMEOUT_SECONDS):
            raise ServingError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests are running.")
        try:
            yield
        finally:
            self._places.release()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._make_room():
            with contextlib.suppress(OSError):
                request.setblocking(False)
                request.sendall(
                    b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\n"
                    b"Content-Length: 33\r\nConnection: close\r\n\r\n"
                    b'{"error": "too many connections"}'
                )
            # Closed when others push it out: closed at once, it would break the client's sending.
            self._refused.append(request)
            return
        with self._changed:
            self._connections[request] = (_IDLE, time.monotonic())
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._changed:
                self._connections.pop(request, None)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logging.debug("a connection broke", exc_info=True)

    def stop(self, grace: float) -> None:
        end = time.monotonic() + grace
        self.is_stopping = True
        self.shutdown()
        self.server_close()
        with self._changed:
            while self._num_answering and time.monotonic() < end:
                self._changed.wait(end - time.monotonic())
        self._end(lambda what, seconds: True)  # those kept alive would wait for their time-out


class RestServer:
    """The REST server of some models; its port is bound when it is made.

    Args:
      models: by name; may be filled until `start`.
      host, port: address to bind; port 0 takes a free one.
      num_threads: connections held at the same time; one more is refused with status 429.

    Raises:
      OSError: the address cannot be bound.
    """

    def __init__(self, models: Mapping[str, Model], host: str, port: int, num_threads: int) -> None:
        self._server = _HttpServer(models, (host, port), num_threads)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="rest", daemon=True
        )
        self.port: int = self._server.server_address[1]

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Takes no more requests, and waits up to `grace` seconds for those under way."""
        if self._thread.is_alive():
            self._server.stop(grace)
        else:
            self._server.server_close()
