"""Deployments: what is wanted of the replicas that serve a model, and what clients may ask of them.

    CREATING -> READY <-> UPDATING      any -> FAILED      any -> DELETING -> gone

Knows no process: reconcile compares what is wanted with what runs. Invariant: `desired` only ever names a snapshot
that was complete when it was asked for, and its sequence number only grows.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import buckets, models, serving_options, training_shapes
from firebox.control.services.context import Control, canonical, own
from firebox.control.services.training_shapes import Shape
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.models import ModelRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.wire.control import CreateDeployment, Deployment, Status, UpdateDeployment
from firebox.wire.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from firebox.wire.names import check_id, resource, split_resource
from firebox.wire.worker import WorkerAddress

CREATING: Final = "CREATING"
READY: Final = "READY"
UPDATING: Final = "UPDATING"
FAILED: Final = "FAILED"
DELETING: Final = "DELETING"

LIVE: Final = frozenset({CREATING, READY, UPDATING})
MAX_REPLICAS: Final = 8


async def create(
    control: Control, account: str, request: CreateDeployment, ident: str, *, pooled: bool = False
) -> DeploymentRow:
    """Add a deployment in CREATING, under an id of ours when `ident` is empty.

    Raises InvalidArgument, NotFound, AlreadyExists, or FailedPrecondition for a job that cannot feed it.
    """
    ident = check_id("deploymentId", ident or f"deployment-{uuid.uuid4().hex[:8]}")
    serving_options.parse(request.extra_args, request.extra_values)
    model = await models.get(control, account, own(account, request.base_model, "models", field="baseModel"))
    request.base_model = model.name
    if request.hot_load_trainer_job:
        request.hot_load_trainer_job = _job_name(account, request.hot_load_trainer_job)
    await buckets.check_deployment(control, account, resource(account, DeploymentRow.collection, ident), request.wire())
    _check_replicas(request.min_replica_count, request.max_replica_count)
    shape = await _choose(control, account, request, model)
    request.deployment_shape = request.deployment_shape or shape.version_name
    row = DeploymentRow(
        account=account, id=ident, state=CREATING, request=request.wire(), generation=1, workers=[], pooled=pooled
    )

    def work(session: Session) -> None:
        if session.get(DeploymentRow, (account, ident)) is not None:
            raise AlreadyExists(f"deployment {ident!r} exists already; choose another id, or delete it first")
        session.add(row)

    await control.db.run(work)
    control.changes.notify(row.name)
    return row


async def get(control: Control, account: str, ident: str) -> DeploymentRow:
    row = await find(control, account, ident)
    if row is None:
        known = ", ".join(other.id for other in await listing(control, account)) or "none"
        raise NotFound(f"deployment {ident!r} does not exist in account {account!r}; known deployments: {known}")
    return row


async def find(control: Control, account: str, ident: str) -> DeploymentRow | None:
    return await control.db.run(lambda session: session.get(DeploymentRow, (account, ident)))


async def by_name(control: Control, name: str) -> DeploymentRow | None:
    return await find(control, *split_resource(name, DeploymentRow.collection))


async def listing(control: Control, account: str, *, pooled: bool = False) -> Sequence[DeploymentRow]:
    """The account's deployments, newest first; or, instead, the pooled ones."""
    query = (
        select(DeploymentRow)
        .where(DeploymentRow.account == account, DeploymentRow.pooled.is_(pooled))
        .order_by(DeploymentRow.create_time.desc())
    )
    return await control.db.run(lambda session: session.scalars(query).all())


async def unfinished(control: Control) -> Sequence[DeploymentRow]:
    """Deployments of every account that have, or are to have, replicas."""
    query = select(DeploymentRow).where(DeploymentRow.state.in_(LIVE | {DELETING}))
    return await control.db.run(lambda session: session.scalars(query).all())


