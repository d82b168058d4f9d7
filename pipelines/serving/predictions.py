"""Scores of the rows of a file, asked of a model server."""

from __future__ import annotations

import contextlib
import http.client
import json
import pathlib
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import grpc

from qianmo.export.publishing import writing
from qianmo.layers.schema import Schema
from qianmo.pipelines import plugins
from qianmo.pipelines.data import readers
from qianmo.pipelines.serving.clients import Client, RequestError, RestClient
from qianmo.pipelines.serving.tensors import Array, to_json


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


def _client(values: Any) -> Any:
    if values.rest:
        if values.lookup:
            raise ValueError("--lookup asks over gRPC; give it without --rest.")
        return RestClient(values.server, values.model_name)
    if values.lookup:
        # It loads TensorFlow, which takes a while.
        from qianmo.pipelines.serving.fed_client import FedClient

        return FedClient(values.server, values.model_name, values.lookup)
    return Client(values.server, values.model_name)


@contextlib.contextmanager
def _named(server: str) -> Iterator[None]:
    """Adds the server's address to what it refuses, or to what the network does.

    Raises:
      ConnectionError: of one sentence.
    """
    try:
        yield
    except grpc.RpcError as error:
        text = f"{error.code().name}: {error.details()}"
    except RequestError as error:
        text = f"HTTP {error.code}: {error}"
    except (ConnectionError, TimeoutError, socket.gaierror, http.client.HTTPException) as error:
        text = str(error) or type(error).__name__
    else:
        return
    raise ConnectionError(f"--server={server}: {text.rstrip('.')}.")


def write_predictions(values: Any) -> None:
    """Asks for the scores of the rows that the flags name, and writes them where they say.

    Raises:
      ValueError: the schema or the data are wrong, or do not fit the model.
      ConnectionError: the server refuses or cannot be reached.
      OSError: the output cannot be written.
    """
    try:
        text = pathlib.Path(values.schema).read_text(encoding="utf-8")
        config = json.loads(text)
        if not isinstance(config, dict):
            raise ValueError("it is no mapping.")
        schema = Schema.from_config(config.get("schema", config))
    except (OSError, ValueError) as error:
        raise ValueError(f"{values.schema} should be the JSON of a schema: {error}") from error
    plugins.load(config.get("plugins", ()))
    with _named(values.server), contextlib.closing(_client(values)) as client:
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
        with writing(pathlib.Path(values.output)) as file:
            for answer in scores:
                write_scores(file, answer)
