"""Checkpoints of training runs: what lies in the pooled job's folder, with what clients said about it.

Invariant: only a committed directory is ever listed or loaded, and one whose time to live is over is neither.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import sessions
from firebox.control.services.checkpoints import bury
from firebox.control.services.context import Control
from firebox.control.services.downloads import Offer
from firebox.control.tables.run_checkpoints import RunCheckpointRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.control.tables.training_runs import TrainingRunRow
from firebox.weights import manifest as manifests
from firebox.weights.manifest import Manifest
from firebox.wire import tinker
from firebox.wire.control import Checkpoint, Promote, PromoteOfSession
from firebox.wire.errors import FireboxError, InvalidArgument, NotFound
from firebox.wire.names import resource
from firebox.wire.tinker import CheckpointPath, CheckpointType, RunCheckpoint, SaveBody

_FOLDERS: Final[dict[CheckpointType, str]] = {
    "training": "checkpoints",
    "sampler": "snapshots",
    "external": "snapshots",
}
_KINDS: Final[tuple[Literal["training", "sampler"], ...]] = ("training", "sampler")
_SAID: Final = "SAID"

log = logging.getLogger(__name__)


async def announce(control: Control, account: str, path: CheckpointPath, request: SaveBody) -> None:
    """Keep what the client says about a checkpoint it is about to save, unless that is there already."""
    directory = await _directory(control, account, path)
    row = RunCheckpointRow(
        account=account,
        id=path.path,
        state=_SAID,
        run=path.run,
        expires_at=_expiry(request.ttl_seconds),
        user_metadata=request.user_metadata,
    )
    if not directory.exists():
        await control.db.run(lambda session: session.merge(row))


async def locate(control: Control, account: str, path: CheckpointPath) -> Path:
    """The directory of a checkpoint; raises NotFound naming those the run has."""
    directory = await _directory(control, account, path)
    if (directory / manifests.MANIFEST_NAME).exists():
        said = await control.db.run(lambda session: session.get(RunCheckpointRow, (account, path.path)))
        if said is None or not _is_over(said):
            return directory
    known = [found.tinker_path for found in await listing(control, account, path.run)]
    raise NotFound(f"{path.path!r} does not exist; checkpoints of this run: {', '.join(known[-10:]) or 'none'}")


async def listing(control: Control, account: str, run: str | None = None) -> list[RunCheckpoint]:
    """What clients saved of a run, or of every run, oldest first; what is over is removed instead."""
    return [found for found in await _all(control, account, run) if not tinker.is_own(found.path)]


async def of_session(control: Control, account: str, session: str) -> list[Checkpoint]:
    """What the session's runs have saved, as resources of the control plane, oldest first."""
    await sessions.get(control, account, session)
    parent = resource(account, "trainingSessions", session)
    found = [c for c in await listing(control, account) if tinker.session_of(c.path.run) == session]
    return [_row(parent, checkpoint) for checkpoint in found]


async def promotion(
    control: Control, account: str, session: str, checkpoint: str, request: PromoteOfSession
) -> Promote:
    """The promotion of one of them, as that of the trainer job which holds it; raises NotFound naming the known."""
    found = [c for c in await listing(control, account) if tinker.session_of(c.path.run) == session]
    run = next((c.path.run for c in found if c.path.artifact == checkpoint), None)
    if run is None:
        known = ", ".join(c.path.artifact for c in found[-10:]) or "none"
        raise NotFound(f"checkpoint {checkpoint!r} does not exist in session {session!r}; known: {known}")
    row = await control.db.run(lambda database: database.get_one(TrainingRunRow, (account, run)))
    job = resource(account, TrainerJobRow.collection, row.job)
    return Promote(output_model=request.output_model, base_model=request.base_model, trainer_job_id=job)


async def _all(control: Control, account: str, run: str | None) -> list[RunCheckpoint]:
    def work(session: Session) -> tuple[Sequence[TrainingRunRow], dict[str, RunCheckpointRow]]:
        runs = select(TrainingRunRow).where(TrainingRunRow.account == account)
        said = select(RunCheckpointRow).where(RunCheckpointRow.account == account)
        if run is not None:
            runs, said = runs.where(TrainingRunRow.id == run), said.where(RunCheckpointRow.run == run)
        return session.scalars(runs).all(), {row.id: row for row in session.scalars(said)}

    runs, said = await control.db.run(work)
    for row in [row for row in said.values() if _is_over(row)]:
        await remove(control, account, tinker.parse_path(row.id, field="path"))
    jobs = {control.layout.job(account, row.job) for row in runs}
    known = {row.id for row in runs}
    return await asyncio.to_thread(lambda: [c for job in jobs for c in _scan(job, known, said)])


