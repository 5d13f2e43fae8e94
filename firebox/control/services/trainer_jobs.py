"""Trainer jobs: what may be created, what follows a failure, what a deleted job leaves behind.

    CREATING -> RUNNING -> FAILED | CANCELLING -> CANCELLED | DELETING -> DELETED      FAILED, CANCELLED -> CREATING

Knows no process: reconcile reports what became of the worker through `move`. Invariant: a state is only left for
one that the diagram allows, so a late report about an old worker changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import buckets, models, training_shapes
from firebox.control.services.context import Control, canonical
from firebox.control.services.training_shapes import Shape
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.wire.control import CreateTrainerJob, Status, TrainerJob, TrainerMode, TrainingConfig
from firebox.wire.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from firebox.wire.names import check_id, resource, split_resource
from firebox.wire.worker import WorkerAddress

CREATING: Final = "JOB_STATE_CREATING"
RUNNING: Final = "JOB_STATE_RUNNING"
FAILED: Final = "JOB_STATE_FAILED"
CANCELLING: Final = "JOB_STATE_CANCELLING"
CANCELLED: Final = "JOB_STATE_CANCELLED"
DELETING: Final = "JOB_STATE_DELETING"
DELETED: Final = "JOB_STATE_DELETED"

TRANSITIONAL: Final = frozenset({CREATING, CANCELLING, DELETING})
RESUMABLE: Final = frozenset({FAILED, CANCELLED})
ALIVE: Final = frozenset({CREATING, RUNNING, CANCELLING})
_UNAVAILABLE: Final = Unavailable.code


async def create(
    control: Control, account: str, request: CreateTrainerJob, ident: str, shape: str, *, pooled: bool = False
) -> TrainerJobRow:
    """Add a job in CREATING. `shape` is a shape or version name, or empty to have one selected.

    Raises InvalidArgument for what this server cannot do, NotFound for an unknown model or shape and AlreadyExists
    for a used id.
    """
    ident = check_id("rlorTrainerJobId", ident or f"training-api-service-{uuid.uuid4().hex[:8]}")
    _refuse_unsupported(request)
    config = request.training_config
    if not config.base_model:
        raise InvalidArgument(
            "trainingConfig.baseModel: a model name is needed, for example accounts/local/models/tiny"
        )
    config.base_model = canonical(account, config.base_model, "models", field="trainingConfig.baseModel")
    await models.get(control, account, config.base_model.rpartition("/")[2])
    if request.hot_load_deployment_id:
        request.hot_load_deployment_id = buckets.deployment_name(account, request.hot_load_deployment_id)
    await buckets.check_job(control, account, ident, request.wire())
    chosen = await _choose(control, account, request, shape)
    if config.max_context_length and config.max_context_length > chosen.context_length:
        raise InvalidArgument(
            f"trainingConfig.maxContextLength: {config.max_context_length} is more than {chosen.id!r} supports, "
            f"which is {chosen.context_length}"
        )
    config.max_context_length = config.max_context_length or chosen.context_length
    request.forward_only = request.forward_only or chosen.mode == "FORWARD_ONLY"
    row = TrainerJobRow(
        account=account,
        id=ident,
        state=CREATING,
        request=request.wire(),
        training_shape=chosen.version_name,
        pooled=pooled,
    )

    def work(session: Session) -> None:
        if session.get(TrainerJobRow, (account, ident)) is not None:
            raise AlreadyExists(f"trainer job {ident!r} exists already; choose another id")
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


async def listing(control: Control, account: str, *, pooled: bool = False) -> Sequence[TrainerJobRow]:
    """The account's jobs, newest first, tombstones left out; or, instead, the pooled ones."""
    query = (
        select(TrainerJobRow)
        .where(TrainerJobRow.account == account, TrainerJobRow.state != DELETED, TrainerJobRow.pooled.is_(pooled))
        .order_by(TrainerJobRow.create_time.desc())
    )
    return await control.db.run(lambda session: session.scalars(query).all())


async def unfinished(control: Control) -> Sequence[TrainerJobRow]:
    """Jobs of every account that have, or are to have, a worker."""
    query = select(TrainerJobRow).where(TrainerJobRow.state.in_(ALIVE | {DELETING}))
    return await control.db.run(lambda session: session.scalars(query).all())


async def resume(control: Control, account: str, ident: str) -> TrainerJobRow:
    """Start a stopped job again, with fresh weights: the client loads the checkpoint it wants."""
    row = await get(control, account, ident)
    await shape_of(control, row)
    return await _request(control, row, RESUMABLE, CREATING, "resumed")


async def cancel(control: Control, account: str, ident: str) -> TrainerJobRow:
    row = await get(control, account, ident)
    return await _request(control, row, frozenset({CREATING, RUNNING}), CANCELLING, "cancelled")


async def delete(control: Control, account: str, ident: str) -> TrainerJobRow:
    """Stop the job for good; deleting it twice is no error. Its checkpoints stay."""
    row = await get(control, account, ident)
    if row.pooled:
        raise FailedPrecondition(f"trainer job {ident!r} is the server's own; cancel it to stop it")
    if row.state not in (DELETING, DELETED):
        row = await _request(control, row, ALIVE | RESUMABLE, DELETING, "deleted")
    return row


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
    serving = control.fleet.first(resource(account, TrainerJobRow.collection, ident))
    if serving is not None:
        return serving
    row = await get(control, account, ident)
    if row.state in (CREATING, RUNNING):
        raise Unavailable(f"trainer job {ident!r} is not answering yet (state {row.state}); try again")
    advice = f"; resume it, then load a checkpoint. {row.status_message}" if row.state in RESUMABLE else ""
    raise FailedPrecondition(f"trainer job {ident!r} is in state {row.state}{advice}", reason="TRAINER_NOT_RUNNING")


def show(row: TrainerJobRow) -> TrainerJob:
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
        status=status,
        status_message=row.status_message or None,
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


async def _choose(control: Control, account: str, request: CreateTrainerJob, ref: str) -> Shape:
    config = request.training_config
    shapes = await training_shapes.training(control, account)
    if not ref:
        mode: TrainerMode = "LORA_TRAINER" if config.lora_rank else "POLICY_TRAINER"
        return training_shapes.select_shape(control, shapes, config.base_model, mode, config.accelerator_type)
    shape = training_shapes.find(shapes, account, ref, field="trainingShape")
    if shape.model.name != config.base_model:
        raise InvalidArgument(f"trainingConfig.baseModel: {shape.id!r} is a shape of {shape.model.name!r}")
    if (config.lora_rank > 0) != (shape.mode == "LORA_TRAINER") and not (request.forward_only and not config.lora_rank):
        right = f"{shape.model.id}-{shape.template.id}{'-lora' if config.lora_rank else ''}"
        raise InvalidArgument(
            f"trainingConfig.loraRank: {config.lora_rank} does not go with {shape.id!r} ({shape.mode}); use {right!r}"
        )
    return training_shapes.fitting(control, shapes, shape, field="trainingShape")


def _refuse_unsupported(request: CreateTrainerJob) -> None:
    config = request.training_config
    for field, value in (
        ("trainingConfig.projectionHeadDim", config.projection_head_dim),
        ("trainingConfig.extraArgs", config.extra_args),
        ("extraValues", request.extra_values),
    ):
        if value:
            raise InvalidArgument(f"{field}: {value!r} is not supported by this server; leave it out")
    for field, count in (("nodeCount", request.node_count), ("trainerReplicaCount", request.trainer_replica_count)):
        if count is not None and count != 1:
            raise InvalidArgument(f"{field}: {count} is not supported; a job has one trainer, leave it out")
