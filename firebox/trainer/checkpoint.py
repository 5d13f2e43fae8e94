"""Checkpoints for resume: write and read a flat dictionary of tensors as torch.distributed.checkpoint shards.

Owns the layout of a checkpoint directory and the way from a reference to that directory. Does not know what the
tensors mean. This is the one audited file in which torch reads its own metadata with pickle; it does so only after
every byte of the directory was compared with the manifest that this program wrote.

Invariant: a checkpoint that is listed is complete, and it never changes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from firebox.weights.manifest import (
    MANIFEST_NAME,
    CheckpointManifest,
    committed_dir,
    describe,
    read_checkpoint,
    read_snapshot,
    seal,
    verify,
)
from firebox.wire.errors import FailedPrecondition, NotFound
from firebox.wire.names import check_snapshot_id, parse_state_ref, split_resource
from firebox.wire.tinker import parse_path
from firebox.wire.worker import TrainerSpec

_ALONE: Final = "torch.distributed is disabled"


def checkpoints_dir(job_dir: Path) -> Path:
    return job_dir / "checkpoints"


def snapshots_dir(job_dir: Path) -> Path:
    return job_dir / "snapshots"


def list_checkpoints(job_dir: Path) -> list[str]:
    """Names of the complete checkpoints of a job, oldest first."""
    directory = checkpoints_dir(job_dir)
    entries = [p for p in directory.iterdir() if not p.name.startswith(".")] if directory.is_dir() else []
    manifests = [m for m in map(read_checkpoint, entries) if m is not None]
    return [m.name for m in sorted(manifests, key=lambda m: (m.created_at, m.name))]


def save_checkpoint(job_dir: Path, tensors: dict[str, Tensor], manifest: CheckpointManifest) -> None:
    """Commit `tensors` under `manifest.name`.

    Raises InvalidArgument for a name that is none and AlreadyExists for one that is taken.
    """
    target = checkpoints_dir(job_dir) / check_snapshot_id("path", manifest.name)
    with committed_dir(target) as scratch, _without_process_group():
        # `seal` makes the files durable, so the writer need not.
        writer = dcp.FileSystemWriter(scratch, sync_files=False)
        dcp.save(dict(tensors), storage_writer=writer, no_dist=True)
        seal(scratch, msgspec.structs.replace(manifest, files=describe(scratch)))


def find_checkpoint(ref: str, spec: TrainerSpec) -> tuple[Path, CheckpointManifest]:
    """The directory and manifest of a checkpoint of this job, or of another of its account, deleted ones included.

    Raises InvalidArgument for a malformed reference, FailedPrecondition when a sampler snapshot has that name, NotFound
    with the known names otherwise.
    """
    source, name = _source(ref, spec)
    directory = checkpoints_dir(source) / name
    manifest = read_checkpoint(directory)
    if manifest is not None:
        return directory, manifest
    if read_snapshot(snapshots_dir(source) / name) is not None:
        raise FailedPrecondition(
            f"path: {ref!r} is a sampler snapshot, which has no training state; "
            "load_state takes a name saved with save_state, and load_adapter an adapter that was promoted",
            reason="NOT_A_CHECKPOINT",
        )
    known = ", ".join(list_checkpoints(source)) or "none"
    raise NotFound(f"path: there is no checkpoint {ref!r}; saved ones: {known}", reason="CHECKPOINT_NOT_FOUND")


def _source(ref: str, spec: TrainerSpec) -> tuple[Path, str]:
    jobs_dir = Path(spec.jobs_dir)
    if ref.startswith("tinker://"):
        path = parse_path(ref, field="path")
        # The name of what a training run saved is unique, whichever pooled trainer the run lived in.
        homes = jobs_dir.glob(f"*/*/{path.artifact}/{MANIFEST_NAME}")
        return next((home.parents[2] for home in homes), Path(spec.job_dir)), path.artifact
    job, name = parse_state_ref(ref, split_resource(spec.job, "rlorTrainerJobs")[0])
    return (Path(spec.job_dir) if job is None else jobs_dir / job), name


def read_checkpoint_tensors(directory: Path, manifest: CheckpointManifest) -> dict[str, Tensor]:
    """The tensors of a checkpoint, on the CPU; raises FailedPrecondition when a file was changed or is missing."""
    verify(directory, manifest)
    with _without_process_group():
        reader = dcp.FileSystemReader(directory)
        stored = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if len(tensors) != len(stored):
            raise FailedPrecondition(f"{directory}: the checkpoint holds more than tensors", reason="ARTIFACT_DAMAGED")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextlib.contextmanager
def _without_process_group() -> Iterator[None]:
    """Silences torch's remark that a single process saves alone: here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_ALONE)
        yield
