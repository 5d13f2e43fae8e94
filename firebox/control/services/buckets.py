"""Which jobs' snapshots a deployment may load.

    PER_TRAINER      the deployment names a job (hotLoadTrainerJob), and can be attached to another one later
    PER_DEPLOYMENT   jobs name the deployment (hotLoadDeploymentId), and their snapshots gather in its bucket

Invariant: a deployment is of one scope and a job publishes to one place, so there is never a doubt whose snapshot an
identity means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeVar

from sqlalchemy import select

from firebox.control.services import models
from firebox.control.services.context import Control, canonical
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.models import ModelRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.names import check_id, resource, split_resource

_Row = TypeVar("_Row", TrainerJobRow, DeploymentRow)

_BUCKET_TYPES: Final = ("FW_HOSTED",)


def deployment_name(account: str, given: str) -> str:
    """The resource name of a job's hotLoadDeploymentId, which clients send as a bare id, too."""
    collection, field = DeploymentRow.collection, "hotLoadDeploymentId"
    if "/" not in given:
        return resource(account, collection, check_id(field, given))
    return canonical(account, given, collection, field=field)


async def jobs(control: Control, row: DeploymentRow) -> list[str]:
    """The ids of the jobs whose snapshots the deployment may load, newest first."""
    attached = row.request.get("hotLoadTrainerJob")
    if attached:
        return [str(attached).rpartition("/")[2]]
    return [job.id for job in await _publishing_to(control, row.account, row.name)]


async def check_deployment(control: Control, account: str, name: str, request: dict[str, Any]) -> None:
    """Refuse a deployment `name` whose `request` (camelCase) names a bucket or a job that cannot feed it."""
    bucket = request.get("hotLoadBucketType")
    if bucket and bucket not in _BUCKET_TYPES:
        raise InvalidArgument(f"hotLoadBucketType: {bucket!r} is not known; use {_BUCKET_TYPES[0]!r} or leave it out")
    attached = request.get("hotLoadTrainerJob")
    if not attached:
        return
    job = await _find(control, TrainerJobRow, account, attached, field="hotLoadTrainerJob")
    target = job.request.get("hotLoadDeploymentId")
    if target:
        raise FailedPrecondition(
            f"hotLoadTrainerJob: {job.name!r} publishes to the bucket of {target!r} (PER_DEPLOYMENT), so {name!r} "
            "cannot read its own (PER_TRAINER); hot-load into that deployment, or create the job without "
            "hotLoadDeploymentId",
            reason="BUCKET_SCOPE_MISMATCH",
        )
    feeding = await _publishing_to(control, account, name)
    if feeding:
        raise FailedPrecondition(
            f"hotLoadTrainerJob: {feeding[0].name!r} publishes to the bucket of {name!r} (PER_DEPLOYMENT), so that "
            f"cannot be attached to {job.name!r} (PER_TRAINER); create another deployment for it",
            reason="BUCKET_SCOPE_MISMATCH",
        )
    await _check_models(control, "hotLoadTrainerJob", job.name, job.request, name, request)


async def check_job(control: Control, account: str, ident: str, request: dict[str, Any]) -> None:
    """Refuse a job whose `request` (camelCase) names a deployment that it cannot publish to."""
    target = request.get("hotLoadDeploymentId")
    if not target:
        return
    name = resource(account, TrainerJobRow.collection, ident)
    row = await _find(control, DeploymentRow, account, target, field="hotLoadDeploymentId")
    attached = row.request.get("hotLoadTrainerJob")
    if attached:
        raise FailedPrecondition(
            f"hotLoadDeploymentId: {row.name!r} reads the bucket of {attached!r} (PER_TRAINER), so {name!r} cannot "
            "publish to it (PER_DEPLOYMENT); create the job without hotLoadDeploymentId, then PATCH the deployment's "
            "hotLoadTrainerJob",
            reason="BUCKET_SCOPE_MISMATCH",
        )
    if not row.request.get("enableHotLoad"):
        raise FailedPrecondition(f"hotLoadDeploymentId: {row.name!r} was created without enableHotLoad")
    await _check_models(control, "hotLoadDeploymentId", name, request, row.name, row.request)


async def _find(control: Control, kind: type[_Row], account: str, name: str, *, field: str) -> _Row:
    _, ident = split_resource(name, kind.collection, field=field)
    row = await control.db.run(lambda session: session.get(kind, (account, ident)))
    if row is None:
        raise NotFound(f"{field}: {name!r} does not exist")
    return row


async def _publishing_to(control: Control, account: str, deployment: str) -> Sequence[TrainerJobRow]:
    query = select(TrainerJobRow).where(TrainerJobRow.account == account).order_by(TrainerJobRow.create_time.desc())
    rows = await control.db.run(lambda session: session.scalars(query).all())
    return [row for row in rows if row.request.get("hotLoadDeploymentId") == deployment]


async def _check_models(
    control: Control, field: str, job: str, trained: dict[str, Any], deployment: str, served: dict[str, Any]
) -> None:
    """A job's snapshots fit the deployments of its own base model, and those of adapters of that model."""
    owner, ident = split_resource(served["baseModel"], ModelRow.collection)
    model = await models.get(control, owner, ident)
    base = model.facts["base_model"] if model.facts["kind"] == "HF_PEFT_ADDON" else model.name
    if trained["trainingConfig"]["baseModel"] != base:
        raise FailedPrecondition(
            f"{field}: {job!r} trains {trained['trainingConfig']['baseModel']!r}, but {deployment!r} serves {base!r}; "
            "they must have the same base model",
            reason="BASE_MODEL_MISMATCH",
        )
