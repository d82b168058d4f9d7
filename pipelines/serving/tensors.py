"""Tensors on the wire: TensorProto and JSON values to NumPy arrays and back.

Strings are arrays of `object` that hold bytes. What cannot be converted raises a ValueError that
says why; the caller adds the input's name.
"""

from __future__ import annotations

import base64
import binascii
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

MAX_MESSAGE_BYTES = 64 << 20
STRING: np.dtype[Any] = np.dtype(object)
# Where a TensorProto holds values one by one.
_FIELDS = {
    STRING: "string_val",
    np.dtype(np.bool_): "bool_val",
    np.dtype(np.float32): "float_val",
    np.dtype(np.float64): "double_val",
    np.dtype(np.int64): "int64_val",
    np.dtype(np.uint32): "uint32_val",
    np.dtype(np.uint64): "uint64_val",
    **{np.dtype(kind): "int_val" for kind in (np.int8, np.int16, np.int32, np.uint8, np.uint16)},
}
_HALVES = (np.dtype(np.float16), np.dtype(tf.bfloat16.as_numpy_dtype))

Array = npt.NDArray[Any]


@functools.cache
def numpy_dtype(enum: int) -> np.dtype[Any]:
    """NumPy type of a TensorFlow DataType; `object` for strings.

    Raises:
      ValueError: it has none.
    """
    try:
        return np.dtype(tf.as_dtype(enum).as_numpy_dtype)
    except (KeyError, TypeError) as error:
        raise ValueError(f"data type {enum} cannot be served.") from error


@functools.cache
def _enum(dtype: np.dtype[Any]) -> int:
    return int(
        tf.string.as_datatype_enum if dtype == STRING else tf.as_dtype(dtype).as_datatype_enum
    )


def from_proto(proto: Any) -> Array:
    """The array a TensorProto holds.

    Raises:
      ValueError: shape, type and values do not agree, or it is larger than a message may be.
    """
    shape = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise ValueError(f"its shape should be fully known. Received: {shape}")
    return from_fields(proto, numpy_dtype(proto.dtype), shape)


def from_fields(proto: Any, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
    """The array that the value fields of a TensorProto make, of a type and shape known otherwise.

    A proto may state a large shape and give one value to fill it with, so the size is bounded by
    what the shape says, not by the bytes that came.

    Raises:
      ValueError: the values do not fit, or it is larger than a message may be.
    """
    size = math.prod(shape)
    if size * dtype.itemsize > MAX_MESSAGE_BYTES:
        raise ValueError(f"it should hold <= {MAX_MESSAGE_BYTES} bytes. Received: shape {shape}")
    if proto.tensor_content and dtype != STRING:
        if len(proto.tensor_content) != size * dtype.itemsize:
            raise ValueError(
                f"`tensor_content` should hold {size * dtype.itemsize} bytes for shape {shape}. "
                f"Received: {len(proto.tensor_content)}"
            )
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    field = "half_val" if dtype in _HALVES else _FIELDS.get(dtype)
    given = getattr(proto, field) if field else ()
    if len(given) > size or (size and not given):
        raise ValueError(f"its {len(given)} values do not fit its type and shape {shape}.")
    if not size:
        return np.zeros(shape, dtype)
    values: Any = list(given)
    try:
        if dtype in _HALVES:
            values = np.array(values, np.uint16).view(dtype)
        array = np.full(size, values[-1], dtype)  # which stands for all that follow
        array[: len(values)] = values
    except OverflowError as error:
        raise ValueError(f"a value is out of the range of {dtype}.") from error
    return array.reshape(shape)


def to_proto(array: Array, rows: int | None = None) -> Any:
    """The TensorProto of an array; numbers travel as raw bytes, the fastest form.

    With `rows`, of an array of so many rows; those that it lacks are 0 or b"" and do not travel.
    """
    if array.dtype.kind in "SU":
        array = array.astype(object)
    shape = array.shape if rows is None else (rows, *array.shape[1:])
    proto = tensor_pb2.TensorProto(dtype=_enum(array.dtype))
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    is_whole = shape == array.shape
    if is_whole and array.dtype != STRING:
        proto.tensor_content = array.tobytes()
        return proto
    values = array.ravel().tolist()
    if array.dtype == STRING and any(type(v) is str for v in values):
        values = [v.encode() if isinstance(v, str) else v for v in values]
    if not is_whole:
        # The last value of a field stands for all that follow.
        values.append(b"" if array.dtype == STRING else 0)
    getattr(proto, _FIELDS[array.dtype]).extend(values)
    return proto


def from_json(value: Any, dtype: np.dtype[Any]) -> Array:
    """The array a JSON value holds: a number, a string, or nested lists of them.

    Types are kept strictly, as TF Serving does: "5", 1.0 and true are no int64.

    Raises:
      ValueError: lists of different lengths, or a value that `dtype` cannot hold exactly.
    """
    shape: list[int] = []
    flat = [value]
    while flat and all(type(item) is list for item in flat):
        lengths = {len(item) for item in flat}
        if len(lengths) > 1:
            raise ValueError(
                f"its lists should be of one length; pad them. Received: lengths {sorted(lengths)}"
            )
        shape.append(lengths.pop())
        flat = list(itertools.chain.from_iterable(flat))
    if any(type(item) is list for item in flat):
        raise ValueError(
            "its lists should be of one depth. Received: values and lists side by side"
        )
    if dtype == STRING:
        return string_array([_json_bytes(item) for item in flat]).reshape(shape)
    allowed = {"b": (bool,), "i": (int,), "u": (int,), "f": (int, float)}.get(dtype.kind)
    if allowed is None:
        raise ValueError(f"{dtype} cannot be given in JSON; use gRPC.")
    for kind in set(map(type, flat)):
        if kind not in allowed:
            wrong = next(item for item in flat if type(item) is kind)
            raise ValueError(f"it should hold {dtype}. Received: {_shown(wrong)}")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype).reshape(shape)
    except (OverflowError, FloatingPointError) as error:
        raise ValueError(f"a value is out of the range of {dtype}.") from error


def to_json(array: Array, as_bytes: bool = False) -> Any:
    """JSON value of an array: nested lists; strings that are no text become {"b64": ...}."""
    if array.dtype != STRING:
        return array.astype(float).tolist() if array.dtype.kind in "fV" else array.tolist()
    strings = string_array([_json_string(v, as_bytes) for v in array.ravel().tolist()])
    return strings.reshape(array.shape).tolist()


def string_array(values: Any) -> Array:
    """Array of `object` with one axis; np.array would cut off trailing zero bytes."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _json_bytes(item: Any) -> bytes:
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as error:
            raise ValueError('a string is not UTF-8; give it as {"b64": ...}.') from error
    if isinstance(item, dict) and item.keys() == {"b64"} and isinstance(item["b64"], str):
        try:
            return base64.b64decode(item["b64"], validate=True)
        except binascii.Error as error:
            raise ValueError(f"`b64` should hold base64. Received: {_shown(item)}") from error
    raise ValueError(f'it should hold strings or {{"b64": ...}}. Received: {_shown(item)}')


def _json_string(value: bytes | str, as_bytes: bool) -> Any:
    if isinstance(value, str):
        return value
    if not as_bytes:
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    return {"b64": base64.b64encode(value).decode()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
