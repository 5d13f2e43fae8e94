"""Pooled jobs and deployments: one of each per base model, made by the server, started when they are needed.

Knows nothing of runs and sessions. Invariant: a pool's id follows from the model's id alone, so it is found again.
"""

from __future__ import annotations

import hashlib
from typing import Final

from firebox.control.services import deployments, trainer_jobs
from firebox.control.services.context import Control
from firebox.control.services.presence import Place
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.models import ModelRow
from firebox.control.tables.trainer_jobs import CANCELLING, FAILED, PENDING, RESUMABLE, RUNNING, TrainerJobRow
from firebox.wire.control import CreateDeployment, CreateTrainerJob, TrainingConfig, UpdateDeployment
from firebox.wire.errors import FailedPrecondition, InvalidArgument, Unavailable
from firebox.wire.names import resource
from firebox.wire.worker import WorkerAddress

MAX_RANK: Final = 1024
_START_WITHIN_S: Final = 900.0


def pool_id(model: str) -> str:
    """The id of the pooled job and of the pooled deployment of the registered model `model`."""
    return f"pool-{model.replace('.', '-')[:40].strip('-')}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


async def trainer(control: Control, account: str, model: ModelRow) -> Place:
    """The running pooled trainer of `model`, started when there is none; raises FailedPrecondition when it cannot."""
    if model.facts["kind"] != "HF_BASE_MODEL":
        raise InvalidArgument(f"base_model: {model.id!r} is an adapter; train from {model.facts['base_model']!r}")
    row = await trainer_jobs.find(control, account, pool_id(model.id))
    if row is not None and row.state == CANCELLING:
        row = await trainer_jobs.settled(control, row, _START_WITHIN_S)
    if row is None:
        request = CreateTrainerJob(training_config=TrainingConfig(base_model=model.name, lora_rank=MAX_RANK))
        row = await trainer_jobs.create(control, account, request, pool_id(model.id), "", pooled=True)
    elif row.state in RESUMABLE:
        row = await trainer_jobs.resume(control, account, row.id)
    row = await trainer_jobs.settled(control, row, _START_WITHIN_S)
    return running(control, row)


def running(control: Control, row: TrainerJobRow) -> Place:
    """Where the pooled job runs; raises FailedPrecondition or Unavailable when it does not."""
    address = control.fleet.first(row.name)
    if row.state == RUNNING and row.worker is not None and address is not None:
        control.presence.touch(row.name)
        return Place(row.id, row.name, row.worker, address)
    if row.state == FAILED:
        raise FailedPrecondition(f"the trainer of this base model did not start: {row.status_message}")
    if row.state == PENDING:
        raise Unavailable(f"the trainer of this base model is {trainer_jobs.status_message(control, row)}; try again")
    raise Unavailable(f"the trainer of this base model is not ready (state {row.state}); try again")


async def sampler(control: Control, account: str, model: ModelRow) -> WorkerAddress:
    """A replica of the pooled deployment of `model`, started when there is none."""
    name = resource(account, DeploymentRow.collection, pool_id(model.id))
    if not control.fleet.all(name):
        async with control.presence.lock(name):
            await _start_sampler(control, account, model, pool_id(model.id))
    control.presence.touch(name)
    return (await deployments.replicas(control, account, name))[0]


async def _start_sampler(control: Control, account: str, model: ModelRow, ident: str) -> None:
    row = await deployments.find(control, account, ident)
    if row is not None and row.state == deployments.FAILED:
        row = await deployments.delete(control, account, ident)
        await deployments.gone(control, row, _START_WITHIN_S)
        row = None
    if row is None:
        request = CreateDeployment(base_model=model.name, min_replica_count=1, max_replica_count=1)
        row = await deployments.create(control, account, request, ident, pooled=True)
    elif deployments.num_replicas(row.request) == 0:
        row = await deployments.update(
            control, account, ident, UpdateDeployment(min_replica_count=1, max_replica_count=1), None
        )
    await deployments.settled(control, row, _START_WITHIN_S)


async def stop_sampler(control: Control, account: str, ident: str) -> None:
    """End the replicas of a pooled deployment; the next sample starts them again."""
    none = UpdateDeployment(min_replica_count=0, max_replica_count=0)
    await deployments.update(control, account, ident, none, None)
