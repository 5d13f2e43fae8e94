"""The root API that Tinker clients speak: names of runs, samplers and checkpoints, and the bodies they come in.

Owns the spelling of `tinker://` paths and how one becomes an artifact id, a directory name that no path can hide in.
Training data is not here (`training`), nor is what the server makes of a request.

Invariant: a path and its artifact id say the same; each can be had from the other without asking anyone.
"""

from __future__ import annotations

import re
import uuid
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from firebox.wire.errors import InvalidArgument
from firebox.wire.names import check_snapshot_id

_SCHEME: Final = "tinker://"
_SESSION: Final = re.compile(r"session-([0-9a-f]{32})")
_RUN: Final = re.compile(r"session-([0-9a-f]{32}):train:(\d{1,9})")
_ARTIFACT: Final = re.compile(r"([0-9a-f]{32})-(\d{1,9})-(.+)")
_OWN_NAME: Final = re.compile(r"(sampling-session|parked)-.*")
_MIN_TTL_S: Final = 3600
_MAX_TTL_S: Final = 10 * 365 * 24 * 3600

DOWNLOADS: Final = "/api/v1/downloads/"
"""The path below which artifacts are fetched, by ticket and file name."""

CheckpointType = Literal["training", "sampler", "external"]
_SEGMENT: Final[dict[CheckpointType, str]] = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}
_EXTERNAL: Final = "external."
"""What the artifact of weights to take away is told by: it is kept among those for samplers."""


# -------------------------------------------------------------------------------------------------------------- names


class CheckpointPath(NamedTuple):
    """`tinker://<run>/weights/<name>` (training), or `sampler_weights`, or `external_weights` to take away."""

    run: str
    type: CheckpointType
    name: str

    @property
    def path(self) -> str:
        return f"{_SCHEME}{self.run}/{self.id}"

    @property
    def id(self) -> str:
        """What clients call the checkpoint id: its kind and name."""
        return f"{_SEGMENT[self.type]}/{self.name}"

    @property
    def artifact(self) -> str:
        """The name of its directory."""
        match = _RUN.fullmatch(self.run)
        assert match is not None, self.run
        return f"{match[1]}-{match[2]}-{_EXTERNAL if self.type == 'external' else ''}{self.name}"


def new_session_id() -> str:
    return f"session-{uuid.uuid4().hex}"


def run_id(session: str, model_seq_id: int) -> str:
    """The id of a training run, which clients form by themselves too; raises InvalidArgument for another session id."""
    if not _SESSION.fullmatch(session):
        raise InvalidArgument(f"session_id: {session!r} is not a session of this server; call create_session first")
    return f"{session}:train:{model_seq_id}"


def session_of(run: str) -> str:
    """The session of a run; raises InvalidArgument for what is no run id."""
    if not _RUN.fullmatch(run):
        raise InvalidArgument(f"model_id: {run!r} is not a training run of this server; create a model first")
    return run.partition(":")[0]


def sampler_id(session: str, sampling_session_seq_id: int) -> str:
    return f"{session}:sample:{sampling_session_seq_id}"


def checkpoint_path(run: str, type: CheckpointType, name: str) -> CheckpointPath:
    """The path of a checkpoint that a client is about to name; raises InvalidArgument for a name that is none."""
    session_of(run)
    if _OWN_NAME.fullmatch(name) or name.startswith(_EXTERNAL):
        raise InvalidArgument(f"path: {name!r} begins like a name of the server's own; choose another")
    found = CheckpointPath(run, type, check_snapshot_id("path", name))
    check_snapshot_id("path", found.artifact)
    return found


def sampling_session_checkpoint(run: str, sampling_session_seq_id: int) -> CheckpointPath:
    """Where the weights of a sampling session lie that was made without naming them."""
    session_of(run)
    return CheckpointPath(run, "sampler", f"sampling-session-{sampling_session_seq_id}")


def parked_checkpoint(run: str) -> CheckpointPath:
    """A fresh place for the state of a run that is taken out of memory."""
    return CheckpointPath(run, "training", f"parked-{uuid.uuid4().hex[:8]}")


