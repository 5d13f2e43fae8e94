"""Parks the training runs of sessions that fell silent, and stops the pools and trainer jobs that nobody uses.

Sleeps until the first of them may be idle; nothing is polled. Invariant: a pooled trainer is stopped only when it holds
no run, so a stop loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

import httpx

from firebox.control.services import deployments, pools, run_checkpoints, trainer_jobs, training_runs
from firebox.control.services.context import Control
from firebox.control.services.presence import Place
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.sessions import SessionRow
from firebox.control.tables.trainer_jobs import RUNNING, TrainerJobRow
from firebox.wire.errors import FireboxError
from firebox.wire.names import resource

_CLOSE_S = 20.0

log = logging.getLogger(__name__)


class TrainingRuns:
    def __init__(self, control: Control) -> None:
        self._control = control
        self._task: asyncio.Task[None] | None = None

    async def recover(self) -> None:
        """Find the runs that workers of an earlier server still hold; they and their pools count as used now."""
        control = self._control
        pools_there = [row.name for row in await trainer_jobs.unfinished(control) if row.pooled]
        pools_there += [row.name for row in await deployments.unfinished(control) if row.pooled]
        for name in pools_there:
            if control.fleet.all(name):
                control.presence.touch(name)
        for row in await training_runs.loaded(control):
            job = await trainer_jobs.find(control, row.account, row.job)
            address = control.fleet.first(job.name) if job is not None else None
            if job is not None and address is not None and job.worker is not None and job.worker == row.worker:
                control.presence.load(row.name, Place(job.id, job.name, job.worker, address))
                control.presence.touch(resource(row.account, SessionRow.collection, row.session))
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Park what is loaded, as far as the time allows: a run then goes on under the next server."""
        if self._task is None:
            return
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        try:
            async with asyncio.timeout(_CLOSE_S):
                for row in await training_runs.loaded(self._control):
                    self._control.presence.forget(resource(row.account, SessionRow.collection, row.session))
                    await self._park(row.account, row.id)
        except TimeoutError:
            log.warning(
                "not every training run could be parked within %.0f s; their last saved states remain", _CLOSE_S
            )

    async def _watch(self) -> None:
        presence = self._control.presence
        while True:
            presence.grown.clear()  # a new name may fall idle before those that are there
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(presence.grown.wait(), presence.first_idle_in())
            for name in presence.idle_names():
                presence.forget(name)
                try:
                    await self._idle(name)
                except Exception as error:  # noqa: BLE001 - one session's trouble must not keep the others in memory
                    _report(name, error)

    async def _idle(self, name: str) -> None:
        _, account, collection, ident = name.split("/", 3)
        if collection == SessionRow.collection:
            for row in await training_runs.listing(self._control, account, ident):
                if row.state == training_runs.LOADED:
                    await self._park(account, row.id)
        elif collection == DeploymentRow.collection:
            await pools.stop_sampler(self._control, account, ident)
        elif collection == TrainerJobRow.collection:
            job = await trainer_jobs.get(self._control, account, ident)
            await (self._stop_pool(job) if job.pooled else self._pause(job))

    async def _park(self, account: str, run: str) -> None:
        try:
            await training_runs.park(self._control, account, run)
            log.info("training run %s is parked", run)
        except FireboxError as error:
            log.warning("training run %s could not be parked: %s", run, error.message)

    async def _pause(self, job: TrainerJobRow) -> None:
        try:
            await trainer_jobs.pause(self._control, job)
        except httpx.HTTPError as error:
            log.error("%s could not be saved, and runs on: %r", job.name, error)
            self._control.presence.touch(job.name, trainer_jobs.inactivity_s(job))

    async def _stop_pool(self, row: TrainerJobRow) -> None:
        async with self._control.presence.lock(row.name):
            addresses = self._control.fleet.all(row.name)
            if any(self._control.presence.loaded_in(address) for address in addresses):
                self._control.presence.touch(row.name)  # its sessions live, they merely did not ask for anything
                return
            if (await trainer_jobs.get(self._control, row.account, row.id)).state == RUNNING:
                await trainer_jobs.cancel(self._control, row.account, row.id)
        await run_checkpoints.listing(self._control, row.account)  # removes what is over


def _report(name: str, error: Exception) -> None:
    log.error("%s is idle and could not be put away", name, exc_info=error)
