"""`ReconnectableClient`: one trainer, called synchronously. Knows no recipe, no data format, no checkpoint file.

Invariant: a call returns its result or raises; nothing is retried here, so that a loop stops cleanly and resumes from
its last checkpoint. Every wait has a deadline. Heavy imports happen when a client is built.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from training.utils.errors import ConfigError

if TYPE_CHECKING:
    from fireworks.training.sdk import FiretitanTrainingClient, TrainerJobManager, TrainerServiceEndpoint

T = TypeVar("T")
STATE_TIMEOUT_S = 2700


class Waitable(Protocol):
    """What the SDK calls a future."""

    def result(self, timeout: float | None = None) -> Any: ...


class ReconnectableClient:
    """Blocking access to a trainer job.

    Datums and AdamParams of the `tinker` package are accepted beside those of `fireworks.training.sdk`. Raises what the
    SDK raises, and TimeoutError naming the operation and the job when `default_timeout` seconds pass.
    """

    def __init__(
        self,
        rlor_mgr: TrainerJobManager,
        job_id: str,
        base_model: str,
        lora_rank: int = 0,
        fw_api_key: str | None = None,
        default_timeout: int = 600,
        endpoint: TrainerServiceEndpoint | None = None,
    ) -> None:
        from fireworks.training.sdk import FiretitanServiceClient

        api_key = fw_api_key or os.environ.get("FIREWORKS_API_KEY")
        if not api_key:
            raise ConfigError("fw_api_key", fw_api_key, "pass a key or set FIREWORKS_API_KEY")
        self.default_timeout = default_timeout
        self._job_id = job_id
        self._endpoint = endpoint if endpoint is not None else rlor_mgr.wait_for_existing(job_id)
        self._service = FiretitanServiceClient(base_url=self._endpoint.base_url, api_key=api_key)
        self._inner = self._service.create_training_client(base_model=base_model, lora_rank=lora_rank)

    @property
    def inner(self) -> FiretitanTrainingClient:
        """The SDK's client, for calls that should not block."""
        return self._inner

    @property
    def endpoint(self) -> TrainerServiceEndpoint:
        """Where the trainer answers: base_url, job_id, job_name."""
        return self._endpoint

    @property
    def job_id(self) -> str:
        return self._job_id

    def forward(self, data: Sequence[Any], loss_fn: str = "cross_entropy") -> Any:
        """Loss and `logprobs` per datum without touching gradients."""
        return self._wait("forward", self._inner.forward(to_datums(data), loss_fn))

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str = "cross_entropy", loss_fn_config: dict[str, Any] | None = None
    ) -> Any:
        """Add the gradient of a loss that the server knows; returns its metrics and `logprobs` per datum."""
        return self._wait("forward_backward", self._inner.forward_backward(to_datums(data), loss_fn, loss_fn_config))

    def forward_backward_custom(self, data: Sequence[Any], loss_fn: Callable[..., Any]) -> Any:
        """Add the gradient of `loss_fn(data, logprobs) -> (loss, metrics)`, which runs here, in torch."""
        run = lambda: self._inner.forward_backward_custom(to_datums(data), loss_fn).result(self.default_timeout)  # noqa: E731
        return self._within("forward_backward_custom", run)

    def optim_step(self, params: Any, grad_accumulation_normalization: str | None = None) -> Any:
        """One AdamW step on the accumulated gradient, normalized as asked."""
        future = self._inner.optim_step(
            to_adam(params), grad_accumulation_normalization=grad_accumulation_normalization
        )
        return self._wait("optim_step", future)

    def save_state(self, name: str, timeout: int = STATE_TIMEOUT_S) -> Any:
        """Write a checkpoint that can be resumed from; `path` of the result is the name to load."""
        return self._wait("save_state", self._inner.save_state(name), timeout)

    def load_state_with_optimizer(self, path: str, timeout: int = STATE_TIMEOUT_S) -> Any:
        """Replace weights and optimizer by a checkpoint's: a name of this job or a reference to another job's."""
        return self._wait("load_state_with_optimizer", self._inner.load_state_with_optimizer(path), timeout)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str | None = None, timeout: int = STATE_TIMEOUT_S
    ) -> Any:
        """Write weights for sampling or promotion; `snapshot_name` of the result identifies them."""
        run = lambda: self._inner.save_weights_for_sampler_ext(name, checkpoint_type=checkpoint_type)  # noqa: E731
        return self._within("save_weights_for_sampler_ext", run, timeout)

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """The reference under which this trainer can load a checkpoint, of another job when one is named."""
        return str(self._inner.resolve_checkpoint_path(name, source_job_id))

    def list_checkpoints(self) -> list[str]:
        """Names of the checkpoints that this trainer can resume from."""
        return self._within("list_checkpoints", self._inner.list_checkpoints)

    def close(self) -> None:
        """End the session. The trainer job itself goes on."""
        self._service.close()

    def _wait(self, what: str, future: Waitable, timeout: float | None = None) -> Any:
        seconds = timeout or self.default_timeout
        try:
            return future.result(timeout=seconds)
        except (TimeoutError, FutureTimeout) as exc:
            raise TimeoutError(f"{what} on trainer {self._job_id} gave no result in {seconds} s") from exc

    def _within(self, what: str, call: Callable[[], T], timeout: float | None = None) -> T:
        # These SDK calls block without a deadline of their own. A daemon thread does not hold up the exit of a script
        # that gave up waiting.
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as exc:  # noqa: BLE001 - handed to the caller's thread, which raises it
                future.set_exception(exc)

        threading.Thread(target=run, name=what, daemon=True).start()
        result: T = self._wait(what, future, timeout)
        return result


def to_datums(data: Sequence[Any]) -> list[Any]:
    """Datums of the Fireworks SDK, from its own or from those of the `tinker` package."""
    from fireworks.training.sdk import types

    def convert(datum: Any) -> Any:
        if isinstance(datum, types.Datum):
            return datum
        tensors = {
            key: types.TensorData(
                data=value.data,
                dtype=value.dtype,
                shape=value.shape,
                sparse_crow_indices=value.sparse_crow_indices,
                sparse_col_indices=value.sparse_col_indices,
            )
            for key, value in datum.loss_fn_inputs.items()
        }
        chunks = [chunk.model_dump() for chunk in datum.model_input.chunks]
        return types.Datum(model_input=types.ModelInput.model_validate({"chunks": chunks}), loss_fn_inputs=tensors)

    return [convert(datum) for datum in data]


def to_adam(params: Any) -> Any:
    """AdamParams of the Fireworks SDK, from its own or from those of the `tinker` package."""
    from fireworks.training.sdk import types

    if isinstance(params, types.AdamParams):
        return params
    return types.AdamParams(**params.model_dump())
