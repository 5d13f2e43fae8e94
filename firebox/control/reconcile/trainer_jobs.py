"""One trainer process per live job: admit it, start it, notice its end, stop it.

Knows launch and the job's wanted state; decides no state that services would not allow. Invariant: a job is RUNNING
only while its worker is ready, its address is published for exactly that time, and capacity is held for as long as
there is a process.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence

from firebox.control.reconcile import claims
from firebox.control.reconcile.driver import Driver
from firebox.control.reconcile.log_tail import log_tail
from firebox.control.services import checkpoints, job_requests, trainer_jobs, training_shapes
from firebox.control.services.context import Control
from firebox.control.services.training_shapes import Shape
from firebox.control.tables.trainer_jobs import (
    CANCELLED,
    CANCELLING,
    CREATING,
    DELETED,
    DELETING,
    FAILED,
    PENDING,
    RUNNING,
    TrainerJobRow,
)
from firebox.launch.api import Launcher, Worker, WorkerPlan
from firebox.launch.machine import Device
from firebox.wire.control import TrainingConfig
from firebox.wire.worker import TrainerSpec, WorkerRuntime


class TrainerJobs:
    def __init__(self, control: Control, launcher: Launcher) -> None:
        self._control = control
        self._launcher = launcher
        self._workers: dict[str, Worker] = {}
        self._stopping: set[str] = set()
        self.driver = Driver(control, TrainerJobRow.collection, self._step, self._failed)

    async def recover(self) -> None:
        """Take back the workers of an earlier server; a job whose worker is gone fails when it is looked at."""
        rows = await trainer_jobs.unfinished(self._control)
        for row in rows:
            worker = row.worker and self._launcher.adopt(row.worker, self._kicker(row.name))
            if worker:
                self._workers[row.name] = worker
                self._control.fleet.publish(row.name, [worker.address])
                await claims.restore(self._control, row.name, trainer_jobs.shape_of(self._control, row), worker)
        for row in rows:
            self.driver.kick(row.name)

    async def _step(self, name: str) -> None:
        row = await trainer_jobs.by_name(self._control, name)
        worker, ended = self._workers.get(name), None
        if worker is not None and worker.ended is not None:
            del self._workers[name]
            ended = None if name in self._stopping else worker.ended
            self._stopping.discard(name)
            worker = None
        if row.state != RUNNING or worker is None:
            self._control.fleet.publish(name, ())
            self._control.presence.forget(name)
        if row.state in (PENDING, CREATING):
            await self._bring_up(row, worker, ended)
        elif row.state == RUNNING and worker is None:
            await self._fail(row, "the trainer ended", ended or "it was gone when the server started")
        elif row.state == RUNNING:
            self._watch(row)
        elif worker is not None:
            self._stopping.add(name)
            worker.stop()
        else:
            self._control.capacity.release(name)
            final = {CANCELLING: CANCELLED, DELETING: DELETED}.get(row.state, row.state)
            if final != row.state:
                await trainer_jobs.move(self._control, row, {row.state}, final, worker=None)

    async def _bring_up(self, row: TrainerJobRow, worker: Worker | None, ended: str | None) -> None:
        if ended is not None:
            await self._fail(row, "the trainer could not start", ended)
        elif worker is None:
            await self._start(row)
        elif worker.ready and row.name not in self._stopping:
            self._control.fleet.publish(row.name, [worker.address])
            await trainer_jobs.move(self._control, row, {CREATING}, RUNNING, worker=worker.ident)

    async def _start(self, row: TrainerJobRow) -> None:
        shape = await trainer_jobs.shape_of(self._control, row)
        devices = self._control.capacity.claim(row.name, training_shapes.need(self._control, shape))
        if devices is None:
            await trainer_jobs.move(self._control, row, {CREATING}, PENDING, worker=None)
        elif row.state == PENDING:
            await trainer_jobs.move(self._control, row, {PENDING}, CREATING, worker=None)
        else:
            plan = self._plan(row, shape, devices)
            self._workers[row.name] = await self._launcher.start(plan, self._kicker(row.name))

    def _watch(self, row: TrainerJobRow) -> None:
        """Have the job paused when nobody uses it any more; a pooled one is watched by who uses it."""
        idle_s = trainer_jobs.inactivity_s(row)
        if idle_s is not None and not row.pooled and not self._control.presence.knows(row.name):
            self._control.presence.touch(row.name, idle_s)

    async def _fail(self, row: TrainerJobRow, what: str, how: str) -> None:
        newest = await checkpoints.newest_checkpoint(self._control, row.account, row.id)
        advice = f"resume the job and load checkpoint {newest!r}" if newest else "it has no checkpoint to resume from"
        tail = log_tail(self._control.layout.job_log(row.account, row.id))
        message = f"{what}: {how}; {advice}." + (f" Last log lines: {tail}" if tail else "")
        await trainer_jobs.move(self._control, row, {CREATING, RUNNING}, FAILED, worker=None, message=message)

    async def _failed(self, name: str, reason: str) -> None:
        row = await trainer_jobs.by_name(self._control, name)
        await trainer_jobs.move(self._control, row, {PENDING, CREATING, RUNNING}, FAILED, worker=None, message=reason)

    def _plan(self, row: TrainerJobRow, shape: Shape, devices: Sequence[Device]) -> WorkerPlan:
        config = TrainingConfig.model_validate(row.request["trainingConfig"])
        layout, threads = self._control.layout, job_requests.num_threads(config.extra_args)

        def spec(runtime: WorkerRuntime) -> TrainerSpec:
            return TrainerSpec(
                job=row.name,
                base_model=config.base_model,
                aliases=shape.model.facts.get("aliases", []),
                model_dir=str(layout.model(row.account, shape.model.id)),
                job_dir=str(layout.job(row.account, row.id)),
                jobs_dir=str(layout.jobs(row.account)),
                models_dir=str(layout.models(row.account)),
                allow_dirs=[str(directory) for directory in self._control.allow_dirs],
                max_context_length=config.max_context_length or shape.context_length,
                lora_rank=config.lora_rank,
                forward_only=bool(row.request.get("forwardOnly")),
                pooled=row.pooled,
                dtype=shape.template.dtype,
                runtime=runtime,
            )

        return WorkerPlan(
            ident=f"t-{uuid.uuid4().hex[:8]}",
            kind="trainer",
            log=layout.job_log(row.account, row.id),
            threads=threads or self._control.capacity.threads(shape.template.threads),
            devices=[device.ordinal for device in devices if device.ordinal],
            spec=spec,
        )

    def _kicker(self, name: str) -> Callable[[], None]:
        return lambda: self.driver.kick(name)
