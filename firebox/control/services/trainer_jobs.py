"""Trainer jobs: what may follow what, and what a deleted job leaves behind.

    CREATING <-> PENDING        CREATING -> RUNNING -> PAUSED | FAILED | CANCELLING -> CANCELLED
    any -> DELETING -> DELETED -> ARCHIVED              PAUSED, FAILED, CANCELLED -> CREATING

Knows no process: reconcile reports what became of the worker through `move`. Invariant: a state is only left for
one that the diagram allows, so a late report about an old worker changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import Final

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import buckets, job_requests, training_shapes
from firebox.control.services.context import Control
from firebox.control.services.training_shapes import Shape
from firebox.control.tables.trainer_jobs import (
    ARCHIVED,
    CANCELLING,
    CREATING,
    DELETED,
    DELETING,
    FAILED,
    PAUSED,
    PENDING,
    RESUMABLE,
    RUNNING,
    TOMBSTONES,
    TRANSITIONAL,
    UNFINISHED,
    TrainerJobRow,
)
from firebox.wire.control import CreateTrainerJob, Status, TrainerJob, TrainingConfig
from firebox.wire.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from firebox.wire.names import check_id, resource, split_resource
from firebox.wire.worker import SavedAll, WorkerAddress

_UNAVAILABLE: Final = Unavailable.code


async def create(
    control: Control, account: str, request: CreateTrainerJob, ident: str, shape: str, *, pooled: bool = False
) -> TrainerJobRow:
    """Add a job in CREATING. `shape` is a shape or version name, or empty to have one selected.

    Raises InvalidArgument for what this server cannot do, NotFound for an unknown model or shape and AlreadyExists
    for a used id, saying whether the job of that name is the same one.
    """
    ident = check_id("rlorTrainerJobId", ident or f"training-api-service-{uuid.uuid4().hex[:8]}")
    if request.hot_load_deployment_id:
        request.hot_load_deployment_id = buckets.deployment_name(account, request.hot_load_deployment_id)
    chosen = await job_requests.resolve(control, account, request, shape)
    await buckets.check_job(control, account, ident, request.wire())
    row = TrainerJobRow(
        account=account,
        id=ident,
        state=CREATING,
        request=request.wire(),
        training_shape=chosen.version_name,
        pooled=pooled,
    )

    def work(session: Session) -> None:
        stored = session.get(TrainerJobRow, (account, ident))
        if stored is not None:
            raise _exists(stored, row)
        session.add(row)

    await control.db.run(work)
    control.changes.notify(row.name)
    return row


async def find(control: Control, account: str, ident: str) -> TrainerJobRow | None:
    return await control.db.run(lambda session: session.get(TrainerJobRow, (account, ident)))


async def get(control: Control, account: str, ident: str) -> TrainerJobRow:
    row = await find(control, account, ident)
    if row is None:
        raise NotFound(f"trainer job {ident!r} does not exist in account {account!r}; see firebox jobs")
    return row


async def by_name(control: Control, name: str) -> TrainerJobRow:
    return await get(control, *split_resource(name, TrainerJobRow.collection))


async def listing(
    control: Control, account: str, *, pooled: bool = False, deleted: bool = False
) -> Sequence[TrainerJobRow]:
    """The account's jobs, newest first, with tombstones only if `deleted`; or, instead, the pooled ones."""
    query = (
        select(TrainerJobRow)
        .where(TrainerJobRow.account == account, TrainerJobRow.pooled.is_(pooled))
        .where(TrainerJobRow.state.not_in(() if deleted else TOMBSTONES))
        .order_by(TrainerJobRow.create_time.desc())
    )
    return await control.db.run(lambda session: session.scalars(query).all())


async def unfinished(control: Control) -> Sequence[TrainerJobRow]:
    """Jobs of every account that have, or are to have, a worker, those that wait longest first."""
    query = select(TrainerJobRow).where(TrainerJobRow.state.in_(UNFINISHED)).order_by(TrainerJobRow.update_time)
    return await control.db.run(lambda session: session.scalars(query).all())


async def resume(control: Control, account: str, ident: str) -> TrainerJobRow:
    """Start a stopped job again, with fresh weights: the client loads the checkpoint it wants."""
    row = await get(control, account, ident)
    await shape_of(control, row)
    return await _request(control, row, RESUMABLE, CREATING, "resumed")


async def cancel(control: Control, account: str, ident: str) -> TrainerJobRow:
    row = await get(control, account, ident)
    return await _request(control, row, frozenset({PENDING, CREATING, RUNNING}), CANCELLING, "cancelled")


async def delete(control: Control, account: str, ident: str) -> TrainerJobRow:
    """Stop the job for good; deleting it twice is no error. Its checkpoints stay."""
    row = await get(control, account, ident)
    if row.pooled:
        raise FailedPrecondition(f"trainer job {ident!r} is the server's own; cancel it to stop it")
    if row.state not in TOMBSTONES | {DELETING}:
        row = await _request(control, row, UNFINISHED | RESUMABLE, DELETING, "deleted")
    return row


async def pause(control: Control, row: TrainerJobRow) -> None:
    """Save and stop a running job that nobody has used for as long as it allows.

    Raises httpx.HTTPError when the trainer cannot save; the job then runs on.
    """
    address = control.fleet.first(row.name)
    if address is None:
        return
    answer = await control.ask(address, "/worker/save_all", b"")
    saved = msgspec.json.decode(answer, type=SavedAll).checkpoints
    what = f"what it held: {', '.join(saved)}" if saved else "a checkpoint"
    message = f"stopped after {inactivity_s(row):.0f} s without a call; resume it, then load {what}"
    await move(control, row, {RUNNING}, PAUSED, worker=None, message=message)


