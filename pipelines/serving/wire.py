"""Predict requests as they come over gRPC, read piece by piece.

A few bytes of a request may stand for much: an empty message takes two bytes on the wire and
hundreds in memory, and one value may fill a tensor of any shape. So what a request holds is first
read as bytes, which costs a small multiple of its size, and turned into arrays only once names,
types and shapes are those of a signature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from tensorflow.core.framework import tensor_shape_pb2
from tensorflow_serving.apis import model_pb2

MAX_INPUTS = 4096
MAX_RANK = 16
_Field = descriptor_pb2.FieldDescriptorProto
_ONE, _MANY = _Field.LABEL_OPTIONAL, _Field.LABEL_REPEATED
# The fields of PredictRequest, of an entry of its inputs, and of TensorProto, whose numbers they
# have; messages within them are bytes. What is not here is skipped.
_MESSAGES = {
    "Request": (
        ("model_spec", 1, _Field.TYPE_BYTES, _ONE),
        ("inputs", 2, _Field.TYPE_BYTES, _MANY),
        ("output_filter", 3, _Field.TYPE_STRING, _MANY),
    ),
    "Input": (("key", 1, _Field.TYPE_STRING, _ONE), ("value", 2, _Field.TYPE_BYTES, _ONE)),
    "Tensor": (
        ("dtype", 1, _Field.TYPE_INT32, _ONE),
        ("tensor_shape", 2, _Field.TYPE_BYTES, _ONE),
        ("tensor_content", 4, _Field.TYPE_BYTES, _ONE),
        ("float_val", 5, _Field.TYPE_FLOAT, _MANY),
        ("double_val", 6, _Field.TYPE_DOUBLE, _MANY),
        ("int_val", 7, _Field.TYPE_INT32, _MANY),
        ("string_val", 8, _Field.TYPE_BYTES, _MANY),
        ("scomplex_val", 9, _Field.TYPE_FLOAT, _MANY),
        ("int64_val", 10, _Field.TYPE_INT64, _MANY),
        ("bool_val", 11, _Field.TYPE_BOOL, _MANY),
        ("dcomplex_val", 12, _Field.TYPE_DOUBLE, _MANY),
        ("half_val", 13, _Field.TYPE_INT32, _MANY),
        ("uint32_val", 16, _Field.TYPE_UINT32, _MANY),
        ("uint64_val", 17, _Field.TYPE_UINT64, _MANY),
    ),
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="qianmo/wire.proto", package="qianmo.wire", syntax="proto3"
    )
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, kind, label in fields:
            described.field.add(name=name, number=number, type=kind, label=label)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"qianmo.wire.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(message) for name, message in found.items()}


_CLASSES = _classes()


class Tensor(NamedTuple):
    """A tensor whose values are not looked at yet.

    Attributes:
      dtype: TensorFlow's number of it.
      shape: the sizes of its axes.
      values: fields of a TensorProto, by their names there.
    """

    dtype: int
    shape: tuple[int, ...]
    values: Any


class Request(NamedTuple):
    """A predict request.

    Attributes:
      model_spec: which model, version and signature.
      inputs: tensors by name.
      output_filter: names of the outputs wanted; none for all.
    """

    model_spec: Any
    inputs: dict[str, Tensor]
    output_filter: list[str]


def read_request(data: bytes) -> Request:
    """Reads a serialized PredictRequest.

    Raises:
      ValueError: it is none, or holds more inputs or axes than any model has.
    """
    try:
        request = _CLASSES["Request"].FromString(data)
        if max(len(request.inputs), len(request.output_filter)) > MAX_INPUTS:
            raise ValueError(f"a request should hold <= {MAX_INPUTS} inputs and output names.")
        entries = [_CLASSES["Input"].FromString(entry) for entry in request.inputs]
        inputs = {entry.key: _tensor(entry.key, entry.value) for entry in entries}
        spec = model_pb2.ModelSpec.FromString(request.model_spec)
    except DecodeError as error:
        raise ValueError("it cannot be parsed as a PredictRequest.") from error
    return Request(spec, inputs, list(request.output_filter))


def _tensor(name: str, data: bytes) -> Tensor:
    values = _CLASSES["Tensor"].FromString(data)
    shape = tensor_shape_pb2.TensorShapeProto()
    if len(values.tensor_shape) <= 16 * MAX_RANK:
        shape.ParseFromString(values.tensor_shape)
    if len(values.tensor_shape) > 16 * MAX_RANK or len(shape.dim) > MAX_RANK:
        raise ValueError(f"input `{name}` should have <= {MAX_RANK} axes.")
    sizes = tuple(dim.size for dim in shape.dim)
    if shape.unknown_rank or any(size < 0 for size in sizes):
        raise ValueError(f"input `{name}`: its shape should be fully known. Received: {sizes}")
    return Tensor(values.dtype, sizes, values)
