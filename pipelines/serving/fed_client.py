"""The client of the form `fed`: it makes the vectors that any TensorFlow Serving scores."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

from qianmo.export.publishing import next_version
from qianmo.export.saved_model import DEFAULT, STATUS
from qianmo.export.widths import fitted
from qianmo.ops.library import library
from qianmo.pipelines.serving.clients import Client
from qianmo.pipelines.serving.tensors import Array


class FedClient:
    """Asks a model of the form `fed` for the scores of raw rows, over gRPC.

    Vectors are looked up in this process, by the graph that was exported beside the model: in the
    embedding store that it names, a folder or a Redis, or in tables of its own. The server is any.
    It is asked for the version of the same number, so that vectors meet the graph that they are
    for; once the server has another one instead, the newest lookup graph is taken.

    Args:
      target: "host:port".
      model_name: the model's name there.
      lookup: folder of the lookup graph's versions, `<model_base_path>_lookup`.

    Raises:
      ValueError: there is no version; from its methods: a list that is longer than the signature's.
      grpc.RpcError: from its methods, with the server's status code and details.
      tf.errors.OpError: from its methods, when vectors cannot be had.

    Example::

        client = FedClient("127.0.0.1:8500", "mine", "served/mine_lookup")
        scores = client.predict({"user_id": np.array([286]), "price": np.array([12.5])})
    """

    def __init__(self, target: str, model_name: str, lookup: str | os.PathLike[str]) -> None:
        self._base = pathlib.Path(lookup)
        self._client = Client(target, model_name)
        library()  # the lookup graph may hold its op
        self._version = 0
        self._load()

    def _load(self) -> bool:
        """Takes the newest lookup graph; whether it is another one."""
        newest = next_version(self._base) - 1
        if not newest:
            raise ValueError(
                f"{self._base} should hold a folder named by a version number, the lookup graph of "
                "a `fed` export. There is none."
            )
        if newest == self._version:
            return False
        graph = tf.saved_model.load(str(self._base / str(newest)))
        signatures = self._client.signature_defs(newest)
        # Both or none: vectors meet the graph that they are for. Store and tables live as long as
        # the loaded object.
        self._graph, self._signatures, self._version = graph, signatures, newest
        self._lookup = graph.signatures[DEFAULT]
        self._specs = self._lookup.structured_input_signature[1]
        return True

    def signature_defs(self) -> dict[str, Any]:
        """SignatureDef by name, of the server's model."""
        return self._signatures

    def inputs(self, signature_name: str = DEFAULT) -> list[str]:
        """Names of the raw columns that `predict` takes."""
        vectors = self._lookup.structured_outputs
        scored = self._signatures[signature_name].inputs
        raw = [name for name in scored if name not in vectors and self._domain(name) is None]
        return [*self._specs, *raw]

    def _domain(self, name: str) -> str | None:
        """The raw feature behind the server's input `<domain>_id`."""
        feature = name.removesuffix("_id")
        if feature == name or feature not in self._lookup.structured_outputs:
            return None
        kinds = {s.inputs[name].dtype for s in self._signatures.values() if name in s.inputs}
        return None if types_pb2.DT_FLOAT in kinds else feature  # a dense feature of that name

    def predict(
        self, inputs: Mapping[str, Array], signature_name: str = DEFAULT
    ) -> dict[str, Array]:
        """Outputs by name for raw features by name; `status` has the bits of both graphs."""
        try:
            return self._predict(inputs, signature_name)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.NOT_FOUND or not self._load():
                raise
            return self._predict(inputs, signature_name)

    def _predict(self, inputs: Mapping[str, Array], signature_name: str) -> dict[str, Array]:
        raw = {}
        for name, spec in self._specs.items():
            column = fitted(name, np.asarray(inputs[name]), spec.shape.as_list())
            raw[name] = tf.constant(column, spec.dtype)
        found = self._lookup(**raw)
        vectors = {name: value.numpy() for name, value in found.items()}
        status = vectors.pop(STATUS)
        fed = {}
        for name in self._signatures[signature_name].inputs:
            fed[name] = vectors[name] if name in vectors else inputs[self._domain(name) or name]
        answers = self._client.predict(fed, signature_name, self._version)
        answers[STATUS] = np.bitwise_or(answers[STATUS], status)
        return answers

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()
