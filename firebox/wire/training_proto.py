"""The protobuf wire of the training data plane, which Tinker clients speak for their data.

Owns the way from a ForwardBackwardRequest to the operation it stands for, and from a result to a
ForwardBackwardOutput. Knows nothing of HTTP. Invariant: numbers keep every bit, and a request means what the same one
means in JSON.
"""

from __future__ import annotations

import itertools
import math
from typing import Final, Literal, TypeVar

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from firebox.wire.errors import InvalidArgument
from firebox.wire.proto import training_pb2 as pb
from firebox.wire.training import (
    Chunk,
    Datum,
    Failed,
    Forward,
    ForwardOutput,
    ModelInput,
    OperationAddress,
    OutputTensor,
    Request,
    TensorData,
    failed,
)

MEDIA_TYPE: Final = "application/x-protobuf"

_DTYPES: Final[dict[int, Literal["float32", "int64"]]] = {pb.DTYPE_FLOAT32: "float32", pb.DTYPE_INT64: "int64"}

_Number = TypeVar("_Number", np.float32, np.int32, np.int64)


def decode_forward_backward(body: bytes) -> Request[OperationAddress]:
    """The request in a `forward_backward` body; raises InvalidArgument when it is not such a message."""
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError as error:
        raise InvalidArgument(f"body: not a ForwardBackwardRequest message: {error}") from error
    operation: Forward | Failed
    try:
        operation = _to_forward(message)
    except InvalidArgument as error:
        operation = failed(error)
    address = OperationAddress(model_id=message.model_id, seq_id=message.seq_id)
    return Request(address, operation, message.SerializeToString(deterministic=True))


def model_id_of(body: bytes) -> str:
    """The model id of a ForwardBackwardRequest, without its data; raises InvalidArgument when it is no such message."""
    if body[:1] == b"\x0a" and len(body) > 1 and body[1] < 0x80:  # as every encoder writes it: the first field
        return body[2 : 2 + body[1]].decode(errors="replace")
    return decode_forward_backward(body).address.model_id


def encode_output(output: ForwardOutput) -> bytes:
    """The ForwardBackwardOutput message of a finished forward or forward_backward."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=output.loss_fn_output_type, metrics=output.metrics)
    for layout, group in itertools.groupby(output.loss_fn_outputs, key=_layout):
        datums = list(group)
        record = message.loss_fn_outputs.add(type_tag=output.loss_fn_output_type, num_datums=len(datums))
        for name, dtype, trailing_shape in layout:
            tensors = [datum[name].data for datum in datums]
            offsets = np.cumsum([0, *(tensor.nbytes for tensor in tensors)], dtype=np.int64)
            field = record.fields[name]
            field.data = b"".join(tensor.tobytes() for tensor in tensors)
            field.offsets = offsets.tobytes()
            field.dtype = pb.DTYPE_FLOAT32 if dtype == "float32" else pb.DTYPE_INT64
            field.trailing_shape.extend(trailing_shape)
    return bytes(message.SerializeToString())


def _layout(datum: dict[str, OutputTensor]) -> list[tuple[str, str, list[int]]]:
    return [(name, tensor.dtype, tensor.shape[1:]) for name, tensor in sorted(datum.items())]


def _to_forward(message: pb.ForwardBackwardRequest) -> Forward:
    return Forward(
        data=[_to_datum(f"data[{i}]", datum) for i, datum in enumerate(message.data)],
        loss_fn=message.loss_fn,
        loss_fn_config=_to_config(message),
        backward=not message.forward_only,
    )


def _to_config(message: pb.ForwardBackwardRequest) -> dict[str, float | str]:
    config: dict[str, float | str] = dict(message.loss_fn_config)
    if message.loss_fn_config_v2:
        values = message.loss_fn_config_v2.items()
        config = {key: value.text if value.HasField("text") else value.number for key, value in values}
    for key, number in config.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise InvalidArgument(f"loss_fn_config.{key}: {number} must be finite")
    return config


def _to_datum(where: str, datum: pb.Datum) -> Datum:
    chunks = [_to_chunk(f"{where}.model_input[{i}]", chunk) for i, chunk in enumerate(datum.model_input)]
    inputs = {name: _to_tensor(f"{where}.loss_fn_inputs.{name}", t) for name, t in datum.loss_fn_inputs.items()}
    return Datum(model_input=ModelInput(chunks=chunks), loss_fn_inputs=inputs)


def _to_chunk(where: str, chunk: pb.Chunk) -> Chunk:
    kind = chunk.WhichOneof("chunk")
    if kind is None:
        raise InvalidArgument(f"{where}: the chunk is empty; set encoded_text")
    tokens = _numbers(f"{where}.tokens", chunk.encoded_text.tokens, np.int32)
    return Chunk(type=kind, tokens=tokens.astype(np.int64))


def _to_tensor(field: str, tensor: pb.Tensor) -> TensorData:
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidArgument(f"{field}: dtype {tensor.dtype} is not supported; send float32 (1) or int64 (2)")
    sparse = tensor.sparse_csr if tensor.HasField("sparse_csr") else None
    values = tensor.dense if sparse is None else sparse.values
    return TensorData(
        data=_numbers(field, values, np.float32) if dtype == "float32" else _numbers(field, values, np.int64),
        dtype=dtype,
        shape=list(tensor.shape) or None,
        sparse_crow_indices=sparse and _numbers(f"{field}.crow_indices", sparse.crow_indices, np.int64),
        sparse_col_indices=sparse and _numbers(f"{field}.col_indices", sparse.col_indices, np.int64),
    )


def _numbers(field: str, data: bytes, kind: type[_Number]) -> NDArray[_Number]:
    """A view of `data` as little-endian numbers."""
    dtype = np.dtype(kind).newbyteorder("<")
    if len(data) % dtype.itemsize:
        raise InvalidArgument(f"{field}: {len(data)} bytes are not a whole number of {dtype.name} values")
    return np.frombuffer(data, dtype=dtype)
