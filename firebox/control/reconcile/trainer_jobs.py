"""One trainer process per live job: start it, notice its end, stop it.

Knows launch and the job's wanted state; decides no state that services would not allow. Invariant: a job is RUNNING
only while its worker is ready, and its address is published for exactly that time.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

from firebox.control.reconcile.driver import Driver
from firebox.control.reconcile.log_tail import log_tail
from firebox.control.services import checkpoints, trainer_jobs
from firebox.control.services.context import Control
from firebox.control.services.trainer_jobs import CANCELLED, CANCELLING, CREATING, DELETED, DELETING, FAILED, RUNNING
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.launch.api import Launcher, Worker, WorkerPlan
from firebox.wire.control import TrainingConfig
from firebox.wire.worker import TrainerSpec, WorkerRuntime


class TrainerJobs:
    def __init__(self, control: Control, launcher: Launcher) -> None:
        self._control = control
        self._launcher = launcher
        self._workers: dict[str, Worker] = {}
        self.driver = Driver(control, TrainerJobRow.collection, self._step, self._failed)

    async def recover(self) -> None:
        """Take back the workers of an earlier server; a job whose worker is gone fails when it is looked at."""
        for row in await trainer_jobs.unfinished(self._control):
            worker = row.worker and self._launcher.adopt(row.worker, self._kicker(row.name))
            if worker:
                self._workers[row.name] = worker
                self._control.fleet.publish(row.name, [worker.address])
            self.driver.kick(row.name)

    async def _step(self, name: str) -> None:
        row = await trainer_jobs.by_name(self._control, name)
        worker = self._workers.get(name)
        if worker is not None and worker.ended is not None:
            del self._workers[name]
        if worker is None or worker.ended is not None or row.state != RUNNING:
            self._control.fleet.publish(name, ())
        if row.state == CREATING:
            await self._create(row, worker)
        elif row.state == RUNNING and (worker is None or worker.ended is not None):
            how = worker.ended if worker is not None else None
            await self._fail(row, "the trainer ended", how or "it was gone when the server started")
        elif row.state in (CANCELLING, DELETING):
            await self._stop(row, worker)

    async def _create(self, row: TrainerJobRow, worker: Worker | None) -> None:
        if worker is None:
            plan = await self._plan(row)
            self._workers[row.name] = await self._launcher.start(plan, self._kicker(row.name))
        elif worker.ended is not None:
            await self._fail(row, "the trainer could not start", worker.ended)
        elif worker.ready:
            self._control.fleet.publish(row.name, [worker.address])
            await trainer_jobs.move(self._control, row, {CREATING}, RUNNING, worker=worker.ident)

    async def _stop(self, row: TrainerJobRow, worker: Worker | None) -> None:
        if worker is not None and worker.ended is None:
            worker.stop()
            return
        final = CANCELLED if row.state == CANCELLING else DELETED
        await trainer_jobs.move(self._control, row, {row.state}, final, worker=None)

    async def _fail(self, row: TrainerJobRow, what: str, how: str) -> None:
        newest = await checkpoints.newest_checkpoint(self._control, row.account, row.id)
        advice = f"resume the job and load checkpoint {newest!r}" if newest else "it has no checkpoint to resume from"
        tail = log_tail(self._control.layout.job_log(row.account, row.id))
        message = f"{what}: {how}; {advice}." + (f" Last log lines: {tail}" if tail else "")
        await trainer_jobs.move(self._control, row, {CREATING, RUNNING}, FAILED, worker=None, message=message)

    async def _failed(self, name: str, reason: str) -> None:
        row = await trainer_jobs.by_name(self._control, name)
        await trainer_jobs.move(self._control, row, {CREATING, RUNNING}, FAILED, worker=None, message=reason)

    async def _plan(self, row: TrainerJobRow) -> WorkerPlan:
        shape = await trainer_jobs.shape_of(self._control, row)
        config = TrainingConfig.model_validate(row.request["trainingConfig"])
        layout = self._control.layout

        def spec(runtime: WorkerRuntime) -> TrainerSpec:
            return TrainerSpec(
                job=row.name,
                base_model=config.base_model,
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
            threads=shape.template.num_threads,
            spec=spec,
        )

    def _kicker(self, name: str) -> Callable[[], None]:
        return lambda: self.driver.kick(name)
