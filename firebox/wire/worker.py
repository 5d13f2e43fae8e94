"""What the server tells a worker process, and what a worker tells the server.

A spec is written as one 0600 JSON file; its path is the worker's only argument. A worker answers on a unix
socket, and every request there carries the spec's token in `WORKER_TOKEN_HEADER`.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from firebox.wire.training import LoadState, LoraConfig

WORKER_TOKEN_HEADER: Final = "x-firebox-worker-token"

DEFAULT_MAX_BATCH: Final = 64
"""How many sequences a sampler decodes at once, unless it is told otherwise."""

SnapshotKind = Literal["base", "delta", "adapter"]
ComputeMode = Literal["exact", "bitwise", "throughput"]
"""What a result may depend on: exact, on its own request alone; bitwise, the same and to the last bit in trainer and
sampler alike, or the worker refuses to start; throughput, on company too, because LoRA models share passes: to 1e-6."""

HotloadStage = Literal["fetching", "verified", "paused", "swapped", "serving", "error"]


class WorkerRuntime(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker is reached and when it gives up.

    `lease` is a file that the server keeps locked while it lives; a worker that finds it unlocked for
    `orphan_grace_s` seconds exits. `ready_fd` is an inherited pipe that gets one JSON `ReadyNotice` line.
    `devices` are the accelerators it was given, as CUDA calls them.
    """

    socket: str
    token: str
    lease: str | None = None
    orphan_grace_s: float = 8.0
    ready_fd: int | None = None
    threads: int = 1
    devices: list[str] = []
    mode: ComputeMode = "exact"


class ReadyNotice(msgspec.Struct, frozen=True, kw_only=True):
    """The one line a worker writes to `ready_fd`: ready, or why it could not start."""

    ready: bool
    error: str = ""


class WorkerAddress(msgspec.Struct, frozen=True):
    """Where a running worker listens, and the token every request to it carries."""

    socket: str
    token: str


class TrainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer process.

    `job` and `base_model` are resource names, and the model goes by its `aliases`, too. `job_dir` holds `checkpoints/`
    and `snapshots/` of this job, and `jobs_dir/<job id>/checkpoints` those of other jobs of the account (for
    `cross_job://`). `models_dir` holds the account's registered models, none for a trainer alone; `allow_dirs` are
    where adapters may be loaded from besides. `lora_rank` 0 is full-parameter training, otherwise the largest rank a
    model of this job may ask for. A `pooled` trainer serves sessions that the server opened, so it takes every session.
    """

    job: str
    base_model: str
    aliases: list[str] = []
    model_dir: str
    job_dir: str
    jobs_dir: str
    models_dir: str | None = None
    allow_dirs: list[str] = []
    max_context_length: int
    lora_rank: int = 0
    forward_only: bool = False
    pooled: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    runtime: WorkerRuntime


class SamplerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One sampler replica. `adapter_dir` is a PEFT directory when the served model is a promoted adapter."""

    deployment: str
    base_model: str
    model_dir: str
    max_context_length: int
    adapter_dir: str | None = None
    transition: Literal["ASYNC", "SYNC"] = "ASYNC"
    max_batch: int = DEFAULT_MAX_BATCH
    dtype: Literal["float32", "bfloat16"] = "float32"
    runtime: WorkerRuntime


class HotloadCommand(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/hotload`: load the snapshot whose manifest lies in `path`, which the server resolved.

    `previous` is the identity the client believes is loaded; it is checked for a delta and must be None otherwise.
    The call answers `ReplicaStatus` once the swap is done or refused.
    """

    identity: str
    path: str
    previous: str | None = None


class HotloadStep(msgspec.Struct, frozen=True):
    """When a load came to `stage`, in seconds from its beginning."""

    stage: HotloadStage
    seconds: float


class Canary(msgspec.Struct, frozen=True):
    """The probe scored right after a swap, in nats: how far from the trainer's log-probs, how far from those of the
    weights before."""

    trainer_difference: float
    movement: float


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /worker/status` of a sampler. `error` belongs to `target`; the old weights keep serving.

    `timeline` is of the last load, and `canary` of the last one that was served.
    """

    current_snapshot_identity: str | None
    stage: HotloadStage
    target_snapshot_identity: str | None = None
    error: str = ""
    in_flight: int = 0
    base_model: str = ""
    timeline: list[HotloadStep] = []
    canary: Canary | None = None


class CreateRun(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/runs` of a pooled trainer: make the model of a training run; answers once it is there.

    `state` is what it starts from, and `next_seq_id` where its sequence goes on, when the run was parked before.
    """

    session_id: str
    model_seq_id: int
    base_model: str
    lora_config: LoraConfig
    state: LoadState | None = None
    next_seq_id: int = 1


class ParkRun(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/runs/park`: save the model's state as `checkpoint` and unload it; answers `ParkedRun`."""

    model_id: str
    checkpoint: str


class ParkedRun(msgspec.Struct, frozen=True, kw_only=True):
    next_seq_id: int


class SavedAll(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/save_all` of a trainer whose job is about to be paused: the checkpoints it has saved."""

    checkpoints: list[str]


class RefuseOperation(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/runs/refuse`: the operation at this place fails with `error`; answers its request id."""

    model_id: str
    seq_id: int | None
    error: str


class SnapshotRef(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/sample` of a sampler says with this whose weights answer; none stands for the base model's.

    The call takes `{"snapshot": SnapshotRef | null, "request": <a Tinker sample request>}` and answers the result.
    """

    dir: str
    identity: str


class ExportRequest(msgspec.Struct, frozen=True, kw_only=True):
    """stdin of the export child: make `out_dir` a Hugging Face (or PEFT) directory from one snapshot.

    `chain` lists snapshot directories from a base to the wanted one (a single entry when it is itself a base
    or an adapter). The child reloads the result with plain transformers/peft and compares it with the probe.
    """

    chain: list[str]
    model_dir: str
    out_dir: str


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """stdout of the export child. `max_abs_diff` is over the probe's log-probs, in nats."""

    ok: bool
    kind: Literal["HF_BASE_MODEL", "HF_PEFT_ADDON"] = "HF_BASE_MODEL"
    max_abs_diff: float = 0.0
    parameter_count: int = 0
    lora_rank: int = 0
    target_modules: list[str] = []
    error: str = ""
