"""The training data plane: the operations that requests become, and the results that answer them.

Owns the one internal form of an operation, plain values that every codec produces (`training_json`, `training_proto`)
and that can be executed by another rank as they are. Knows nothing of encodings, ordering, devices, or HTTP.

Invariant: the same request gives the same operation, whichever wire it came by. It still has to be judged against the
model (lengths, token ids), which is the trainer's business.
"""

from __future__ import annotations

from typing import Generic, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from firebox.wire.errors import FireboxError

Normalization = Literal["none", "num_loss_tokens", "num_sequences"]
GradNormMetrics = Literal["off", "basic", "detailed"]
Array = NDArray[np.float32] | NDArray[np.int64]


# ---------------------------------------------------------------------------------------------------- shapes of data


class TensorData(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as flat row-major numbers [N], or as CSR: then `data` holds the listed values and `shape` is required.

    `data` is of `dtype`; the CSR indices are int64.
    """

    data: Array
    dtype: Literal["float32", "int64"]
    shape: list[int] | None = None
    sparse_crow_indices: NDArray[np.int64] | None = None
    sparse_col_indices: NDArray[np.int64] | None = None


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a sequence; `tokens` [N] int64 when it is text, none when it is anything else."""

    type: str = "encoded_text"
    tokens: NDArray[np.int64]


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
    state: LoadState | None = None
    """What the new model starts from; only the server itself asks for it."""


class UnloadModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Forward(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Log-probs and loss of `data`; gradients are touched only when `backward` is set."""

    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] = {}
    backward: bool = False


class OptimStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    adam_params: AdamParams
    normalization: Normalization = "none"


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    name: str


class LoadState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`ref` is a checkpoint name of this job, or one of the forms that lead to another's."""

    ref: str
    optimizer: bool


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`path` is the resource name of a registered adapter, or a PEFT directory on the server."""

    path: str


class SaveForSampler(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`export_precision` is of a 'merged_base' only."""

    name: str
    checkpoint_type: str = "base"
    export_precision: str | None = None


Operation = CreateModel | UnloadModel | Forward | OptimStep | SaveState | LoadState | LoadAdapter | SaveForSampler


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """One operation on one model, as the engine executes it."""

    model_id: str
    operation: Operation


# ------------------------------------------------------------------------------------------------------------ results


class ModelCreated(msgspec.Struct, frozen=True, kw_only=True):
    """Of the capabilities that clients ask for, only the loss `reinforce` is there; they refuse the others themselves.

    `step` counts the optimizer steps behind these weights: above 0, the model did not start anew but attached to live
    full-parameter weights, or began with a saved state.
    """

    model_id: str
    is_lora: bool = False
    lora_rank: int = 0
    step: int = 0
    supports_router_replay: bool = False
    supports_reinforce: bool = True
    type: Literal["create_model"] = "create_model"


class ModelUnloaded(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    type: Literal["unload_model"] = "unload_model"


class OutputTensor(msgspec.Struct, frozen=True, kw_only=True):
    """`data` is flat and stays an array until it is encoded: results are kept for a while, lists are larger."""

    data: Array
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


class AdapterLoaded(msgspec.Struct, frozen=True, kw_only=True):
    adapter_path: str
    model_id: str
    type: Literal["load_adapter"] = "load_adapter"


class SavedForSampler(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """A future that ended badly; `category` says on whose side the mistake is."""

    error: str
    category: Literal["user", "server"]


Result = (
    ModelCreated
    | ModelUnloaded
    | ForwardOutput
    | OptimStepOutput
    | StateSaved
    | StateLoaded
    | AdapterLoaded
    | SavedForSampler
    | Failed
)


def failed(error: FireboxError) -> Failed:
    """The result that carries `error`."""
    return Failed(error=error.message, category="user" if error.status < 500 else "server")


def output_tensor(array: Array) -> OutputTensor:
    """Wrap a float32 or int64 array of any shape."""
    dtype: Literal["float32", "int64"] = "float32" if array.dtype == np.float32 else "int64"
    return OutputTensor(data=array.reshape(-1), dtype=dtype, shape=list(array.shape))


# ------------------------------------------------------------------------------------------------------------ requests


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


Address = TypeVar("Address", OperationAddress, CreateModelAddress)


class Request(NamedTuple, Generic[Address]):
    """A decoded request: its place, what it asks or why that is unreadable, and bytes equal for equal requests."""

    address: Address
    operation: Operation | Failed
    canonical: bytes
