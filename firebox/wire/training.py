"""The training data plane: request bodies, the operations they become, and the results that answer them.

Owns the JSON shapes and the one internal form of an operation, a tagged value that any codec may produce and that can
be sent to another rank as it is. Knows nothing of ordering, tensors on a device, or HTTP.

Invariant: an operation is decoded completely or not at all; what is decoded here still has to be judged against the
model (lengths, token ids), which is the trainer's business.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from firebox.wire.errors import FireboxError, InvalidArgument

Normalization = Literal["none", "num_loss_tokens", "num_sequences"]
GradNormMetrics = Literal["off", "basic", "detailed"]

_Body = TypeVar("_Body", bound=msgspec.Struct)


# ---------------------------------------------------------------------------------------------------- shapes of data


class TensorData(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as flat row-major numbers, or as CSR: then `data` holds the listed values and `shape` is required."""

    data: list[int | float]
    dtype: Literal["float32", "int64"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    type: str = "encoded_text"
    tokens: list[int] = []


class ModelInput(msgspec.Struct, frozen=True, kw_only=True):
    chunks: list[Chunk]


class Datum(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of T tokens; `loss_fn_inputs["target_tokens"]` [T] or [T, K] is already shifted by the client."""

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = {}


class AdamParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Largest global norm of the normalized gradient; 0 switches clipping off."""
    emit_grad_norm_metrics: GradNormMetrics | bool | None = None


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Without `alpha` the scale is 2: clients that mean another send it, and drop the field for null."""

    rank: int = 0
    alpha: float | None = None
    seed: int | None = None
    init_method: str | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @property
    def effective_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha


# --------------------------------------------------------------------------------------------------------- operations


class CreateModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    base_model: str
    lora_config: LoraConfig = LoraConfig()
    base_only: bool = False
    projection_head_dim: int | None = None


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Forward(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Log-probs and loss of `data`; gradients are touched only when `backward` is set."""

    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, Any] = {}
    backward: bool = False


class OptimStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    adam_params: AdamParams
    normalization: Normalization = "none"


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    name: str


class LoadState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`ref` is a checkpoint name of this job or `cross_job://<job>/<name>`."""

    ref: str
    optimizer: bool


class SaveForSampler(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    name: str
    checkpoint_type: str = "base"


Operation = CreateModel | UnloadModel | Forward | OptimStep | SaveState | LoadState | SaveForSampler


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One operation on one model, as the engine executes it."""

    model_id: str
    operation: Operation


# ------------------------------------------------------------------------------------------------------------ results


class ModelCreated(msgspec.Struct, frozen=True, kw_only=True):
    """No capability beyond plain training is advertised, so that clients refuse the others by themselves."""

    model_id: str
    is_lora: bool = False
    lora_rank: int = 0
    supports_router_replay: bool = False
    type: Literal["create_model"] = "create_model"


class ModelUnloaded(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    type: Literal["unload_model"] = "unload_model"


class OutputTensor(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is flat and stays an array until it is encoded: results are kept for a while, lists are larger."""

    data: NDArray[np.float32] | NDArray[np.int64]
    dtype: Literal["float32", "int64"]
    shape: list[int]


class ForwardOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `loss_fn_outputs` per datum, in order; every metric key is `<name>:<reduction>`."""

    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, OutputTensor]]
    metrics: dict[str, float]


class OptimStepOutput(msgspec.Struct, frozen=True, kw_only=True):
    metrics: dict[str, float]


class StateSaved(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    type: Literal["save_weights"] = "save_weights"


class StateLoaded(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    model_id: str
    type: Literal["load_weights"] = "load_weights"


class SavedForSampler(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """A future that ended badly; `category` says on whose side the mistake is."""

    error: str
    category: Literal["user", "server"]


Result = (
    ModelCreated | ModelUnloaded | ForwardOutput | OptimStepOutput | StateSaved | StateLoaded | SavedForSampler | Failed
)


def failed(error: FireboxError) -> Failed:
    """The result that carries `error`."""
    return Failed(error=error.message, category="user" if error.status < 500 else "server")


def output_tensor(array: NDArray[np.float32] | NDArray[np.int64]) -> OutputTensor:
    """Wrap a float32 or int64 array of any shape."""
    dtype: Literal["float32", "int64"] = "float32" if array.dtype == np.float32 else "int64"
    return OutputTensor(data=array.reshape(-1), dtype=dtype, shape=list(array.shape))


def encode_result(result: Result) -> bytes:
    """The JSON body that answers a finished future."""
    return msgspec.json.encode(result, enc_hook=_array_to_list)


def _array_to_list(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be encoded")


# ----------------------------------------------------------------------------------------------------- request bodies


class CreateModelAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Which model a `create_model` body is about."""

    session_id: str
    model_seq_id: int

    @property
    def model_id(self) -> str:
        return f"{self.session_id}:train:{self.model_seq_id}"


class OperationAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Which place in which model's sequence a body is for; everything else is read later."""

    model_id: str
    seq_id: int | None = None


class _CreateModelBody(msgspec.Struct, frozen=True, kw_only=True):
    base_model: str
    lora_config: LoraConfig | None = None
    base_only: bool = False
    projection_head_dim: int | None = None


class _ForwardInput(msgspec.Struct, frozen=True, kw_only=True):
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, Any] | None = None


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


class _LoadStateBody(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    optimizer: bool


class _SaveForSamplerBody(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    checkpoint_type: str = "base"


def decode_create_model(body: bytes) -> CreateModel:
    """The operation in a `create_model` body; raises InvalidArgument naming the field."""
    create = _decode(body, _CreateModelBody)
    return CreateModel(
        base_model=create.base_model,
        lora_config=create.lora_config or LoraConfig(),
        base_only=create.base_only,
        projection_head_dim=create.projection_head_dim,
    )


def decode_forward(body: bytes) -> Forward:
    """The operation in a `forward` body; raises InvalidArgument naming the field."""
    return _forward(_decode(body, _ForwardBody).forward_input, backward=False)


def decode_forward_backward(body: bytes) -> Forward:
    """The operation in a `forward_backward` body; raises InvalidArgument naming the field."""
    return _forward(_decode(body, _ForwardBackwardBody).forward_backward_input, backward=True)


def decode_optim_step(body: bytes) -> OptimStep:
    """The operation in an `optim_step` body; raises InvalidArgument naming the field."""
    step = _decode(body, _OptimStepBody)
    return OptimStep(adam_params=step.adam_params, normalization=step.grad_accumulation_normalization or "none")


def decode_save_state(body: bytes) -> SaveState:
    """The operation in a `save_weights` body; `overwrite` is refused because a saved checkpoint never changes."""
    save = _decode(body, _SaveStateBody)
    if save.overwrite:
        raise InvalidArgument(f"overwrite: a saved checkpoint never changes; save {save.path!r} under another name")
    return SaveState(name=save.path)


def decode_load_state(body: bytes) -> LoadState:
    """The operation in a `load_weights` body; raises InvalidArgument naming the field."""
    load = _decode(body, _LoadStateBody)
    return LoadState(ref=load.path, optimizer=load.optimizer)


def decode_save_for_sampler(body: bytes) -> SaveForSampler:
    """The operation in a `save_weights_for_sampler` body; raises InvalidArgument naming the field."""
    save = _decode(body, _SaveForSamplerBody)
    return SaveForSampler(name=save.path, checkpoint_type=save.checkpoint_type)


def decode_unload_model(body: bytes) -> UnloadModel:
    """The operation in an `unload_model` body, which holds nothing but the model's id."""
    return UnloadModel()


def decode_load_adapter(body: bytes) -> Operation:
    """`load_adapter` is understood and refused: always raises InvalidArgument with the way around it."""
    raise InvalidArgument(
        "load_adapter: starting from a promoted adapter is not supported; "
        "use save_state in the first job and load_state with cross_job://<job>/<name> in this one"
    )


def decode_address(body: bytes, kind: type[_Body]) -> _Body:
    """Read only the address out of a body.

    A body that is JSON but for a NaN or Infinity still has one: its sequence number must be consumed.
    Raises InvalidArgument when there is no address to be read.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"body: {error}") from error
    except msgspec.DecodeError as error:
        try:
            return msgspec.convert(json.loads(body), type=kind)
        except (ValueError, RecursionError):
            raise InvalidArgument(f"body: not JSON: {error}") from error


def _forward(request: _ForwardInput, *, backward: bool) -> Forward:
    return Forward(
        data=request.data, loss_fn=request.loss_fn, loss_fn_config=request.loss_fn_config or {}, backward=backward
    )


def _decode(body: bytes, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"body: {error}") from error
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"body: {error}; numbers must be finite (no NaN or Infinity)") from error
