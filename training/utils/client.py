"""`ReconnectableClient`: one trainer, called synchronously. Knows no recipe, no data format, no checkpoint file.

Invariant: a call returns its result or raises; nothing is retried here, so that a loop stops cleanly and resumes from
its last checkpoint. Weights that a new trainer process begins with are never trained on. Every wait has a deadline.
Heavy imports happen when a client is built.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from training.utils.errors import ConfigError, ReconnectedError

if TYPE_CHECKING:
    from fireworks.training.sdk import FiretitanTrainingClient, TrainerJobManager, TrainerServiceEndpoint

T = TypeVar("T")
STATE_TIMEOUT_S = 2700
PROBE_TIMEOUT_S = 30
RUNNING = "JOB_STATE_RUNNING"


class Waitable(Protocol):
    """What the SDK calls a future."""

    def result(self, timeout: float | None = None) -> Any: ...


class ReconnectableClient:
    """Blocking access to a trainer job.

    Datums and AdamParams of the `tinker` package are accepted beside those of `fireworks.training.sdk`. Raises what the
    SDK raises, and TimeoutError naming the operation and the job when `default_timeout` seconds pass.

    With `reconnect`, a call that fails because the trainer's process is gone starts the job again, loads the last state
    that this client saved, and raises ReconnectedError, which says from which step to go on; the client then works.
    Without such a state it raises the same, and so does every later call: the new process holds the base weights.
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
        *,
        reconnect: bool = False,
    ) -> None:
        api_key = fw_api_key or os.environ.get("FIREWORKS_API_KEY")
        if not api_key:
            raise ConfigError("fw_api_key", fw_api_key, "pass a key or set FIREWORKS_API_KEY")
        self.default_timeout = default_timeout
        self._manager, self._job_id = rlor_mgr, job_id
        self._model = {"base_model": base_model, "lora_rank": lora_rank}
        self._api_key, self._reconnect = api_key, reconnect
        self._num_steps = 0
        self._saved: tuple[str, int] | None = None
        self._lost: ReconnectedError | None = None
        self._connect(endpoint if endpoint is not None else rlor_mgr.wait_for_existing(job_id))

    def _connect(self, endpoint: TrainerServiceEndpoint) -> None:
        from fireworks.training.sdk import FiretitanServiceClient

        self._endpoint = endpoint
        self._service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=self._api_key)
        self._inner = self._service.create_training_client(**self._model)

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
        """The trainer job's id."""
        return self._job_id

    def forward(self, data: Sequence[Any], loss_fn: str = "cross_entropy") -> Any:
        """Loss and `logprobs` per datum without touching gradients."""
        return self._result("forward", lambda: self._inner.forward(to_datums(data), loss_fn))

    def forward_backward(
        self, data: Sequence[Any], loss_fn: str = "cross_entropy", loss_fn_config: dict[str, Any] | None = None
    ) -> Any:
        """Add the gradient of a loss that the server knows; returns its metrics and `logprobs` per datum."""
        send = lambda: self._inner.forward_backward(to_datums(data), loss_fn, loss_fn_config)  # noqa: E731
        return self._result("forward_backward", send)

    def forward_backward_custom(self, data: Sequence[Any], loss_fn: Callable[..., Any]) -> Any:
        """Add the gradient of `loss_fn(data, logprobs) -> (loss, metrics)`, which runs here, in torch."""
        run = lambda: self._inner.forward_backward_custom(to_datums(data), loss_fn).result(self.default_timeout)  # noqa: E731
        return self._result("forward_backward_custom", lambda: in_thread("forward_backward_custom", run))

    def optim_step(self, params: Any, grad_accumulation_normalization: str | None = None) -> Any:
        """One AdamW step on the accumulated gradient, normalized as asked."""
        mode = grad_accumulation_normalization
        send = lambda: self._inner.optim_step(to_adam(params), grad_accumulation_normalization=mode)  # noqa: E731
        result = self._result("optim_step", send)
        self._num_steps += 1
        return result

    def save_state(self, name: str, timeout: int = STATE_TIMEOUT_S) -> Any:
        """Write a checkpoint that can be resumed from; `path` of the result is the name to load."""
        saved = self._result("save_state", lambda: self._inner.save_state(name), timeout)
        self._saved = saved.path.rsplit("/", 1)[-1], self._num_steps
        return saved

    def load_state_with_optimizer(self, path: str, timeout: int = STATE_TIMEOUT_S) -> Any:
        """Replace weights and optimizer by a checkpoint's: a name of this job or a reference to another job's."""
        send = lambda: self._inner.load_state_with_optimizer(path)  # noqa: E731
        return self._result("load_state_with_optimizer", send, timeout)

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: str | None = None, timeout: int = STATE_TIMEOUT_S
    ) -> Any:
        """Write weights for sampling or promotion; `snapshot_name` of the result identifies them."""
        run = lambda: self._inner.save_weights_for_sampler_ext(name, checkpoint_type=checkpoint_type)  # noqa: E731
        what = "save_weights_for_sampler_ext"
        return self._result(what, lambda: in_thread(what, run), timeout)

    def resolve_checkpoint_path(self, name: str, source_job_id: str | None = None) -> str:
        """The reference under which this trainer can load a checkpoint, of another job when one is named."""
        return str(self._inner.resolve_checkpoint_path(name, source_job_id))

    def list_checkpoints(self) -> list[str]:
        """Names of the checkpoints that this trainer can resume from."""
        names: list[str] = self._result(
            "list_checkpoints", lambda: in_thread("list_checkpoints", self._inner.list_checkpoints)
        )
        return names

    def close(self) -> None:
        """End the session. The trainer job itself goes on."""
        self._service.close()

    def _result(self, what: str, send: Callable[[], Waitable], timeout: float | None = None) -> Any:
        """Send a request and wait for its result. Every call to the trainer goes through here."""
        from fireworks.training.sdk import TrainingError

        if self._lost is not None:
            raise self._lost
        seconds = timeout or self.default_timeout
        try:
            return wait(send(), seconds, f"{what} on trainer {self._job_id}")
        except (TrainingError, RuntimeError, TimeoutError) as exc:
            if self._reconnect and self._is_gone():
                raise self._go_on(what) from exc
            raise

    def _is_gone(self) -> bool:
        """Whether the process that this client spoke to has ended, as opposed to having refused a request."""
        if self._manager.get(self._job_id).get("state") != RUNNING:
            return True
        from fireworks.training.sdk import TrainingError

        try:
            wait(in_thread("get_info", self._inner.get_info), PROBE_TIMEOUT_S, "get_info")
        except (TrainingError, TimeoutError):  # it does not know the model, or nobody answers
            return True
        return False

    def _go_on(self, what: str) -> ReconnectedError:
        self._service.close()
        self._connect(self._manager.reconnect_and_wait(self._job_id))
        lost = f"{what}: trainer {self._job_id} has a new process"
        if self._saved is None:
            fix = "it holds the base weights, and this client has saved no state: start a new client and load one"
            self._lost = ReconnectedError(f"{lost}; {fix}", None, 0)
            return self._lost
        name, self._num_steps = self._saved
        self.load_state_with_optimizer(name)
        done = f"{self._num_steps} optimizer steps of this client"
        return ReconnectedError(f"{lost}; {name!r}, saved behind {done}, is loaded: go on there", name, self._num_steps)


def wait(future: Waitable, seconds: float, what: str) -> Any:
    """The future's result, or TimeoutError saying what took longer than `seconds`."""
    try:
        return future.result(timeout=seconds)
    except (TimeoutError, FutureTimeout) as exc:
        raise TimeoutError(f"{what} gave no result in {seconds} s") from exc


def in_thread(name: str, call: Callable[[], T]) -> Future[T]:
    """Run a call that blocks without a deadline of its own.

    A daemon thread does not hold up the exit of a script that gave up waiting, and takes no place in a pool.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever stops waiting does not cancel what runs already

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as exc:  # noqa: BLE001 - handed to the caller's thread, which raises it
            future.set_exception(exc)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


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
