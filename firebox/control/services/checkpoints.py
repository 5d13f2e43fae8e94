"""Checkpoints and snapshots of a job, read from its folder each time; nothing about them is stored elsewhere.

Invariant: only a committed directory, one with a readable manifest, is ever listed, loaded or promoted.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

from firebox.control.services import models, operations, trainer_jobs, training_shapes
from firebox.control.services.context import Control, canonical, own
from firebox.control.tables.models import ModelRow
from firebox.control.tables.operations import OperationRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.weights import manifest as manifests
from firebox.weights.manifest import CheckpointManifest, SnapshotManifest
from firebox.wire.control import Checkpoint, Promote
from firebox.wire.errors import AlreadyExists, FailedPrecondition, FireboxError, InvalidArgument, NotFound
from firebox.wire.names import check_model_id, check_snapshot_id, split_resource

_M = TypeVar("_M", SnapshotManifest, CheckpointManifest)
_SNAPSHOT_TYPES: Final = {"base": "INFERENCE_BASE", "adapter": "INFERENCE_LORA", "delta": "INFERENCE_ARC_V2"}
_NAMED_AT_MOST: Final = 10

log = logging.getLogger(__name__)


async def listing(control: Control, account: str, job: str) -> list[Checkpoint]:
    """What the job has saved, oldest first; works in any state of the job, deleted included."""
    row = await trainer_jobs.get(control, account, job)
    return await asyncio.to_thread(_scan, row.name, control.layout.job(account, job))


async def newest_checkpoint(control: Control, account: str, job: str) -> str | None:
    """The name of the last finished save of the trainer's state, or None."""
    return await asyncio.to_thread(_newest, control.layout.job(account, job))


async def snapshot(control: Control, account: str, job: str, identity: str) -> tuple[Path, SnapshotManifest]:
    """The directory and manifest of one snapshot of the job; raises NotFound naming the known ones."""
    check_snapshot_id("identity", identity)
    folder = control.layout.job(account, job) / "snapshots"
    found = await asyncio.to_thread(manifests.read_snapshot, folder / identity)
    if found is None:
        known = [m.identity for _, m in await asyncio.to_thread(lambda: list(committed(folder, SnapshotManifest)))]
        raise NotFound(
            f"identity: snapshot {identity!r} does not exist in trainer job {job!r}; newest known: "
            f"{', '.join(known[-_NAMED_AT_MOST:]) or 'none'}"
        )
    return folder / identity, found


async def delete_state(control: Control, account: str, job: str, name: str) -> None:
    """Remove a training state for good; raises NotFound. Snapshots are not removed: deployments serve them."""
    await trainer_jobs.get(control, account, job)
    folder = control.layout.job(account, job) / "checkpoints"
    known = [m.name for _, m in await asyncio.to_thread(lambda: list(committed(folder, CheckpointManifest)))]
    if name not in known:
        raise NotFound(
            f"checkpoint {name!r} is no training state of trainer job {job!r}; newest known: "
            f"{', '.join(known[-_NAMED_AT_MOST:]) or 'none'}"
        )
    await asyncio.to_thread(bury, folder / name, control.layout.staging / uuid.uuid4().hex)


