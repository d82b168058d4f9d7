r"""Asks a model server for the scores of rows in a file, and the clients for doing so.

    python -m qianmo.pipelines.predict --server=127.0.0.1:8500 --model_name=ranker \
        --data=test.parquet --schema=MODEL_DIR/recipe.json --rows=1000 --output=scores.jsonl

The clients speak to any TensorFlow Serving, over gRPC by the stubs of tensorflow-serving-api.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import grpc
import numpy as np
from absl import flags
from google.protobuf import json_format
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from qianmo.layers.features import Schema
from qianmo.pipelines import program, readers
from qianmo.pipelines.serving_tensors import (
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


def batches(
    blocks: Iterable[Mapping[str, Array]], names: Iterable[str], rows: int, batch_size: int
) -> Iterator[dict[str, Array]]:
    """Cuts blocks into the batches of their first `rows` rows, with the columns `names`.

    Args:
      blocks: arrays by column name, of any number of rows each.
      names: columns to keep.
      rows: rows in all; 0 for every row.
      batch_size: most rows of a batch; the last one of a block may be smaller.

    Raises:
      ValueError: a column is not there.
    """
    left = rows or sys.maxsize
    names = list(names)
    for block in blocks:
        for name in names:
            if name not in block:
                raise ValueError(
                    f"the model's input `{name}` is not a column of the schema. "
                    f"Received: {', '.join(block)}"
                )
        size = min(left, len(next(iter(block.values()))))
        for begin in range(0, size, batch_size):
            end = min(begin + batch_size, size)
            yield {name: block[name][begin:end] for name in names}
        left -= size
        if not left:
            return


def write_scores(file: IO[str], outputs: Mapping[str, Array]) -> None:
    """Writes one JSON object a row: the value of each output by its name."""
    for row in zip(*(to_json(array) for array in outputs.values()), strict=True):
        file.write(json.dumps(dict(zip(outputs, row, strict=True))) + "\n")


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_string("server", "127.0.0.1:8500", "host:port, of REST with --rest.")
    flags.DEFINE_string("model_name", "model", "Name of the model on the server.")
    flags.DEFINE_string("signature_name", "serving_default", "What to ask of the model.")
    flags.DEFINE_string("data", None, "Rows to score: a file, folder or glob.", required=True)
    flags.DEFINE_string(
        "schema",
        None,
        "JSON of the rows' schema, or a model directory's recipe.json.",
        required=True,
    )
    flags.DEFINE_integer("rows", 0, "Score the first rows only; 0 for all.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 256, "Rows of a request.", lower_bound=1)
    flags.DEFINE_bool("rest", False, "Ask over REST instead of gRPC.")
    flags.DEFINE_string(
        "lookup",
        None,
        "Of a model of the form `fed`: its folder <model_base_path>_lookup, whose graph makes the "
        "vectors here, from its embedding store.",
    )
    flags.DEFINE_string("output", "-", "JSON lines file to write, one line a row; - prints them.")


def _client(values: Any) -> Any:
    if values.rest:
        if values.lookup:
            raise ValueError("--lookup asks over gRPC; give it without --rest.")
        return RestClient(values.server, values.model_name)
    if values.lookup:
        # It loads TensorFlow, which takes a while.
        from qianmo.pipelines.fed_client import FedClient

        return FedClient(values.server, values.model_name, values.lookup)
    return Client(values.server, values.model_name)


def write_predictions(values: Any) -> None:
    """Asks for the scores of the rows that the flags name, and writes them where they say.

    Raises:
      ValueError: the schema or the data are wrong, or do not fit the model.
      grpc.RpcError, RequestError, OSError: the server refuses or cannot be reached.
    """
    try:
        text = pathlib.Path(values.schema).read_text(encoding="utf-8")
        config = json.loads(text)
        schema = Schema.from_config(config.get("schema", config))
    except (OSError, ValueError) as error:
        raise ValueError(f"{values.schema} should be the JSON of a schema: {error}") from error
    with contextlib.closing(_client(values)) as client:
        signatures = client.signature_defs()
        if values.signature_name not in signatures:
            known = ", ".join(name for name in signatures if not name.startswith("__"))
            raise ValueError(
                f"the model has no signature `{values.signature_name}`. Its signatures: {known}"
            )
        names = signatures[values.signature_name].inputs
        if values.lookup:
            names = client.inputs(values.signature_name)
        found = batches(
            readers.blocks(schema, values.data, targets=False),
            names,
            values.rows,
            values.batch_size,
        )
        scores = (client.predict(inputs, values.signature_name) for inputs in found)
        if values.output == "-":
            for answer in scores:
                write_scores(sys.stdout, answer)
            return
        # Under its own name only when it is whole.
        temporary = pathlib.Path(f"{values.output}.writing")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for answer in scores:
                    write_scores(file, answer)
            temporary.replace(values.output)
        finally:
            temporary.unlink(missing_ok=True)


def run(_: list[str]) -> None:
    """Prints or writes the scores."""
    values = flags.FLAGS
    try:
        write_predictions(values)
    except grpc.RpcError as error:
        sys.exit(f"error: {values.server}: {error.code().name}: {error.details()}")
    except RequestError as error:
        sys.exit(f"error: {values.server}: HTTP {error.code}: {error}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Entry of `qianmo-predict`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
