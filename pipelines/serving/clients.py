"""Clients of a model server, over gRPC and REST."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from qianmo.pipelines.serving.tensors import (
    MAX_MESSAGE_BYTES,
    Array,
    from_json,
    from_proto,
    numpy_dtype,
    to_json,
    to_proto,
)

TIMEOUT_SECONDS = 30.0


class RequestError(Exception):
    """A request that the server refused; `code` is the HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Client:
    """Asks one model over gRPC.

    Args:
      target: "host:port".
      model_name: the model's name there.

    Raises:
      grpc.RpcError: from its methods, with the server's status code and details.
    """

    def __init__(self, target: str, model_name: str) -> None:
        self._model_name = model_name
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)

    def predict(
        self,
        inputs: Mapping[str, Array],
        signature_name: str = "serving_default",
        version: int | None = None,
    ) -> dict[str, Array]:
        """Outputs by name for inputs by name; strings are arrays of bytes objects.

        Without a version, the server's newest one answers.
        """
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self._model_name
        request.model_spec.signature_name = signature_name
        if version is not None:
            request.model_spec.version.value = version
        for name, array in inputs.items():
            request.inputs[name].CopyFrom(to_proto(np.asarray(array)))
        response = self._stub.Predict(request, timeout=TIMEOUT_SECONDS)
        return {name: from_proto(proto) for name, proto in response.outputs.items()}

    def signature_defs(self, version: int | None = None) -> dict[str, Any]:
        """SignatureDef by name, of a version or the server's newest one."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = self._model_name
        if version is not None:
            request.model_spec.version.value = version
        response = self._stub.GetModelMetadata(request, timeout=TIMEOUT_SECONDS)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return dict(signatures.signature_def)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()


class RestClient:
    """Asks one model over REST, on one connection that stays open; not for several threads.

    Args:
      target: "host:port".
      model_name: the model's name there.

    Raises:
      RequestError: from its methods, when the server refuses.
      OSError: from its methods, when the server cannot be reached.
    """

    def __init__(self, target: str, model_name: str) -> None:
        self._path = f"/v1/models/{model_name}"
        self._connection = http.client.HTTPConnection(target, timeout=TIMEOUT_SECONDS)
        self._signature_defs: dict[str, Any] | None = None

    def predict(
        self, inputs: Mapping[str, Array], signature_name: str = "serving_default"
    ) -> dict[str, Array]:
        """Outputs by name for inputs by name; strings are arrays of bytes objects."""
        columns = {name: to_json(np.asarray(array)) for name, array in inputs.items()}
        body = json.dumps({"signature_name": signature_name, "inputs": columns})
        # JSON tells neither the type of a number nor, when it is the only one, an output's name.
        if self._signature_defs is None:
            self._signature_defs = self.signature_defs()
        found = self._ask("POST", f"{self._path}:predict", body)["outputs"]
        infos = self._signature_defs[signature_name].outputs
        if len(infos) == 1:
            found = {next(iter(infos)): found}
        return {
            name: from_json(value, numpy_dtype(infos[name].dtype)) for name, value in found.items()
        }

    def signature_defs(self) -> dict[str, Any]:
        """SignatureDef by name."""
        found = self._ask("GET", f"{self._path}/metadata")["metadata"]["signature_def"]
        return {
            name: json_format.ParseDict(
                value, meta_graph_pb2.SignatureDef(), ignore_unknown_fields=True
            )
            for name, value in found["signature_def"].items()
        }

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        headers = {"Content-Type": "application/json"} if body else {}
        was_open = self._connection.sock is not None
        try:
            self._connection.request(method, path, body, headers)
            response = self._connection.getresponse()
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            self._connection.close()
            if not was_open:
                raise
            # The server ends connections that were idle for long; that is no failure.
            return self._ask(method, path, body)
        except (OSError, http.client.HTTPException):
            self._connection.close()  # a late answer must not be taken for the next one
            raise
        content = response.read()
        if response.status != http.HTTPStatus.OK:
            try:
                message = json.loads(content)["error"]
            except (ValueError, KeyError, TypeError):
                message = content.decode(errors="replace")
            raise RequestError(response.status, message)
        return json.loads(content)

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()
