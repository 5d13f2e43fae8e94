"""The real services and reconcilers over a real database, with workers that exist only in memory.

What a process would do by itself, become ready, end, die, is done by the test, in whatever order it likes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import msgspec
from sqlalchemy import delete

from firebox.control.catalogue import load_templates
from firebox.control.changes import Changes
from firebox.control.database import Database
from firebox.control.layout import Layout
from firebox.control.reconcile import deployments as reconcile_deployments
from firebox.control.reconcile.deployments import Deployments
from firebox.control.reconcile.trainer_jobs import TrainerJobs
from firebox.control.services import training_shapes
from firebox.control.services.capacity import Capacity
from firebox.control.services.context import Control
from firebox.control.services.presence import Presence
from firebox.control.tables.accounts import AccountRow
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.models import ModelRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.launch.api import WorkerPlan
from firebox.launch.machine import HOST, Device, Machine
from firebox.wire.worker import HotloadCommand, ReplicaStatus, WorkerAddress, WorkerRuntime

MODEL = "accounts/local/models/tiny"
FACTS = {
    "kind": "HF_BASE_MODEL", "model_type": "qwen3", "parameter_count": 1, "moe": False, "context_length": 512,
}  # fmt: skip


class MemoryWorker:
    def __init__(self, plan: WorkerPlan, changed: Callable[[], None]) -> None:
        self.ident, self.kind, self.devices = plan.ident, plan.kind, plan.devices
        self.address = WorkerAddress(plan.ident, "")
        spec = plan.spec(WorkerRuntime(socket=plan.ident, token=""))
        self.serves: str = spec.job if plan.kind == "trainer" else spec.deployment
        self.ready = False
        self.ended: str | None = None
        self.stopping = False
        self.loaded: str | None = None
        self.changed = changed

    def stop(self) -> None:
        self.stopping = True

    def become_ready(self) -> None:
        self.ready = True
        self.changed()

    def end(self, how: str) -> None:
        self.ready, self.ended = False, how
        self.changed()


class MemoryLauncher:
    """Knows every worker that lives, as an operating system does; a new server sees those of the one before."""

    def __init__(self) -> None:
        self.living: dict[str, MemoryWorker] = {}
        self._adopted: set[str] = set()

    async def start(self, plan: WorkerPlan, changed: Callable[[], None]) -> MemoryWorker:
        worker = self.living[plan.ident] = MemoryWorker(plan, changed)
        self._adopted.add(plan.ident)
        return worker

    def adopt(self, ident: str, changed: Callable[[], None]) -> MemoryWorker | None:
        worker = self.living.get(ident)
        if worker is not None:
            worker.changed, worker.stopping, worker.ready = changed, False, True
            self._adopted.add(ident)
        return worker

    def sweep(self) -> None:
        self.living = {ident: worker for ident, worker in self.living.items() if ident in self._adopted}

    def end(self, worker: MemoryWorker, how: str) -> None:
        del self.living[worker.ident]
        worker.end(how)

    def forget_server(self) -> None:
        """The server is gone; its callbacks lead nowhere."""
        self._adopted = set()
        for worker in self.living.values():
            worker.changed = lambda: None

    async def close(self) -> None:
        self.living = {}


class World:
    """One database, the workers, and the server that looks after both until the next one does."""

    def __init__(self, folder: Path, slots: int) -> None:
        self.launcher = MemoryLauncher()
        self.layout = Layout(folder)
        self.layout.create()
        self._database = Database(self.layout.database)
        self._slots = slots
        self._machine = Machine(4, (Device(HOST, 2**40),))
        self._templates = load_templates(self.layout.shapes)

    async def prepare(self) -> None:
        """Register the model; from then on the machine has room for so many workers of it as there are slots."""
        self._new_server()
        await self._database.run(lambda session: session.merge(AccountRow(id="local")))
        await self._database.run(
            lambda session: session.merge(ModelRow(account="local", id="tiny", state="READY", facts=FACTS))
        )
        needs = [
            training_shapes.need(self.control, shape).memory
            for shape in await training_shapes.training(self.control, "local")
        ]
        self._machine = Machine(4, (Device(HOST, self._slots * max(needs)),))
        self._new_server()
        self._start()

    async def restart(self) -> None:
        """A kill of the server at this very moment, and a new one on the same data."""
        self.launcher.forget_server()
        await self.jobs.driver.close()
        await self.deployments.close()
        await _quiet()
        self._new_server()
        await self.jobs.recover()
        await self.deployments.recover()
        self.launcher.sweep()
        self._start()
        await self.settle()

    async def settle(self) -> None:
        """Wait until nothing is left to do before some worker changes."""
        await _quiet()

    async def empty(self) -> None:
        self.launcher.living = {}
        await self.restart()
        await self._database.run(lambda session: session.execute(delete(TrainerJobRow)))
        await self._database.run(lambda session: session.execute(delete(DeploymentRow)))
        self.launcher.living = {}
        await self.restart()

    def close(self) -> None:
        self._database.close()

    def _new_server(self) -> None:
        changes = Changes()
        self.control = Control(
            db=self._database,
            layout=self.layout,
            templates=self._templates,
            probe=self._probe,
            ask=self._ask,
            changes=changes,
            capacity=Capacity(self._machine, changes.notify),
            presence=Presence(3600.0),
        )
        reconcile_deployments.ask = self._hot_load  # type: ignore[assignment]
        self.jobs = TrainerJobs(self.control, self.launcher)
        self.deployments = Deployments(self.control, self.launcher)

    def _start(self) -> None:
        self.jobs.driver.start()
        self.deployments.driver.start()

    async def _probe(self, address: WorkerAddress) -> ReplicaStatus:
        return ReplicaStatus(current_snapshot_identity=self._living(address).loaded, stage="serving")

    async def _hot_load(
        self, address: WorkerAddress, _method: str, _path: str, body: bytes | None, *, timeout_s: float
    ) -> bytes:
        assert body is not None
        assert timeout_s > 0
        command = msgspec.json.decode(body, type=HotloadCommand)
        worker = self._living(address)
        await asyncio.sleep(0)
        self._living(address).loaded = command.identity
        return msgspec.json.encode(ReplicaStatus(current_snapshot_identity=worker.loaded, stage="serving"))

    async def _ask(self, address: WorkerAddress, path: str, body: bytes) -> bytes:
        raise httpx.ConnectError(f"{address.socket} has nothing at {path}, whatever is sent ({len(body)} bytes)")

    def _living(self, address: WorkerAddress) -> MemoryWorker:
        worker = self.launcher.living.get(address.socket)
        if worker is None:
            raise httpx.ConnectError("this worker has ended")
        return worker


async def _quiet() -> None:
    for _ in itertools.count():
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if not others:
            return
        await asyncio.wait(others, timeout=10)


def living(workers: Sequence[MemoryWorker], name: str) -> list[MemoryWorker]:
    return [worker for worker in workers if worker.serves == name]
