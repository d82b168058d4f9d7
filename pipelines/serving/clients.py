"""Clients of a model server, over gRPC and REST."""

from __future__ import annotations

import http
import http.client
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from qianmo.export.adapted import ADAPT
from qianmo.export.publishing import MAX_BATCH_SIZE
from qianmo.export.shared_support import REQUEST_ID, new_request_id, of_tasks
from qianmo.export.widths import fitted
from qianmo.pipelines.serving.tensors import (
    MAX_MESSAGE_BYTES,
    STRING,
    Array,
    from_json,
    from_proto,
    numpy_dtype,
    to_json,
    to_proto,
)

TIMEOUT_SECONDS = 30.0
_DOES_NOT_FIT = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)


class RequestError(Exception):
    """A request that the server refused; `code` is the HTTP status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def prepared(inputs: Mapping[str, Array], infos: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays of a signature's types and widths; lists that are shorter are padded.

    A server that merges requests compares types and widths only once it has merged them, and then
    refuses those of others too. The names of inputs it compares before.

    Args:
      inputs: array by input name.
      infos: TensorInfo by input name.

    Raises:
      ValueError: an input of another type or number of axes, or a list that is longer.
    """
    found = {}
    for name, given in inputs.items():
        array = np.asarray(given)
        if name in infos:
            dtype = numpy_dtype(infos[name].dtype)
            if array.dtype != dtype and not (dtype == STRING and array.dtype.kind in "SU"):
                wanted = "string" if dtype == STRING else str(dtype)
                raise ValueError(f"input `{name}` should be {wanted}. Received: {array.dtype}")
            array = fitted(name, array, tf.TensorShape(infos[name].tensor_shape).as_list())
        found[name] = array
    return found


def parts(inputs: Mapping[str, Array], most: int) -> Iterator[dict[str, Array]]:
    """Cuts inputs into parts of at most `most` rows."""
    size = max((len(array) for array in inputs.values() if array.ndim), default=0)
    if size <= most:
        yield dict(inputs)
        return
    for first in range(0, size, most):
        yield {name: array[first : first + most] for name, array in inputs.items()}


