"""Hot-load: change the weights of a running sampler, or leave them alone and say why.

    SERVING -> FETCHING -> VERIFIED -> PAUSED -> SWAPPED -> SERVING
                  \\___________\\________\\______________/   a refusal: the old weights serve on, with a reason

Owns what is loaded and how a snapshot becomes tensors. Does not know who decided on the snapshot. Files are read and
checked on a thread of their own while the engine serves; only the copy into the live weights pauses it.

Invariant: nothing is copied before everything is checked, and nothing is served before the copied weights give the
log-probs that the trainer stored with them. Should that fail, the weights before are loaded again from where they came;
should that fail as well, the weights are unknown and the stage is `error`: requests are refused until a whole snapshot
is loaded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from firebox.modeling.causal_lm import CausalLM, load_causal_lm
from firebox.sampler.engine import Engine, Swap
from firebox.weights.manifest import PROBE_TOLERANCE, Probe, SnapshotManifest, read_snapshot, verify
from firebox.weights.peft import Factors, read_peft
from firebox.wire.errors import FailedPrecondition, FireboxError, Unavailable
from firebox.wire.worker import (
    Canary,
    HotloadCommand,
    HotloadStage,
    HotloadStep,
    ReplicaStatus,
    SamplerSpec,
    SnapshotRef,
)

_Fetch = Callable[[], "_Fetched"]

_DRAIN_DEADLINE_S: Final = 600.0
"""How long a SYNC swap waits for the requests in flight before it gives up."""

logger = logging.getLogger(__name__)


class Hotloader:
    """Loads one snapshot at a time into the engine's model; `status` answers at any moment."""

    def __init__(self, spec: SamplerSpec, lm: CausalLM, engine: Engine) -> None:
        self._spec = spec
        self._engine = engine
        self._live = _LiveWeights(spec, lm)
        self._one_at_a_time = asyncio.Lock()
        self._stage: HotloadStage = "serving"
        self._begun = 0.0
        self._timeline: list[HotloadStep] = []
        self._canary: Canary | None = None
        self._source = Path(spec.adapter_dir) if spec.adapter_dir else None
        self._current: str | None = None
        self._target: str | None = None
        self._error = ""

    def status(self) -> ReplicaStatus:
        return ReplicaStatus(
            current_snapshot_identity=self._current,
            stage=self._stage,
            target_snapshot_identity=self._target,
            error=self._error,
            in_flight=self._engine.in_flight,
            base_model=self._spec.base_model,
            timeline=list(self._timeline),
            canary=self._canary,
        )

    def check_serving(self) -> None:
        """Raises Unavailable when the live weights are unknown."""
        if self._stage == "error":
            raise Unavailable(f"the weights are damaged ({self._error}); hot-load a base snapshot or restart")

    def is_live(self, snapshot: SnapshotRef | None) -> bool:
        """Whether the live weights are those of `snapshot`, or the base model's."""
        return self._stage != "error" and self._current == (snapshot.identity if snapshot else None)

    async def load(self, command: HotloadCommand) -> None:
        """Load the snapshot of `command`, or keep what is loaded; `status` tells which, and why."""
        await self._replace(command.identity, lambda: self._fetch(command))

    async def serve(self, snapshot: SnapshotRef | None) -> None:
        """Make the weights of `snapshot`, or the base model's, the live ones; raises FailedPrecondition if not."""
        if snapshot is None:
            await self._replace(None, lambda: _Fetched(None, self._live.base(), None))
        else:
            await self.load(HotloadCommand(identity=snapshot.identity, path=snapshot.dir))
        if self._error:
            raise FailedPrecondition(f"the weights cannot be sampled from: {self._error}", reason="WEIGHTS_REFUSED")

    async def _replace(self, identity: str | None, fetch: _Fetch) -> None:
        async with self._one_at_a_time:
            before = self._stage
            self._target, self._error = identity, ""
            self._begun, self._timeline = time.monotonic(), []
            try:
                self._enter("fetching")
                fetched = await asyncio.to_thread(fetch)
                self._enter("verified")
                await self._swap(identity, fetched)
            except FireboxError as error:
                self._fail(before, error.message, error)
            except Exception as error:  # noqa: BLE001 - foreign files fail in many ways; nothing has been copied yet
                self._fail(before, f"cannot be read: {type(error).__name__}: {error}", error)

    def _enter(self, stage: HotloadStage) -> None:
        self._stage = stage
        self._timeline.append(HotloadStep(stage, round(time.monotonic() - self._begun, 6)))

    def _fail(self, stage: HotloadStage, reason: str, error: Exception) -> None:
        logger.warning("hot-load of %s failed: %s", self._target, reason, exc_info=error)
        self._enter(stage)
        self._error = reason

    def _fetch(self, command: HotloadCommand) -> _Fetched:
        directory = Path(command.path)
        manifest = read_snapshot(directory)
        if manifest is None:
            raise FailedPrecondition(f"path: no committed snapshot in {directory}", reason="SNAPSHOT_MISSING")
        self._check(manifest, command)
        verify(directory, manifest)
        return _Fetched(directory, self._live.stage(directory, manifest), manifest.probe)

    def _check(self, manifest: SnapshotManifest, command: HotloadCommand) -> None:
        if manifest.identity != command.identity:
            raise FailedPrecondition(
                f"identity: {command.identity!r} was asked for, the snapshot there is {manifest.identity!r}",
                reason="IDENTITY_MISMATCH",
            )
        if manifest.base_model != self._spec.base_model:
            raise FailedPrecondition(
                f"base_model: snapshot {manifest.identity!r} is of {manifest.base_model!r}, this deployment serves "
                f"{self._spec.base_model!r}; hot-load it into a deployment of its own base model",
                reason="BASE_MODEL_MISMATCH",
            )
        if manifest.kind == "delta":
            for name, value in (("parent", manifest.parent), ("previous_snapshot_identity", command.previous)):
                if value is None or value != self._current:
                    raise FailedPrecondition(
                        f"{name}: delta {manifest.identity!r} builds on {value!r}, loaded is {self._current!r}; "
                        "hot-load a base snapshot first",
                        reason="PARENT_MISMATCH",
                    )
        elif command.previous is not None:
            raise FailedPrecondition(
                f"previous_snapshot_identity: {command.previous!r} was given, but {manifest.identity!r} is a "
                f"{manifest.kind}, which stands alone; leave it out",
                reason="PARENT_MISMATCH",
            )

    async def _swap(self, identity: str | None, fetched: _Fetched) -> None:
        self._enter("paused")
        swap = Swap(apply=lambda: self._apply(fetched), identity=identity, drain=self._spec.transition == "SYNC")
        self._engine.swap(swap)
        try:
            await asyncio.wait_for(asyncio.wrap_future(swap.done), _DRAIN_DEADLINE_S)
        except TimeoutError as error:
            raise FailedPrecondition(
                f"requests in flight did not end within {_DRAIN_DEADLINE_S:g} s; use transition ASYNC, or retry later",
                reason="DRAIN_DEADLINE_EXCEEDED",
            ) from error
        except asyncio.CancelledError as error:
            if not swap.done.cancelled():
                raise
            raise Unavailable("the sampler is stopping") from error
        except _RestoredError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever broke the copy: the weights are unknown from here on
            self._current = None
            self._fail("error", f"the swap broke: {_reason(error)}", error)
        else:
            self._enter("serving")
            self._current, self._target, self._source = identity, None, fetched.directory

    def _apply(self, fetched: _Fetched) -> None:
        """Runs on the engine's thread. Raises _RestoredError when the new weights broke and the old ones are back."""
        probe = fetched.probe
        before = self._live.score(probe) if probe is not None else None
        try:
            self._live.copy(fetched.tensors)
            self._enter("swapped")
            self._canary = self._live.prove(probe, before) if probe is not None and before is not None else None
        except (RuntimeError, FireboxError) as error:
            # Reading them again takes a while, but a second copy of all weights is not kept for this rare case.
            self._live.copy(self._live.read(self._source))
            raise _RestoredError(f"{_reason(error)}; the weights before are back", reason="SWAP_BROKE") from error