async def delete(control: Control, account: str, path: CheckpointPath) -> None:
    """Remove a checkpoint; raises NotFound. A sampler that has its weights in memory may go on with them."""
    name = resource(account, RunCheckpointRow.collection, path.path)
    try:
        await locate(control, account, path)
    except NotFound:
        if control.removed.lately(name):
            return
        raise
    await remove(control, account, path)
    control.removed.note(name)


async def remove(control: Control, account: str, path: CheckpointPath) -> None:
    """Remove a checkpoint and what was said about it, whether it is there or not."""
    directory = await _directory(control, account, path)
    await asyncio.to_thread(bury, directory, control.layout.staging / uuid.uuid4().hex)
    await control.db.run(lambda session: _forget(session, account, path))


async def offer(control: Control, account: str, path: CheckpointPath) -> Offer:
    """Have the files of a PEFT adapter fetched by whoever gets the ticket; raises InvalidArgument for another kind."""
    if path.type == "training":
        raise InvalidArgument(
            f"{path.path!r} is a training state, which only a trainer reads; save_weights_for_sampler makes an adapter"
        )
    directory = await locate(control, account, path)
    manifest = await asyncio.to_thread(manifests.read_snapshot, directory)
    assert manifest is not None
    return control.downloads.offer(account, directory, [file.path for file in manifest.files])


async def remove_own(control: Control, account: str, run: str) -> None:
    """Remove what the server itself saved of a run that is over: parked states, weights of unnamed samplers."""
    for found in await _all(control, account, run):
        if tinker.is_own(found.path):
            await remove(control, account, found.path)


async def set_ttl(control: Control, account: str, path: CheckpointPath, ttl_seconds: int | None) -> None:
    """Have the checkpoint end in `ttl_seconds` from now, or never."""
    await locate(control, account, path)

    def work(session: Session) -> None:
        row = session.get(RunCheckpointRow, (account, path.path))
        if row is None:
            row = RunCheckpointRow(account=account, id=path.path, state=_SAID, run=path.run)
            session.add(row)
        row.expires_at = _expiry(ttl_seconds)

    await control.db.run(work)


async def _directory(control: Control, account: str, path: CheckpointPath) -> Path:
    row = await control.db.run(lambda session: session.get(TrainingRunRow, (account, path.run)))
    if row is None:
        raise NotFound(f"{path.path!r}: training run {path.run!r} does not exist in account {account!r}")
    return control.layout.job(account, row.job) / _FOLDERS[path.type] / path.artifact


def _scan(job: Path, runs: set[str], said: dict[str, RunCheckpointRow]) -> list[RunCheckpoint]:
    found = []
    for kind in _KINDS:
        folder = job / _FOLDERS[kind]
        for directory in folder.iterdir() if folder.is_dir() else ():
            path = None if directory.name.startswith(".") else tinker.of_artifact(directory.name, kind)
            if path is not None and path.run in runs:
                found += [_show(path, manifest, said.get(path.path)) for manifest in _manifest(directory, kind)]
    return sorted(found, key=lambda checkpoint: checkpoint.time)


def _row(parent: str, checkpoint: RunCheckpoint) -> Checkpoint:
    time = checkpoint.time.isoformat().replace("+00:00", "Z")
    promotable = checkpoint.checkpoint_type != "training"
    return Checkpoint(
        name=f"{parent}/checkpoints/{checkpoint.path.artifact}",
        create_time=time,
        update_time=time,
        checkpoint_type=f"CHECKPOINT_TYPE_{'INFERENCE' if promotable else 'TRAINING'}_LORA",
        promotable=promotable,
    )


def _manifest(directory: Path, kind: Literal["training", "sampler"]) -> Iterator[Manifest]:
    """The manifest, or nothing where there is none; a damaged one is logged and left out."""
    read = manifests.read_checkpoint if kind == "training" else manifests.read_snapshot
    try:
        manifest = read(directory)
    except FireboxError as error:
        log.warning("left out of the listing: %s", error.message)
        return
    if manifest is not None:
        yield manifest


def _show(path: CheckpointPath, manifest: Manifest, said: RunCheckpointRow | None) -> RunCheckpoint:
    return RunCheckpoint(
        checkpoint_id=path.id,
        checkpoint_type=path.type,
        time=datetime.fromisoformat(manifest.created_at),
        tinker_path=path.path,
        size_bytes=sum(file.size for file in manifest.files),
        user_metadata=said.user_metadata if said else None,
        expires_at=datetime.fromisoformat(said.expires_at) if said and said.expires_at else None,
    )


def _expiry(ttl_seconds: int | None) -> str | None:
    if ttl_seconds is None:
        return None
    return (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat().replace("+00:00", "Z")


def _is_over(row: RunCheckpointRow) -> bool:
    return row.expires_at is not None and datetime.fromisoformat(row.expires_at) <= datetime.now(UTC)


def _forget(session: Session, account: str, path: CheckpointPath) -> None:
    row = session.get(RunCheckpointRow, (account, path.path))
    if row is not None:
        session.delete(row)