async def update(
    control: Control, account: str, ident: str, request: UpdateDeployment, mask: str | None
) -> DeploymentRow:
    """Change the fields in `mask` (snake_case, comma-separated), or without one those that the body sets."""
    changes = _masked(request, mask)
    row = await get(control, account, ident)
    if changes.get("hotLoadTrainerJob"):
        changes["hotLoadTrainerJob"] = _job_name(account, changes["hotLoadTrainerJob"])
        await buckets.check_deployment(control, account, row.name, row.request | changes)

    def work(session: Session) -> DeploymentRow:
        row = session.get_one(DeploymentRow, (account, ident))
        before, given = row.request, {k: v for k, v in (row.request | changes).items() if v is not None}
        after = CreateDeployment.model_validate(given).wire()  # what was taken away goes back to its default
        _check_replicas(after["minReplicaCount"], after["maxReplicaCount"])
        row.request = after
        if before.get("hotLoadTransitionType", "ASYNC") != after.get("hotLoadTransitionType", "ASYNC"):
            row.generation += 1
            row.state = UPDATING if row.state == READY else row.state
        if num_replicas(before) != num_replicas(after) and row.state == READY:
            row.state = UPDATING
        return row

    changed = await control.db.run(work)
    control.changes.notify(changed.name)
    return changed


async def delete(control: Control, account: str, ident: str) -> DeploymentRow:
    """Ask for the end of the deployment; it is gone once reconcile has stopped its replicas."""
    row = await get(control, account, ident)
    await move(control, row, LIVE | {FAILED}, DELETING)
    return row


async def settled(control: Control, row: DeploymentRow, within_s: float) -> DeploymentRow | None:
    """The deployment once it is neither CREATING nor UPDATING (None: gone), or as it is after `within_s` seconds, or
    once it waits for capacity: that may take for ever."""

    def is_settled(seen: DeploymentRow | None) -> bool:
        return seen is None or seen.state not in (CREATING, UPDATING) or bool(control.capacity.why_waiting(row.name))

    return await control.changes.until(row.name, lambda: find(control, row.account, row.id), is_settled, within_s)


async def gone(control: Control, row: DeploymentRow, within_s: float) -> None:
    """Return once the deployment no longer exists, or after `within_s` seconds."""
    await control.changes.until(
        row.name, lambda: find(control, row.account, row.id), lambda seen: seen is None, within_s
    )


async def move(control: Control, row: DeploymentRow, allowed: Collection[str], state: str, message: str = "") -> None:
    """Record a new state, unless the deployment has left the `allowed` ones meanwhile."""

    def work(session: Session) -> bool:
        stored = session.get(DeploymentRow, (row.account, row.id))
        if stored is None or stored.state not in allowed:
            return False
        stored.state, stored.status_message = state, message
        return True

    if await control.db.run(work):
        control.changes.notify(row.name)


async def set_workers(control: Control, row: DeploymentRow, workers: list[dict[str, Any]]) -> None:
    """Record which processes serve, so that a restarted server can take them back."""

    def work(session: Session) -> None:
        stored = session.get(DeploymentRow, (row.account, row.id))
        if stored is not None:
            stored.workers = workers

    await control.db.run(work)


async def remove(control: Control, row: DeploymentRow) -> None:
    def work(session: Session) -> None:
        session.delete(session.get_one(DeploymentRow, (row.account, row.id)))

    await control.db.run(work)
    control.changes.notify(row.name)


async def replicas(control: Control, account: str, name: str) -> Sequence[WorkerAddress]:
    """Who serves the deployment `name`, at least one; raises NotFound or FailedPrecondition saying why nobody does."""
    owner, ident = split_resource(name, DeploymentRow.collection, field="model")
    if owner != account:
        raise NotFound(f"model: {name!r} belongs to another account; yours is {account!r}")
    serving = control.fleet.all(name)
    if serving:
        return serving
    row = await get(control, account, ident)
    if num_replicas(row.request) == 0:
        raise FailedPrecondition(
            f"deployment {ident!r} is scaled to zero; PATCH it with minReplicaCount and maxReplicaCount 1",
            reason="SCALED_TO_ZERO",
        )
    if row.state == READY:
        raise Unavailable(f"deployment {ident!r} has no replica that answers; try again")
    waiting = control.capacity.why_waiting(name)
    if waiting:
        raise Unavailable(f"deployment {ident!r} is {waiting}; try again")
    raise FailedPrecondition(f"deployment {ident!r} is in state {row.state}. {row.status_message}".rstrip())


