"""The gRPC side of the embedded server: the services of tensorflow-serving-api, and health."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import grpc
from absl import logging
from grpc_health.v1 import health_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2, predict_pb2

from qianmo.pipelines.serving.models import DEFAULT_SIGNATURE, Model
from qianmo.pipelines.serving.reading import Reading
from qianmo.pipelines.serving.signatures import ServingError, not_found, refuse
from qianmo.pipelines.serving.tensors import MAX_MESSAGE_BYTES, to_proto
from qianmo.pipelines.serving.wire import Request, read_request

# Requests that may wait for a thread, for each thread; the next one is refused.
QUEUED_PER_THREAD = 8
IDLE_MS = 300_000  # of a connection; clients connect again by themselves
HANDSHAKE_MS = 10_000
HEALTH_SERVICES = ("", "ModelService", "PredictionService")


def find_model(models: Mapping[str, Model], name: str) -> Model:
    """The model of that name.

    Raises:
      ServingError: it is not served; the names that are stand in the message.
    """
    if name not in models:
        raise not_found("model", name, models)
    return models[name]


def _answered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Ends the call with the status of a ServingError; any other error is logged, not shown."""

    @functools.wraps(method)
    def call(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except ServingError as error:
            code, message = error.code, str(error)
        except Exception:
            logging.exception("%s failed", method.__name__)
            code, message = grpc.StatusCode.INTERNAL, "internal error; the server's log tells more."
        context.abort(code, message)

    return call


def _version_number(spec: Any) -> int | None:
    if spec.version_label:
        raise refuse("version labels are not served by the embedded server; give a version number.")
    return spec.version.value if spec.HasField("version") else None


class _PredictionService:
    def __init__(self, models: Mapping[str, Model]) -> None:
        self._models = models

    @_answered
    def predict(self, request: Request, context: grpc.ServicerContext) -> Any:
        spec = request.model_spec
        remaining = context.time_remaining()
        timeout = remaining if remaining is not None and remaining < 1e6 else None
        with find_model(self._models, spec.name).use(_version_number(spec)) as version:
            version.signature(spec.signature_name).check_outputs(request.output_filter)
            outputs = version.predict(spec.signature_name, request.inputs, timeout)
            number = version.number
        response = predict_pb2.PredictResponse()
        for name in request.output_filter or outputs:
            response.outputs[name].CopyFrom(to_proto(outputs[name]))
        response.model_spec.name = spec.name
        response.model_spec.version.value = number
        response.model_spec.signature_name = spec.signature_name or DEFAULT_SIGNATURE
        return response

    @_answered
    def get_model_metadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        if list(request.metadata_field) != ["signature_def"]:
            received = list(request.metadata_field)[:3]
            raise refuse(f"`metadata_field` should be signature_def. Received: {received}")
        model = find_model(self._models, request.model_spec.name)
        return metadata(model, _version_number(request.model_spec))

    @_answered
    def get_model_status(self, request: Any, context: grpc.ServicerContext) -> Any:
        model = find_model(self._models, request.model_spec.name)
        return model.status(_version_number(request.model_spec))


def metadata(model: Model, number: int | None) -> Any:
    """GetModelMetadataResponse with the signatures of the served version."""
    with model.use(number) as version:
        signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=version.signature_def)
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        response.model_spec.name = model.name
        response.model_spec.version.value = version.number
    response.metadata["signature_def"].Pack(signatures)
    return response


class GrpcServer:
    """The gRPC server of some models; its port is bound when it is made.

    Args:
      models: by name; may be filled until `start`.
      host, port: address to bind; port 0 takes a free one.
      num_threads: requests answered at the same time; `QUEUED_PER_THREAD` times as many may wait,
        and one more is refused with RESOURCE_EXHAUSTED.

    Raises:
      RuntimeError: the address cannot be bound.
    """

    def __init__(self, models: Mapping[str, Model], host: str, port: int, num_threads: int) -> None:
        self._is_serving = False
        num_places = num_threads * (1 + QUEUED_PER_THREAD)
        self._reading = Reading(num_threads, num_places)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(num_places, thread_name_prefix="grpc"),
            handlers=self._handlers(_PredictionService(models)),
            interceptors=[self._reading],
            maximum_concurrent_rpcs=num_places,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_connection_idle_ms", IDLE_MS),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
                # Otherwise a second server on the same port would take half of the requests.
                ("grpc.so_reuseport", 0),
            ],
        )
        self.port: int = self._server.add_insecure_port(f"{host}:{port}")

    def _handlers(self, service: _PredictionService) -> list[Any]:
        """The services' methods, each with what reads its request."""
        methods = {
            "tensorflow.serving.PredictionService": {
                "Predict": (service.predict, read_request),
                "GetModelMetadata": (
                    service.get_model_metadata,
                    get_model_metadata_pb2.GetModelMetadataRequest.FromString,
                ),
            },
            "tensorflow.serving.ModelService": {
                "GetModelStatus": (
                    service.get_model_status,
                    get_model_status_pb2.GetModelStatusRequest.FromString,
                )
            },
            "grpc.health.v1.Health": {
                "Check": (self._check_health, health_pb2.HealthCheckRequest.FromString)
            },
        }
        return [
            grpc.method_handlers_generic_handler(
                name,
                {
                    method: grpc.unary_unary_rpc_method_handler(
                        answer, request_deserializer=read, response_serializer=_serialized
                    )
                    for method, (answer, read) in of_service.items()
                },
            )
            for name, of_service in methods.items()
        ]

    @_answered
    def _check_health(self, request: Any, context: grpc.ServicerContext) -> Any:
        if request.service not in HEALTH_SERVICES:
            raise not_found("service", request.service, HEALTH_SERVICES)
        state = health_pb2.HealthCheckResponse
        return state(status=state.SERVING if self._is_serving else state.NOT_SERVING)

    def start(self) -> None:
        """Begins to answer."""
        self._is_serving = True
        self._reading.start()
        self._server.start()

    def stop(self, grace: float) -> None:
        """Takes no more requests, and waits up to `grace` seconds for those under way."""
        self._is_serving = False
        self._server.stop(grace).wait(grace + 1)
        self._reading.stop()


def _serialized(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data