async def promote(control: Control, account: str, checkpoint: str, request: Promote) -> OperationRow:
    """Check a promotion and begin it as an operation. One that was done already finds its model in place.

    Raises NotFound, AlreadyExists or FailedPrecondition naming what to do instead.
    """
    owner, output = split_resource(request.output_model, "models", field="output_model")
    if owner != account:
        raise InvalidArgument(f"output_model: models are created in your own account, {account!r}")
    check_model_id("output_model", output)
    job = own(account, request.trainer_job_id, TrainerJobRow.collection, field="trainer_job_id")
    await trainer_jobs.get(control, account, job)
    public = canonical(account, request.base_model, "models", field="base_model")
    base_model = (await training_shapes.canonical_names(control, account))(public)
    _, manifest = await snapshot(control, account, job, checkpoint)
    if manifest.kind == "delta":
        raise FailedPrecondition(
            f"checkpoint {checkpoint!r} is a delta and cannot be promoted alone; save one with "
            "checkpoint_type='base' and promote that",
            reason="DELTA_NOT_PROMOTABLE",
        )
    if manifest.base_model != base_model:
        raise FailedPrecondition(f"base_model: {checkpoint!r} was trained from {manifest.base_model!r}")
    existing = next((row for row in await models.listing(control, account) if row.id == output), None)
    if existing is not None and existing.facts.get("promoted_from") != _origin(account, job, checkpoint):
        raise AlreadyExists(f"output_model: {output!r} is registered already; choose another id, or delete it first")
    return await operations.begin(
        control, account, {"job": job, "checkpoint": checkpoint, "output": output, "base": base_model}
    )


async def placed(control: Control, operation: OperationRow) -> ModelRow | None:
    """The model of a promotion that is in place: the server ended before it said so, or a client asks again."""
    request = operation.request
    origin = _origin(operation.account, request["job"], request["checkpoint"])
    mine = [row for row in await models.listing(control, operation.account) if row.id == request["output"]]
    return next((row for row in mine if row.facts.get("promoted_from") == origin), None)


async def promoted_row(control: Control, operation: OperationRow, facts: dict[str, object]) -> ModelRow:
    """The model row for a finished export; `facts` come from its report."""
    request = operation.request
    base = await models.get(control, operation.account, request["base"].rpartition("/")[2])
    inherited = {name: fact for name, fact in base.facts.items() if name != "aliases"}
    origin = _origin(operation.account, request["job"], request["checkpoint"])
    facts = inherited | facts | {"base_model": request["base"], "promoted_from": origin}
    return ModelRow(account=operation.account, id=request["output"], state="READY", facts=facts)


def _origin(account: str, job: str, checkpoint: str) -> str:
    return f"accounts/{account}/rlorTrainerJobs/{job}/checkpoints/{checkpoint}"


def bury(directory: Path, grave: Path) -> None:
    """Remove a directory so that nobody ever finds half of it."""
    if directory.exists():
        directory.rename(grave)
        shutil.rmtree(grave)


def _scan(job_name: str, folder: Path) -> list[Checkpoint]:
    found = [
        _row(job_name, m.name, m.created_at, "TRAINING_LORA" if m.adapter else "TRAINING")
        for _, m in committed(folder / "checkpoints", CheckpointManifest)
    ]
    found += [
        _row(job_name, m.identity, m.created_at, _SNAPSHOT_TYPES[m.kind], promotable=m.kind != "delta")
        for _, m in committed(folder / "snapshots", SnapshotManifest)
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.create_time)


def _newest(folder: Path) -> str | None:
    found = [m for _, m in committed(folder / "checkpoints", CheckpointManifest)]
    return max(found, key=lambda m: m.created_at).name if found else None


def committed(folder: Path, kind: type[_M]) -> Iterator[tuple[Path, _M]]:
    """Committed artifacts in `folder`, oldest first; a damaged one is logged and left out."""
    read = manifests.read_snapshot if kind is SnapshotManifest else manifests.read_checkpoint
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            manifest = read(path)
        except FireboxError as error:
            log.warning("left out of the listing: %s", error.message)
            continue
        if isinstance(manifest, kind):
            found.append((path, manifest))
    yield from sorted(found, key=lambda pair: pair[1].created_at)


def _row(job_name: str, ident: str, time: str, kind: str, *, promotable: bool = False) -> Checkpoint:
    return Checkpoint(
        name=f"{job_name}/checkpoints/{ident}",
        create_time=time,
        update_time=time,
        checkpoint_type=f"CHECKPOINT_TYPE_{kind}",
        promotable=promotable,
    )