async def served_model(control: Control, row: DeploymentRow) -> tuple[ModelRow, Path, Path | None]:
    """(base model, its directory, adapter directory or None) of what the deployment serves before any hot-load."""
    model = await models.get(control, row.account, row.request["baseModel"].rpartition("/")[2])
    directory = control.layout.model(row.account, model.id)
    if model.facts["kind"] != "HF_PEFT_ADDON":
        return model, directory, None
    base = await models.get(control, row.account, model.facts["base_model"].rpartition("/")[2])
    return base, control.layout.model(row.account, base.id), directory


async def shape_of(control: Control, row: DeploymentRow) -> Shape:
    shapes = await training_shapes.deployment(control, row.account)
    return training_shapes.find(shapes, row.account, row.request["deploymentShape"], field="deploymentShape")


def num_replicas(request: dict[str, Any]) -> int:
    """Replicas that are to run: at least one, unless the deployment may have none at all."""
    return min(max(int(request["minReplicaCount"]), 1), int(request["maxReplicaCount"]))


def show(control: Control, row: DeploymentRow) -> Deployment:
    request = CreateDeployment.model_validate(row.request)
    job = request.hot_load_trainer_job
    return Deployment(
        name=row.name,
        state=row.state,
        create_time=row.create_time,
        update_time=row.update_time,
        base_model=request.base_model,
        description=request.description,
        min_replica_count=request.min_replica_count,
        max_replica_count=request.max_replica_count,
        deployment_shape=request.deployment_shape or "",
        enable_hot_load=request.enable_hot_load,
        for_training=request.for_training,
        hot_load_transition_type=request.hot_load_transition_type or "ASYNC",
        hot_load_trainer_job=job,
        hot_load_bucket_url=control.layout.job(row.account, job.rpartition("/")[2]).as_uri() if job else None,
        annotations=request.annotations,
        status=Status(code=Unavailable.code, message=row.status_message) if row.state == FAILED else None,
        status_message=row.status_message or control.capacity.why_waiting(row.name) or None,
    )


def _job_name(account: str, name: str) -> str:
    return canonical(account, name, TrainerJobRow.collection, field="hotLoadTrainerJob")


async def _choose(control: Control, account: str, request: CreateDeployment, model: ModelRow) -> Shape:
    shapes = await training_shapes.deployment(control, account)
    if not request.deployment_shape:
        return training_shapes.select_shape(control, shapes, model.name, None, request.accelerator_type)
    shape = training_shapes.find(shapes, account, request.deployment_shape, field="deploymentShape")
    if shape.model.name not in (model.name, model.facts.get("base_model")):
        raise InvalidArgument(f"deploymentShape: {shape.id!r} serves {shape.model.name!r}, not {model.name!r}")
    return training_shapes.fitting(control, shapes, shape, field="deploymentShape")


def _check_replicas(least: int, most: int) -> None:
    if not 0 <= least <= most <= MAX_REPLICAS:
        raise InvalidArgument(
            f"minReplicaCount {least}, maxReplicaCount {most}: they must satisfy 0 <= min <= max <= {MAX_REPLICAS}"
        )


def _masked(request: UpdateDeployment, mask: str | None) -> dict[str, Any]:
    if mask is None:
        return request.model_dump(by_alias=True, exclude_unset=True)
    paths = [path.strip() for path in mask.split(",") if path.strip()]
    unknown = [path for path in paths if path not in UpdateDeployment.model_fields]
    if unknown:
        raise InvalidArgument(
            f"updateMask: {', '.join(unknown)} cannot be changed; known: {', '.join(UpdateDeployment.model_fields)}"
        )
    return request.model_dump(by_alias=True, include=set(paths))