def parse_path(path: str, *, field: str) -> CheckpointPath:
    """Read a `tinker://` path; raises InvalidArgument naming `field`."""
    run, _, rest = path.removeprefix(_SCHEME).partition("/")
    segment, _, name = rest.partition("/")
    types = {segment: type for type, segment in _SEGMENT.items()}
    if not path.startswith(_SCHEME) or segment not in types or not _RUN.fullmatch(run):
        raise InvalidArgument(
            f"{field}: {path!r} is not a checkpoint; expected tinker://<run>/weights/<name>, with sampler_weights or "
            "external_weights in place of weights for those kinds"
        )
    return CheckpointPath(run, types[segment], check_snapshot_id(field, name))


def of_artifact(artifact: str, type: Literal["training", "sampler"]) -> CheckpointPath:
    """The path whose `artifact` this is, found among those of `type`."""
    match = _ARTIFACT.fullmatch(artifact)
    assert match is not None, artifact
    run, name = f"session-{match[1]}:train:{match[2]}", match[3]
    if type == "sampler" and name.startswith(_EXTERNAL):
        return CheckpointPath(run, "external", name.removeprefix(_EXTERNAL))
    return CheckpointPath(run, type, name)


def sampler_of(path: CheckpointPath) -> str | None:
    """The sampler whose weights these are, when they were saved without a name."""
    own, _, number = path.name.rpartition("-")
    return sampler_id(session_of(path.run), int(number)) if own == "sampling-session" else None


def is_own(path: CheckpointPath) -> bool:
    """Whether the server made this checkpoint for itself; clients do not see those."""
    return _OWN_NAME.fullmatch(path.name) is not None


# ------------------------------------------------------------------------------------------------------------- bodies


class _Body(BaseModel):
    """Unknown fields are hints of other client generations and are ignored."""

    model_config = ConfigDict(protected_namespaces=())


class CreateSession(_Body):
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None
    tags: list[str] = []
    sdk_version: str = ""


class Heartbeat(_Body):
    session_id: str


class ModelAddress(_Body):
    model_id: str


class OptimizerConfig(_Body):
    type: str = "adamw"


class LoraSettings(_Body):
    """Without `alpha` these clients mean 32, whatever the rank."""

    rank: int = Field(ge=0)
    alpha: float = 32.0
    seed: int | None = None
    init_method: str | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class _NewRun(_Body):
    session_id: str
    model_seq_id: int = Field(ge=0, lt=10**9)
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerConfig | None = None

    @property
    def model_id(self) -> str:
        return run_id(self.session_id, self.model_seq_id)


class CreateModelBody(_NewRun):
    base_model: str
    lora_config: LoraSettings | None = None


class LoadNewModelBody(_NewRun):
    """`load_weights` that makes the model it loads into; `base_model` may repeat the one of the checkpoint."""

    path: str
    optimizer: bool
    base_model: str | None = None


class _Expiring(_Body):
    ttl_seconds: int | None = Field(default=None, ge=_MIN_TTL_S, le=_MAX_TTL_S)


class SaveBody(_Expiring):
    model_id: str
    seq_id: int | None = None
    path: str | None = None
    sampling_session_seq_id: int | None = Field(default=None, ge=0, lt=10**9)
    user_metadata: dict[str, str] | None = None
    age_encryption_recipients: list[str] | None = None


class SetTtl(_Expiring):
    pass


class CreateSampler(_Body):
    session_id: str
    sampling_session_seq_id: int = Field(ge=0, lt=10**9)
    base_model: str | None = None
    model_path: str | None = None


class SampleAddress(_Body):
    """What the server reads of a sample request; the rest is the sampler's."""

    sampling_session_id: str
    seq_id: int = Field(ge=0)
    num_samples: int = Field(default=1, ge=1, le=1024)


class WeightsInfoQuery(_Body):
    tinker_path: str


# ------------------------------------------------------------------------------------------------------------ answers


class Cursor(_Body):
    offset: int
    limit: int
    total_count: int


class RunCheckpoint(_Body):
    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int
    public: bool = False
    user_metadata: dict[str, str] | None = None
    expires_at: datetime | None = None

    @property
    def path(self) -> CheckpointPath:
        return parse_path(self.tinker_path, field="tinker_path")


class TrainingRun(_Body):
    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool = True
    corrupted: bool = False
    lora_rank: int
    last_request_time: datetime
    last_checkpoint: RunCheckpoint | None = None
    last_sampler_checkpoint: RunCheckpoint | None = None
    user_metadata: dict[str, Any] | None = None