def joined(answers: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Outputs of the parts of a request, one behind the other."""
    if len(answers) == 1:
        return dict(answers[0])
    return {name: np.concatenate([part[name] for part in answers]) for name in answers[0]}


class _Signatures:
    """What a model's signatures ask for, read from the server once, and again if it changed."""

    def __init__(self, read: Callable[[int | None], dict[str, Any]]) -> None:
        self._read = read
        self._known: dict[int | None, dict[str, Any]] = {}

    def inputs(self, name: str, version: int | None) -> dict[str, Any]:
        """TensorInfo by input name; none for a signature that is not there."""
        known = self._get(version)
        return dict(known[name].inputs) if name in known else {}

    def outputs(self, name: str, version: int | None) -> dict[str, Any]:
        """TensorInfo by output name."""
        return dict(self._get(version)[name].outputs)

    def _get(self, version: int | None) -> dict[str, Any]:
        known = self._known.get(version)
        if known is None:
            known = self._known[version] = self._read(version)
        return known

    def ask(
        self,
        name: str,
        version: int | None,
        ask: Callable[[Mapping[str, Any]], dict[str, Array]],
    ) -> dict[str, Array]:
        """Calls `ask` with the signature's inputs, and again if these have changed meanwhile."""
        infos = self.inputs(name, version)
        try:
            return ask(infos)
        except (ValueError, grpc.RpcError, RequestError) as error:
            if isinstance(error, grpc.RpcError) and error.code() not in _DOES_NOT_FIT:
                raise
            if isinstance(error, RequestError) and error.code != http.HTTPStatus.BAD_REQUEST:
                raise
            self._known.pop(version, None)
            fresh = self.inputs(name, version)
            if fresh == infos:
                raise
        return ask(fresh)


class Client:
    """Asks one model over gRPC.

    Lists that are shorter than the signature's are padded. A request of more rows than the server
    merges is split, and its answers are joined.

    Args:
      target: "host:port".
      model_name: the model's name there.
      max_batch_size: most rows of a request, as in the server's batching file.

    Raises:
      ValueError: from its methods: an input of another type than the signature's, or wider.
      grpc.RpcError: from its methods, with the server's status code and details.
    """

    def __init__(
        self, target: str, model_name: str, *, max_batch_size: int = MAX_BATCH_SIZE
    ) -> None:
        self._model_name = model_name
        self._max_batch_size = max_batch_size
        self._channel = grpc.insecure_channel(
            target,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ],
        )
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._signatures = _Signatures(self.signature_defs)

    def predict(
        self,
        inputs: Mapping[str, Array],
        signature_name: str = "serving_default",
        version: int | None = None,
    ) -> dict[str, Array]:
        """Outputs by name for inputs by name; strings are arrays of bytes objects.

        Without a version, the server's newest one answers.
        """

        def ask(infos: Mapping[str, Any]) -> dict[str, Array]:
            rows = prepared(inputs, infos)
            cut = parts(rows, self._max_batch_size)
            return joined([self._predict(part, signature_name, version) for part in cut])

        return self._signatures.ask(signature_name, version, ask)

    def predict_adapted(
        self,
        inputs: Mapping[str, Array],
        task_id: str,
        support: Mapping[Any, Mapping[str, Array]],
        signature_name: str = "adapted_by_request",
        version: int | None = None,
    ) -> dict[str, Array]:
        """Outputs by name, of towers that adapt to support which comes in the request.

        Each task's support is sent once, by the first of its rows.

        Args:
          inputs: the raw features, the task's column, and `adapt` where some rows should not.
          task_id: name of the task's column.
          support: task -> columns of its support rows, oldest first: what the signature names
            `support_<column>`. The newest are taken where there are more than it has room for. A
            task that is not there gets the plain score, with a status.
          signature_name: a signature that takes support.
          version: default: the server's newest one.
        """
        rows = {name: np.asarray(array) for name, array in inputs.items()}
        rows.setdefault(ADAPT, np.ones(len(rows[task_id]), bool))

        def ask(infos: Mapping[str, Any]) -> dict[str, Array]:
            specs = {
                name: tf.TensorSpec(info.tensor_shape, tf.as_dtype(info.dtype))
                for name, info in infos.items()
            }
            answers = []
            # Each part brings what it needs: rows that are merged apart share nothing.
            for part in parts(prepared(rows, infos), self._max_batch_size):
                first, own = of_tasks(specs, part[task_id], support)
                size = len(part[task_id])
                # Rows that bring support come first, so that the zeros of the others do not travel.
                order = np.concatenate([first, np.setdiff1d(np.arange(size), first)])
                given = {name: column[order] for name, column in part.items()}
                given[REQUEST_ID] = new_request_id(size)
                answer = self._predict({**given, **own}, signature_name, version, size)
                place = np.argsort(order)
                answers.append({name: column[place] for name, column in answer.items()})
            return joined(answers)

        return self._signatures.ask(signature_name, version, ask)

    def _predict(
        self,
        inputs: Mapping[str, Array],
        signature_name: str,
        version: int | None,
        rows: int | None = None,
    ) -> dict[str, Array]:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self._model_name
        request.model_spec.signature_name = signature_name
        if version is not None:
            request.model_spec.version.value = version
        for name, array in inputs.items():
            request.inputs[name].CopyFrom(to_proto(array, rows))
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

    Lists and large requests are treated as by `Client`.

    Args:
      target: "host:port".
      model_name: the model's name there.
      max_batch_size: most rows of a request, as in the server's batching file.

    Raises:
      ValueError: from its methods: an input of another type than the signature's, or wider.
      RequestError: from its methods, when the server refuses.
      OSError: from its methods, when the server cannot be reached.
    """

    def __init__(
        self, target: str, model_name: str, *, max_batch_size: int = MAX_BATCH_SIZE
    ) -> None:
        self._path = f"/v1/models/{model_name}"
        self._max_batch_size = max_batch_size
        self._connection = http.client.HTTPConnection(target, timeout=TIMEOUT_SECONDS)
        self._signatures = _Signatures(lambda version: self.signature_defs())

    def predict(
        self, inputs: Mapping[str, Array], signature_name: str = "serving_default"
    ) -> dict[str, Array]:
        """Outputs by name for inputs by name; strings are arrays of bytes objects."""

        def ask(infos: Mapping[str, Any]) -> dict[str, Array]:
            rows = prepared(inputs, infos)
            cut = parts(rows, self._max_batch_size)
            return joined([self._predict(part, signature_name) for part in cut])

        return self._signatures.ask(signature_name, None, ask)

    def _predict(self, inputs: Mapping[str, Array], signature_name: str) -> dict[str, Array]:
        columns = {name: to_json(array) for name, array in inputs.items()}
        body = json.dumps({"signature_name": signature_name, "inputs": columns})
        found = self._ask("POST", f"{self._path}:predict", body)["outputs"]
        # JSON tells neither the type of a number nor, when it is the only one, an output's name.
        infos = self._signatures.outputs(signature_name, None)
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