def inactivity_s(row: TrainerJobRow) -> float | None:
    return job_requests.inactivity_s(CreateTrainerJob.model_validate(row.request))


async def archive(control: Control, row: TrainerJobRow) -> None:
    """What the deleted job left behind is gone, too; its id stays taken."""
    await move(control, row, {DELETED}, ARCHIVED, worker=None, message="its checkpoints were kept for 30 days")


async def deleted_before(control: Control, time: str) -> Sequence[TrainerJobRow]:
    """Jobs of every account that were deleted before `time` (RFC 3339) and are not archived yet."""
    query = select(TrainerJobRow).where(TrainerJobRow.state == DELETED, TrainerJobRow.update_time < time)
    return await control.db.run(lambda session: session.scalars(query).all())


async def settled(control: Control, row: TrainerJobRow, within_s: float) -> TrainerJobRow:
    """The job once it has left its transitional state, or as it is after `within_s` seconds."""
    return await control.changes.until(
        row.name,
        lambda: get(control, row.account, row.id),
        lambda seen: seen.state not in TRANSITIONAL,
        within_s,
    )


async def move(
    control: Control, row: TrainerJobRow, allowed: Collection[str], state: str, *, worker: str | None, message: str = ""
) -> None:
    """Record what became of the job's worker, unless the job has left the `allowed` states meanwhile."""

    def work(session: Session) -> bool:
        stored = session.get_one(TrainerJobRow, (row.account, row.id))
        if stored.state not in allowed:
            return False
        stored.state, stored.worker, stored.status_message = state, worker, message
        return True

    if await control.db.run(work):
        control.changes.notify(row.name)


async def shape_of(control: Control, row: TrainerJobRow) -> Shape:
    shapes = await training_shapes.training(control, row.account)
    return training_shapes.find(shapes, row.account, row.training_shape, field="trainingShape")


async def address(control: Control, account: str, ident: str) -> WorkerAddress:
    """Where the job's trainer listens; raises FailedPrecondition telling why there is none."""
    name = resource(account, TrainerJobRow.collection, ident)
    serving = control.fleet.first(name)
    if serving is not None:
        control.presence.renew(name)
        return serving
    row = await get(control, account, ident)
    if row.state in (CREATING, RUNNING):
        raise Unavailable(f"trainer job {ident!r} is not answering yet (state {row.state}); try again")
    advice = "resume it, then load a checkpoint. " if row.state in RESUMABLE else ""
    raise FailedPrecondition(
        f"trainer job {ident!r} is in state {row.state}; {advice}{status_message(control, row)}",
        reason="TRAINER_NOT_RUNNING",
    )


def status_message(control: Control, row: TrainerJobRow) -> str:
    """What there is to say about the job's state; empty when it needs no words."""
    return control.capacity.why_waiting(row.name) if row.state == PENDING else row.status_message


def show(control: Control, row: TrainerJobRow) -> TrainerJob:
    request = row.request
    status = Status(code=_UNAVAILABLE, message=row.status_message) if row.state == FAILED else None
    return TrainerJob(
        name=row.name,
        state=row.state,
        create_time=row.create_time,
        update_time=row.update_time,
        training_config=TrainingConfig.model_validate(request["trainingConfig"]),
        training_shape=row.training_shape,
        forward_only=request.get("forwardOnly", False),
        display_name=request.get("displayName"),
        hot_load_deployment_id=request.get("hotLoadDeploymentId"),
        inactivity_timeout=request.get("inactivityTimeout"),
        status=status,
        status_message=status_message(control, row) or None,
    )


async def _request(
    control: Control, row: TrainerJobRow, allowed: frozenset[str], state: str, verb: str
) -> TrainerJobRow:
    """Move the job to `state` for its owner; raises FailedPrecondition when it cannot be `verb` as it is."""

    def work(session: Session) -> TrainerJobRow:
        stored = session.get_one(TrainerJobRow, (row.account, row.id))
        if stored.state not in allowed:
            raise FailedPrecondition(f"trainer job {row.id!r} is in state {stored.state} and cannot be {verb}")
        stored.state, stored.status_message = state, ""
        return stored

    changed = await control.db.run(work)
    control.changes.notify(row.name)
    return changed


def _exists(stored: TrainerJobRow, asked: TrainerJobRow) -> AlreadyExists:
    """Why `asked` cannot be added: `stored` has its id. A client that merely repeated itself goes on with that one."""
    differing = job_requests.differences(stored.request, asked.request)
    if stored.training_shape != asked.training_shape:
        differing.append(f"trainingShape is {stored.training_shape!r} there and {asked.training_shape!r} here")
    if stored.state in TOMBSTONES:
        return AlreadyExists(f"trainer job {stored.id!r} was deleted, and its id is kept; choose another id")
    if differing:
        return AlreadyExists(
            f"trainer job {stored.id!r} exists already and is another one: {'; '.join(differing)}; choose another id",
            reason="EXISTS_WITH_OTHER_SETTINGS",
        )
    return AlreadyExists(f"trainer job {stored.id!r} exists already, with these very settings; get it")