class _Fetched(NamedTuple):
    """Weights read and checked: where they lie (None: they are the base model's), and the trainer's probe of them."""

    directory: Path | None
    tensors: dict[str, Tensor]
    probe: Probe | None


class _RestoredError(FailedPrecondition):
    """A swap that did no harm."""


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, FireboxError) else f"{type(error).__name__}: {error}"


class _LiveWeights:
    """The weights that serve, by Hugging Face name, and what it takes to replace them.

    An adapter stands on the base model, not on whatever was loaded before: `_changed` names the weights that differ
    from the base model now, and so must be restored by the next adapter. Where a model ties its head to its embedding,
    an adapter of the head, alone or merged into full weights, gives the head a weight of its own until the next load;
    the embedding stays as it is.
    """

    def __init__(self, spec: SamplerSpec, lm: CausalLM) -> None:
        self._spec = spec
        self._lm = lm
        self._dtype = next(lm.model.parameters()).dtype
        self._tensors: dict[str, Tensor] = {}
        self._canonical: dict[str, str] = {}  # tied names -> the one they share storage with
        first: dict[int, str] = {}
        for name, tensor in lm.model.state_dict(keep_vars=True).items():
            self._canonical[name] = first.setdefault(id(tensor), name)
            self._tensors[first[id(tensor)]] = tensor.data
        head = next(name for name, module in lm.model.named_modules() if module is lm.head) + ".weight"
        self._tied_head = head if self._canonical[head] != head else None
        self._changed: set[str] = set()
        self._base: Mapping[str, Tensor] | None = None
        if spec.adapter_dir is not None:
            self.copy(self._merged(Path(spec.adapter_dir)))

    def stage(self, directory: Path, manifest: SnapshotManifest) -> dict[str, Tensor]:
        """Read a snapshot into the tensors to be copied, checking every name, shape and dtype. Live weights rest."""
        if manifest.kind == "adapter":
            return self._merged(directory)
        staged: dict[str, Tensor] = {}
        for name, tensor in _read([directory / e.path for e in manifest.files if e.path.endswith(".safetensors")]):
            self._check(name, tensor)
            if manifest.untied_head and name == self._tied_head:
                staged[name] = tensor
                continue
            known = staged.setdefault(self._canonical[name], tensor)
            if known is not tensor and not torch.equal(known, tensor):
                raise _mismatch(f"{name}: differs from {self._canonical[name]}, to which this model ties it")
        missing = sorted(self._tensors.keys() - staged.keys())
        if missing:
            raise _mismatch(f"{missing[0]}: missing in the snapshot ({len(missing)} of {len(self._tensors)} are)")
        return staged

    def copy(self, staged: Mapping[str, Tensor]) -> None:
        """Write `staged` into the live weights. Runs on the engine's thread once that serves."""
        own = {name: tensor for name, tensor in staged.items() if name in self._tensors}
        self._changed |= own.keys()
        for name, tensor in own.items():
            self._tensors[name].copy_(tensor)
        self._changed = set(own)
        if self._tied_head is not None:
            shared = self._tensors[self._canonical[self._tied_head]]
            weight = staged.get(self._tied_head, shared).to(shared.device)
            self._lm.head.weight = nn.Parameter(weight, requires_grad=False)

    def base(self) -> dict[str, Tensor]:
        """What to copy to be the base model again."""
        if self._base is None:
            self._base = self._load_base() if self._changed else None
        return {name: self._base[name] for name in self._changed} if self._base else {}

    def read(self, directory: Path | None) -> dict[str, Tensor]:
        """The weights in `directory`, a snapshot or a promoted adapter, or the base model's, once more."""
        if directory is None:
            return self.base()
        manifest = read_snapshot(directory)
        return self._merged(directory) if manifest is None else self.stage(directory, manifest)

    def score(self, probe: Probe) -> Tensor:
        """Log-probs of `probe` under the live weights, in nats, on the CPU."""
        return self._lm.score(torch.tensor(probe.tokens, device=self._lm.device)).cpu()

    def prove(self, probe: Probe, before: Tensor) -> Canary:
        """Compare with the trainer, and with what the weights `before` gave; raises FailedPrecondition if too far."""
        computed = self.score(probe)
        difference = (computed - torch.tensor(probe.logprobs)).abs().max().item()
        allowed = PROBE_TOLERANCE[str(self._dtype).removeprefix("torch.")]
        if not difference <= allowed:
            raise _mismatch(f"log-probs differ from the trainer's by {difference:.2e} nats, at most {allowed} is right")
        return Canary(difference, (computed - before).abs().max().item())

    def _check(self, name: str, tensor: Tensor) -> None:
        if name not in self._canonical:
            raise _mismatch(f"{name}: this model has no such weight")
        live = self._tensors[self._canonical[name]]
        if tensor.shape != live.shape or tensor.dtype != live.dtype:
            raise _mismatch(
                f"{name}: the snapshot has {tensor.dtype} {list(tensor.shape)}, the model {live.dtype} "
                f"{list(live.shape)}"
            )

    def _merged(self, directory: Path) -> dict[str, Tensor]:
        """W + scale * B @ A, in float32 from the base model's W; and W itself where an earlier load changed it."""
        adapter = read_peft(directory)
        staged = self.base()
        if self._base is None:
            self._base = self._load_base()
        for layer, factors in adapter.factors.items():
            target = f"{layer}.weight"
            if target not in self._tensors and target != self._tied_head:
                raise _mismatch(f"{layer}: the adapter has factors for it, but this model has no such layer")
            staged[target] = _merge(layer, self._base[self._canonical[target]], factors, adapter.scale)
        return staged

    def _load_base(self) -> dict[str, Tensor]:
        model = load_causal_lm(Path(self._spec.model_dir), dtype=self._dtype).model
        return {name: tensor for name, tensor in model.state_dict().items() if name in self._tensors}


def _merge(layer: str, weight: Tensor, factors: Factors, scale: float) -> Tensor:
    a, b = factors
    if (b.shape[0], a.shape[1]) != tuple(weight.shape):
        raise _mismatch(f"{layer}: factors {list(b.shape)} x {list(a.shape)} do not fit its {list(weight.shape)}")
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _read(paths: list[Path]) -> list[tuple[str, Tensor]]:
    tensors = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors += [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118 - not a dict
    return tensors


def _mismatch(message: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason="WEIGHTS_MISMATCH")
