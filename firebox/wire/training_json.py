"""The JSON wire of the training data plane.

Owns the request bodies as Fireworks clients write them (Tinker clients too, but for their data), and the encoding of
results. Knows nothing of HTTP. Invariant: a request is decoded completely or not at all, and a body whose address can
be read always yields it, so that its place in the sequence is consumed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from firebox.wire.errors import InvalidArgument
from firebox.wire.training import (
    AdamParams,
    Address,
    Array,
    Chunk,
    CreateModel,
    CreateModelAddress,
    Datum,
    Failed,
    Forward,
    LoadAdapter,
    LoadState,
    LoraConfig,
    ModelInput,
    Normalization,
    Operation,
    OperationAddress,
    OptimStep,
    Request,
    Result,
    SaveForSampler,
    SaveState,
    TensorData,
    failed,
)

_NOT_JSON: Final = re.compile(rb"-?\b(NaN|Infinity)\b")

_Body = TypeVar("_Body", bound=msgspec.Struct)


class _Tensor(msgspec.Struct, frozen=True, kw_only=True):
    data: list[int | float]
    dtype: Literal["float32", "int64"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class _Chunk(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "encoded_text"
    tokens: list[int] = []


class _ModelInput(msgspec.Struct, frozen=True, kw_only=True):
    chunks: list[_Chunk]


class _Datum(msgspec.Struct, frozen=True, kw_only=True):
    model_input: _ModelInput
    loss_fn_inputs: dict[str, _Tensor] = {}


class _CreateModelBody(msgspec.Struct, frozen=True, kw_only=True):
    base_model: str
    lora_config: LoraConfig | None = None
    base_only: bool = False
    projection_head_dim: int | None = None


class _ForwardInput(msgspec.Struct, frozen=True, kw_only=True):
    data: list[_Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class _ForwardBody(msgspec.Struct, frozen=True, kw_only=True):
    forward_input: _ForwardInput


class _ForwardBackwardBody(msgspec.Struct, frozen=True, kw_only=True):
    forward_backward_input: _ForwardInput


class _OptimStepBody(msgspec.Struct, frozen=True, kw_only=True):
    adam_params: AdamParams
    grad_accumulation_normalization: Normalization | None = None


class _SaveStateBody(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    overwrite: bool = False
    ttl_seconds: int | None = None


class _LoadStateBody(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    optimizer: bool


class _SaveForSamplerBody(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    checkpoint_type: str = "base"
    export_precision: str | None = None
    ttl_seconds: int | None = None
    metadata: dict[str, Any] | None = None


class _LoadAdapterBody(msgspec.Struct, frozen=True, kw_only=True):
    adapter_path: str


# Large bodies are decoded on several threads, and msgspec crashes when two of them are the first to decode one type:
# these types are made known to it here, by one thread.
_KNOWN: Final = [
    msgspec.json.Decoder(kind)
    for kind in (
        *(OperationAddress, CreateModelAddress, _CreateModelBody, _ForwardBody, _ForwardBackwardBody),
        *(_OptimStepBody, _SaveStateBody, _LoadStateBody, _SaveForSamplerBody, _LoadAdapterBody),
    )
]


# ----------------------------------------------------------------------------------------------------------- requests


def decode_operation(route: str, body: bytes) -> Request[OperationAddress]:
    """The request in a body posted to `route`, one of `OPERATIONS`; raises InvalidArgument without an address."""
    return _request(body, OperationAddress, OPERATIONS[route])


def decode_create_model(body: bytes) -> Request[CreateModelAddress]:
    """The request in a `create_model` body; raises InvalidArgument when it does not name its model."""
    return _request(body, CreateModelAddress, _create_model)


def decode_address(body: bytes, kind: type[Address]) -> Address:
    """Read only the address out of a body; raises InvalidArgument when there is none."""
    try:
        try:
            return _decode(body, kind)
        except _NotJsonError:
            # But for a NaN or Infinity it may be JSON, and then its sequence number must be consumed.
            return _decode(_NOT_JSON.sub(b"null", body), kind)
    except _NotJsonError as error:
        raise InvalidArgument(f"body: not JSON: {error.__cause__}") from error


def _request(body: bytes, kind: type[Address], decode: Callable[[bytes], Operation]) -> Request[Address]:
    address = decode_address(body, kind)
    operation: Operation | Failed
    try:
        operation = decode(body)
    except InvalidArgument as error:
        operation = failed(error)
    return Request(address, operation, body)


def _create_model(body: bytes) -> CreateModel:
    create = _decode(body, _CreateModelBody)
    return CreateModel(
        base_model=create.base_model,
        lora_config=create.lora_config or LoraConfig(),
        base_only=create.base_only,
        projection_head_dim=create.projection_head_dim,
    )


def _forward(body: bytes) -> Forward:
    return _to_forward(_decode(body, _ForwardBody).forward_input, backward=False)


def _forward_backward(body: bytes) -> Forward:
    return _to_forward(_decode(body, _ForwardBackwardBody).forward_backward_input, backward=True)


def _optim_step(body: bytes) -> OptimStep:
    step = _decode(body, _OptimStepBody)
    return OptimStep(adam_params=step.adam_params, normalization=step.grad_accumulation_normalization or "none")


def _save_state(body: bytes) -> SaveState:
    save = _decode(body, _SaveStateBody)
    if save.overwrite:
        raise InvalidArgument(f"overwrite: a saved checkpoint never changes; save {save.path!r} under another name")
    _check_kept_for_ever(save.ttl_seconds)
    return SaveState(name=save.path)


def _load_state(body: bytes) -> LoadState:
    load = _decode(body, _LoadStateBody)
    return LoadState(ref=load.path, optimizer=load.optimizer)


def _save_for_sampler(body: bytes) -> SaveForSampler:
    save = _decode(body, _SaveForSamplerBody)
    _check_kept_for_ever(save.ttl_seconds)
    if save.metadata is not None:
        raise InvalidArgument("metadata: nothing is stored beside the weights; leave the field out")
    return SaveForSampler(name=save.path, checkpoint_type=save.checkpoint_type, export_precision=save.export_precision)


def _check_kept_for_ever(ttl_seconds: int | None) -> None:
    if ttl_seconds is not None:
        raise InvalidArgument(
            f"ttl_seconds: {ttl_seconds} cannot be kept for a job's own checkpoints, which stay; leave it out"
        )


def _load_adapter(body: bytes) -> LoadAdapter:
    return LoadAdapter(path=_decode(body, _LoadAdapterBody).adapter_path)


OPERATIONS: Final[dict[str, Callable[[bytes], Operation]]] = {
    "forward": _forward,
    "forward_backward": _forward_backward,
    "optim_step": _optim_step,
    "save_weights": _save_state,
    "load_weights": _load_state,
    "save_weights_for_sampler": _save_for_sampler,
    "load_adapter": _load_adapter,
}


# --------------------------------------------------------------------------------------------------------------- data


def _to_forward(request: _ForwardInput, *, backward: bool) -> Forward:
    return Forward(
        data=[_to_datum(f"data[{i}]", datum) for i, datum in enumerate(request.data)],
        loss_fn=request.loss_fn,
        loss_fn_config=request.loss_fn_config or {},
        backward=backward,
    )


def _to_datum(where: str, datum: _Datum) -> Datum:
    chunks = [
        Chunk(type=chunk.type, tokens=_to_int64(f"{where}.model_input.chunks[{i}].tokens", chunk.tokens))
        for i, chunk in enumerate(datum.model_input.chunks)
    ]
    inputs = {name: _to_tensor(f"{where}.loss_fn_inputs.{name}", t) for name, t in datum.loss_fn_inputs.items()}
    return Datum(model_input=ModelInput(chunks=chunks), loss_fn_inputs=inputs)


def _to_tensor(field: str, tensor: _Tensor) -> TensorData:
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    data: Array = _to_int64(field, tensor.data) if tensor.dtype == "int64" else _to_float32(field, tensor.data)
    return TensorData(
        data=data,
        dtype=tensor.dtype,
        shape=tensor.shape,
        sparse_crow_indices=None if crow is None else _to_int64(f"{field}.sparse_crow_indices", crow),
        sparse_col_indices=None if col is None else _to_int64(f"{field}.sparse_col_indices", col),
    )


def _to_int64(field: str, values: list[int] | list[int | float]) -> NDArray[np.int64]:
    if float in set(map(type, values)) and not all(float(value).is_integer() for value in values):
        raise InvalidArgument(f"{field}: dtype 'int64' holds whole numbers only")
    try:
        return np.asarray(values, dtype=np.int64)
    except OverflowError as error:
        raise InvalidArgument(f"{field}: a value does not fit int64") from error


def _to_float32(field: str, values: list[int | float]) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # becomes an infinity, which is refused where it matters
            return np.asarray(values, dtype=np.float32)
    except OverflowError as error:
        raise InvalidArgument(f"{field}: a value does not fit float32") from error


# ------------------------------------------------------------------------------------------------------------- coding


class _NotJsonError(InvalidArgument):
    """The body is not JSON at all."""


def _decode(body: bytes, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"body: {error}") from error
    except RecursionError as error:
        raise InvalidArgument("body: it is nested too deeply") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _NotJsonError(f"body: {error}; numbers must be finite (no NaN or Infinity)") from error


def encode_result(result: Result) -> bytes:
    """The body that answers a finished future."""
    return msgspec.json.encode(result, enc_hook=_array_to_list)


def _array_to_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be encoded")
