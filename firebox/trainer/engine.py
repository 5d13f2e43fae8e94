"""The engine: one plain thread that executes commands on the live weights.

Owns the base model and the state of every model trained on it. Knows no sessions, sequence numbers or HTTP: commands
arrive in the order in which they must happen, as plain values that another rank could execute as well.

A long command pauses between its micro-batches, and commands of other models may be executed meanwhile.

Invariant: a command happens completely or not at all. A mistake in its data is found before anything changes; whatever
goes wrong later leaves the weights and the gradients that were there before.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import torch

from firebox.modeling.causal_lm import load_causal_lm
from firebox.trainer import embeddings, mixed, passes
from firebox.trainer.adapter_source import find_adapter
from firebox.trainer.checkpoint import (
    checkpoints_dir,
    find_checkpoint,
    read_checkpoint_tensors,
    save_checkpoint,
    snapshots_dir,
)
from firebox.trainer.lora import Adapter
from firebox.trainer.passes import PassResult
from firebox.trainer.publish import publish, snapshot_dtype, snapshot_kind
from firebox.trainer.retained import Retained, memory_budget
from firebox.trainer.state import ModelState
from firebox.trainer.steps import Steps, at_one_go, in_each_step
from firebox.weights.manifest import CheckpointManifest, sweep_scratch
from firebox.wire.errors import FailedPrecondition, FireboxError, InvalidArgument, NotFound
from firebox.wire.names import check_snapshot_id
from firebox.wire.training import (
    AdapterLoaded,
    Command,
    CreateModel,
    Failed,
    Forward,
    LoadAdapter,
    LoadState,
    ModelCreated,
    ModelUnloaded,
    OptimStep,
    OptimStepOutput,
    Result,
    SavedForSampler,
    SaveForSampler,
    SaveState,
    StateLoaded,
    StateSaved,
    UnloadModel,
    failed,
)
from firebox.wire.worker import TrainerSpec

log = logging.getLogger(__name__)


class Engine:
    """One base model and what is trained on it. Loading is blocking; nothing here is safe for two threads."""

    def __init__(self, spec: TrainerSpec) -> None:
        torch.set_num_threads(spec.runtime.threads)
        self._spec = spec
        self._job_dir = Path(spec.job_dir)
        for directory in (checkpoints_dir(self._job_dir), snapshots_dir(self._job_dir)):
            sweep_scratch(directory)
        # Weights stay float32, whatever the matrix products are computed in: small updates would be lost otherwise.
        bitwise = spec.runtime.mode == "bitwise"
        if bitwise and spec.dtype != "float32":
            raise FailedPrecondition(f"bitwise mode: {spec.dtype} products are rounded by company; train in float32")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._lm = load_causal_lm(Path(spec.model_dir), device=device, bitwise=bitwise)
        trains_base = not (spec.lora_rank or spec.forward_only)
        self._lm.model.requires_grad_(trains_base)
        self._base = ModelState(dict(self._lm.model.named_parameters()) if trains_base else {})
        self._models: dict[str, ModelState] = {}
        self._retained = Retained(memory_budget(self._lm.device))
        self._handlers: dict[type, Callable[[str, Any], Result | Steps[Result]]] = {
            CreateModel: self._create_model,
            UnloadModel: self._unload_model,
            Forward: self._forward,
            OptimStep: self._optim_step,
            SaveState: self._save_state,
            LoadState: self._load_state,
            LoadAdapter: self._load_adapter,
            SaveForSampler: self._save_for_sampler,
        }

    @property
    def shares_weights(self) -> bool:
        """Whether all models are one set of live weights, so that their commands have one order."""
        return self._spec.lora_rank == 0

    @property
    def architecture(self) -> str:
        return str(self._lm.model.config.model_type)

    def execute(self, command: Command) -> Result:
        """Execute one command at one go; see `begin`."""
        return at_one_go(self.begin(command))

    def begin(self, command: Command) -> Steps[Result]:
        """Execute one command in steps. Between two of them, commands of models that share no weights may come.

        Never raises: a mistake becomes a `Failed` result, and so does a bug of ours.
        """
        try:
            with self._precision():
                result = self._handlers[type(command.operation)](command.model_id, command.operation)
            return (yield from in_each_step(self._precision, result)) if isinstance(result, Generator) else result
        except FireboxError as error:
            return failed(error)
        except Exception as error:  # noqa: BLE001  one command's bug must not take down the others' training
            _log_bug(f"{type(command.operation).__name__} of {command.model_id}", error)
            return Failed(error=f"{type(error).__name__}: {error}", category="server")

    def may_share(self, command: Command) -> bool:
        """Whether others' commands may run in the same passes: small ones of LoRA models, in the throughput mode."""
        state = self._models.get(command.model_id)
        if self._spec.runtime.mode != "throughput" or state is None or state.adapter is None:
            return False
        return isinstance(command.operation, Forward) and mixed.pays(command.operation)

    def execute_together(self, commands: Sequence[Command]) -> list[Result]:
        """Execute commands of different models that `may_share` allows; when that fails, each of them alone."""
        try:
            with self._precision():
                return self._forward_backward_together(commands)
        except FireboxError:
            pass  # one of them is wrong: alone, it fails with its reason, and the others do not
        except Exception as error:  # noqa: BLE001  as in `begin`; whichever has caused it fails again when it runs alone
            _log_bug(f"a pass of {len(commands)} models", error)
        return [self.execute(command) for command in commands]

    def _forward_backward_together(self, commands: Sequence[Command]) -> list[Result]:
        states = [self._models[command.model_id] for command in commands]
        shares = [
            mixed.Share(command.operation, state.adapter)
            for command, state in zip(commands, states, strict=True)
            if isinstance(command.operation, Forward) and state.adapter
        ]
        self._retained.activate(None)
        with contextlib.ExitStack() as gradients:
            for state in states:
                gradients.enter_context(state.accumulating())
            results = mixed.run(self._lm, shares, self._spec.max_context_length)
        for state, result in zip(states, results, strict=True):
            state.count(result.num_loss_tokens, result.num_sequences)
        return [result.output for result in results]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self._lm.device.type, torch.bfloat16, enabled=self._spec.dtype == "bfloat16")

    def _create_model(self, model_id: str, create: CreateModel) -> ModelCreated:
        rank = create.lora_config.rank
        self._check_create(create)
        if rank == 0:
            # Full-parameter training has one set of live weights; who creates it again attaches to it.
            state = self._base
        else:
            adapter = Adapter(self._lm, create.lora_config)
            state = ModelState(adapter.parameters, adapter)
            if create.state is not None:
                self._load(state, create.state)
        self._models[model_id] = state
        return ModelCreated(model_id=model_id, is_lora=rank > 0, lora_rank=rank, step=state.step)

    def _check_create(self, create: CreateModel) -> None:
        spec, rank = self._spec, create.lora_config.rank
        if _model_name(create.base_model) not in [_model_name(name) for name in (spec.base_model, *spec.aliases)]:
            raise InvalidArgument(
                f"base_model: {create.base_model!r} is not loaded; this job trains {spec.base_model!r}"
            )
        if create.projection_head_dim is not None:
            raise InvalidArgument("projection_head_dim: projection heads are not supported; leave the field out")
        if not 0 <= rank <= spec.lora_rank:
            raise InvalidArgument(
                f"lora_config.rank: {rank} must lie between 0 and this job's lora_rank, {spec.lora_rank}; "
                "create the job with a larger lora_rank"
            )
        if create.base_only and (rank or not self._base_is_frozen):
            raise InvalidArgument(
                "base_only: this job trains the base weights themselves; use a forward-only job as the reference"
            )
        if rank == 0 and spec.lora_rank and not (create.base_only or spec.forward_only):
            raise InvalidArgument(f"lora_config.rank: this is a LoRA job; ask for a rank from 1 to {spec.lora_rank}")
        if rank and spec.forward_only:
            raise InvalidArgument("lora_config.rank: this is a forward-only job, which trains nothing; ask for rank 0")

    @property
    def _base_is_frozen(self) -> bool:
        return not self._base.parameters

    def _unload_model(self, model_id: str, _: UnloadModel) -> ModelUnloaded:
        self._models.pop(model_id, None)
        self._retained.activate(None)
        return ModelUnloaded(model_id=model_id)

    def _forward(self, model_id: str, request: Forward) -> Steps[Result]:
        if request.backward:
            return self._forward_backward(self._trainable(model_id, "forward_backward"), request)
        return self._score(self._model(model_id), request)

    def _score(self, state: ModelState, request: Forward) -> Steps[Result]:
        # No backward pass can follow on frozen weights.
        retained = self._retained if state.parameters else None
        return (yield from self._run(state, request, retained)).output

    def _forward_backward(self, state: ModelState, request: Forward) -> Steps[Result]:
        with state.accumulating():
            result = yield from self._run(state, request, self._retained)
        state.count(result.num_loss_tokens, result.num_sequences)
        return result.output

    def _run(self, state: ModelState, request: Forward, retained: Retained | None) -> Steps[PassResult]:
        @contextlib.contextmanager
        def active() -> Iterator[None]:
            self._retained.activate(state)
            with state.active():
                yield

        if embeddings.wanted(request):
            with active():
                return embeddings.run(self._lm, request, self._spec.max_context_length)
        steps = passes.steps(self._lm, request, self._spec.max_context_length, retained)
        return (yield from in_each_step(active, steps))

    def _optim_step(self, model_id: str, step: OptimStep) -> OptimStepOutput:
        state = self._trainable(model_id, "optim_step")
        self._retained.weights_change(state)
        metrics = state.optim_step(step.adam_params, step.normalization)
        line = {"time": _now(), "model_id": model_id, "step": state.step, **metrics}
        with (self._job_dir / "metrics.jsonl").open("ab") as file:
            file.write(msgspec.json.encode({k: v for k, v in line.items() if not k.endswith(":last")}) + b"\n")
        return OptimStepOutput(metrics=metrics)

    def _save_state(self, model_id: str, save: SaveState) -> StateSaved:
        state = self._trainable(model_id, "save_state")
        manifest = CheckpointManifest(
            name=save.name,
            base_model=self._spec.base_model,
            step=state.step,
            created_at=_now(),
            files=[],
            adapter=state.adapter.info if state.adapter else None,
        )
        save_checkpoint(self._job_dir, state.tensors(), manifest)
        return StateSaved(path=save.name)

    def _load_state(self, model_id: str, load: LoadState) -> StateLoaded:
        state = self._trainable(model_id, "load_state")
        self._retained.weights_change(state)
        self._load(state, load)
        return StateLoaded(path=load.ref, model_id=model_id)

    def _load(self, state: ModelState, load: LoadState) -> None:
        directory, manifest = find_checkpoint(load.ref, self._spec)
        if manifest.adapter is not None and _model_name(manifest.base_model) != _model_name(self._spec.base_model):
            raise FailedPrecondition(
                f"path: {load.ref!r} is an adapter of {manifest.base_model!r}, this job trains "
                f"{self._spec.base_model!r}",
                reason="CHECKPOINT_MISMATCH",
            )
        state.load(read_checkpoint_tensors(directory, manifest), optimizer=load.optimizer)

    def _load_adapter(self, model_id: str, load: LoadAdapter) -> AdapterLoaded:
        state = self._trainable(model_id, "load_adapter")
        if state.adapter is None:
            raise InvalidArgument("load_adapter: all weights are trained here; create a LoRA model, or use load_state")
        values = state.adapter.values_of(find_adapter(load.path, self._spec))
        self._retained.weights_change(state)
        state.load({f"weights/{name}": value for name, value in values.items()}, optimizer=False)
        return AdapterLoaded(adapter_path=load.path, model_id=model_id)

    def _save_for_sampler(self, model_id: str, save: SaveForSampler) -> SavedForSampler:
        state = self._trainable(model_id, "save_weights_for_sampler")
        identity = check_snapshot_id("path", save.name)
        parent = state.last_snapshot
        kind = snapshot_kind(save.checkpoint_type, state.adapter, parent)
        dtype = snapshot_dtype(save, getattr(torch, self._spec.dtype))
        with state.active():
            publish(
                snapshots_dir(self._job_dir) / identity,
                self._lm,
                state.adapter,
                kind=kind,
                parent=parent,
                base_model=self._spec.base_model,
                step=state.step,
                dtype=dtype,
            )
        state.last_snapshot = identity
        return SavedForSampler(path=identity)

    def _model(self, model_id: str) -> ModelState:
        if model_id not in self._models:
            raise NotFound(f"model_id: {model_id!r} could not be created or was unloaded", reason="MODEL_NOT_FOUND")
        return self._models[model_id]

    def _trainable(self, model_id: str, operation: str) -> ModelState:
        state = self._model(model_id)
        if not state.parameters:
            raise FailedPrecondition(
                f"{operation}: {model_id} is frozen (forward-only job or base_only model); only forward works here",
                reason="MODEL_FROZEN",
            )
        return state


def _log_bug(what: str, error: Exception) -> None:
    log.error("%s failed\n%s", what, "".join(traceback.format_exception(error)))


def _model_name(resource: str) -> str:
    return resource.rpartition("/")[2].lower()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
