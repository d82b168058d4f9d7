"""Signatures of a loaded model: what they take, what they refuse and how they run.

Every refusal is a `ServingError` with the status code that TF Serving gives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.client import pywrap_tf_session

from qianmo.export.publishing import MAX_BATCH_SIZE
from qianmo.export.widths import shown
from qianmo.pipelines.serving.tensors import STRING, Array, from_fields, numpy_dtype
from qianmo.pipelines.serving.wire import Tensor

_CODES = {code.value[0]: code for code in grpc.StatusCode}


class ServingError(Exception):
    """A request that is refused: the gRPC status code and one sentence for the client."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _listed(names: Collection[object]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def refuse(message: str) -> ServingError:
    """The error for input that is wrong."""
    return ServingError(grpc.StatusCode.INVALID_ARGUMENT, message)


def not_found(kind: str, name: object, known: Collection[object]) -> ServingError:
    """The error for a name that is not served; it lists those that are."""
    message = f"{kind} `{name}` is not served. Served: {_listed(known)}"
    return ServingError(grpc.StatusCode.NOT_FOUND, message)


@contextlib.contextmanager
def _of_input(name: str) -> Iterator[None]:
    """Names the input in the refusal of a tensor."""
    try:
        yield
    except ValueError as error:
        raise refuse(f"input `{name}`: {error}") from error


class TensorSpec:
    """Type and shape of one input or output of a signature."""

    def __init__(self, info: Any) -> None:
        self.dtype = numpy_dtype(info.dtype)
        dims = [dim.size if dim.size >= 0 else None for dim in info.tensor_shape.dim]
        self.shape = None if info.tensor_shape.unknown_rank else dims

    def check(self, name: str, dtype: np.dtype[Any], shape: Sequence[int]) -> None:
        """Refuses another type or shape."""
        if dtype != self.dtype:
            wanted, received = (
                "string" if each == STRING else str(each) for each in (self.dtype, dtype)
            )
            raise refuse(f"input `{name}` should be {wanted}. Received: {received}")
        if self.shape is not None and (
            len(self.shape) != len(shape)
            or any(n not in (None, m) for n, m in zip(self.shape, shape, strict=True))
        ):
            raise refuse(
                f"input `{name}` should have shape {shown(self.shape)}. Received: {list(shape)}"
            )

    @property
    def is_batched(self) -> bool:
        """Whether its first axis counts the rows of a request."""
        return self.shape is None or (len(self.shape) > 0 and self.shape[0] is None)


class Signature:
    """One function of a loaded version: arrays by input name in, arrays by output name out."""

    def __init__(self, session: Any, definition: Any) -> None:
        self.inputs = {name: TensorSpec(info) for name, info in definition.inputs.items()}
        self.outputs = {name: TensorSpec(info) for name, info in definition.outputs.items()}
        self._session = session
        self._feeds, self._fetches = (
            [session.graph.get_tensor_by_name(info.name)._as_tf_output() for info in infos.values()]
            for infos in (definition.inputs, definition.outputs)
        )

    def check_names(self, names: Collection[str], where: str = "the request") -> None:
        """Refuses names that are not exactly the inputs of the signature."""
        for name in self.inputs:
            if name not in names:
                raise refuse(f"input `{name}` is missing from {where}.")
        for name in names:
            if name not in self.inputs:
                raise refuse(
                    f"input `{name}` of {where} is not in the signature. "
                    f"Its inputs: {_listed(self.inputs)}"
                )

    def check_outputs(self, names: Collection[str]) -> None:
        """Refuses names of outputs that the signature does not have."""
        for name in names:
            if name not in self.outputs:
                raise refuse(
                    f"output `{name}` is not in the signature. Its outputs: {_listed(self.outputs)}"
                )

    def _check(self, inputs: Mapping[str, tuple[np.dtype[Any], Sequence[int]]]) -> None:
        """Refuses inputs whose names, types, shapes or numbers of rows do not fit."""
        self.check_names(inputs)
        num_rows: dict[str, int] = {}
        for name, spec in self.inputs.items():
            dtype, shape = inputs[name]
            spec.check(name, dtype, shape)
            if spec.is_batched and len(shape):
                num_rows[name] = shape[0]
        if len(set(num_rows.values())) > 1:
            raise refuse(f"all inputs should have the same number of rows. Received: {num_rows}")
        most = max(num_rows.values(), default=0)
        if most > MAX_BATCH_SIZE:
            raise refuse(
                f"a request should have <= {MAX_BATCH_SIZE} rows. Received: {most}. Split it, as "
                "the clients of this package do."
            )

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Array]:
        """Arrays of tensors that came over the wire, none of which is made before all fit.

        Raises:
          ServingError: inputs that do not fit.
        """
        types = {}
        for name, tensor in tensors.items():
            with _of_input(name):
                types[name] = (numpy_dtype(tensor.dtype), tensor.shape)
        self._check(types)
        arrays = {}
        for name, tensor in tensors.items():
            with _of_input(name):
                arrays[name] = from_fields(tensor.values, *types[name])
        return arrays

    def __call__(
        self, inputs: Mapping[str, Array], timeout: float | None = None
    ) -> dict[str, Array]:
        """Checks the inputs and runs.

        Args:
          inputs: array by input name.
          timeout: seconds after which the run is given up.

        Raises:
          ServingError: inputs that do not fit, the time is over, or the graph refused.
        """
        self._check({name: (array.dtype, array.shape) for name, array in inputs.items()})
        arrays = [inputs[name] for name in self.inputs]
        return dict(zip(self.outputs, self._run(arrays, timeout), strict=True))

    def _run(self, arrays: list[Array], timeout: float | None) -> list[Array]:
        # The inner half of session.run, which takes RunOptions and costs a fifth of the whole.
        options = None
        if timeout is not None:
            if timeout <= 0:
                raise ServingError(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed.")
            milliseconds = max(1, int(min(timeout, 1e6) * 1000))
            options = pywrap_tf_session.TF_NewBufferFromString(
                config_pb2.RunOptions(timeout_in_ms=milliseconds).SerializeToString()
            )
        try:
            feeds = dict(zip(self._feeds, arrays, strict=True))
            return self._session._call_tf_sessionrun(options, feeds, self._fetches, [], None)
        except tf.errors.OpError as error:
            message = error.message.split("\n\nOriginal stack trace")[0].strip()
            raise ServingError(_CODES[error.error_code], message) from error
        finally:
            if options is not None:
                pywrap_tf_session.TF_DeleteBuffer(options)
