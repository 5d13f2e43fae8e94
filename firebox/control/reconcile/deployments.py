"""The replicas of each deployment: as many as wanted, of the newest generation, serving the wanted snapshot.

Replicas of an older generation serve on until the new ones are ready and have caught up. A replica that ends is
replaced; one that cannot start, or ends again and again, fails the deployment. Invariant: only ready replicas are
published, and a deployment is READY only when exactly the wanted ones run.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
import msgspec

from firebox.control.reconcile import claims
from firebox.control.reconcile.driver import Driver
from firebox.control.reconcile.log_tail import log_tail
from firebox.control.services import deployments, hot_load, pools, serving_options, training_shapes
from firebox.control.services.context import Control
from firebox.control.services.deployments import CREATING, DELETING, FAILED, LIVE, READY, UPDATING
from firebox.control.services.serving_options import MAX_BATCH, MAX_CONTEXT
from firebox.control.tables.deployments import DeploymentRow
from firebox.launch.api import Launcher, Worker, WorkerPlan
from firebox.launch.machine import Device
from firebox.launch.probe import ask
from firebox.wire.errors import FireboxError
from firebox.wire.worker import DEFAULT_MAX_BATCH, HotloadCommand, ReplicaStatus, SamplerSpec, WorkerRuntime

_HOTLOAD_WITHIN_S = 600.0
_LOSSES = 3
_LOSSES_WITHIN_S = 60.0
"""So many replicas lost in so short a time are not bad luck: another one would end the same way."""


@dataclass
class _Replica:
    """`holder` is what it has its capacity as. `applied` is the number of the last hot-load it answered; `fresh` until
    it has caught up with the others."""

    worker: Worker
    generation: int
    holder: str
    applied: int = 0
    fresh: bool = True
    served: bool = False
    stopping: bool = False
    loading: asyncio.Task[None] | None = None

    def stop(self) -> None:
        self.stopping = True
        self.worker.stop()


class Deployments:
    def __init__(self, control: Control, launcher: Launcher) -> None:
        self._control = control
        self._launcher = launcher
        self._replicas: dict[str, list[_Replica]] = {}
        self._losses: defaultdict[str, list[float]] = defaultdict(list)
        self._waiting: dict[str, set[str]] = {}
        self.driver = Driver(control, DeploymentRow.collection, self._step, self._failed)

    async def recover(self) -> None:
        """Take back the replicas of an earlier server; lost ones are replaced, but pools start when they are needed.

        What a replica has loaded is asked of it: its last hot-load may have been cut off with the earlier server.
        """
        for row in await deployments.unfinished(self._control):
            replicas = []
            for place, known in enumerate(row.workers):
                worker = self._launcher.adopt(known["ident"], self._kicker(row.name))
                if worker is not None:
                    holder = f"{row.name}#{known['generation']}.{place}"
                    replicas.append(_Replica(worker, known["generation"], holder, fresh=False))
                    await claims.restore(self._control, holder, deployments.shape_of(self._control, row), worker)
            self._replicas[row.name] = replicas
            self._control.fleet.publish(row.name, [replica.worker.address for replica in replicas])
            if row.pooled and not replicas and row.state in LIVE:
                await pools.stop_sampler(self._control, row.account, row.id)
            self.driver.kick(row.name)

    async def close(self) -> None:
        for replica in (r for replicas in self._replicas.values() for r in replicas):
            if replica.loading is not None:
                replica.loading.cancel()
        await self.driver.close()

    async def _step(self, name: str) -> None:
        row = await deployments.by_name(self._control, name)
        if row is None:
            return
        replicas = self._replicas.setdefault(name, [])
        lost = [r for r in replicas if r.worker.ended is not None]
        replicas[:] = [r for r in replicas if r.worker.ended is None]
        for replica in lost:
            self._control.capacity.release(replica.holder)
        if row.state in LIVE:
            failed = [r for r in lost if r.generation == row.generation and not r.stopping]
            if failed and self._is_hopeless(row, failed):
                await self._fail(row, failed[0])
                return
            await self._converge(row, deployments.num_replicas(row.request))
        else:
            self._publish(row, replicas)
            await self._wind_down(row, replicas)

    async def _converge(self, row: DeploymentRow, wanted: int) -> None:
        replicas, missing = self._replicas[row.name], wanted - len(self._current(row))
        if missing > 0:
            await deployments.move(self._control, row, {READY}, UPDATING)
        taken = [replica.holder for replica in replicas]
        places = (f"{row.name}#{row.generation}.{place}" for place in itertools.count())
        await self._start(row, list(itertools.islice((p for p in places if p not in taken), max(0, missing))))
        current = self._current(row)
        for surplus in current[wanted:]:
            surplus.stop()
        current = current[:wanted]
        for replica in replicas:
            replica.served = replica.served or replica.worker.ready
            if replica.worker.ready and replica.loading is None and replica.applied < hot_load.wanted(row):
                replica.loading = asyncio.create_task(self._hot_load(row, replica))
        caught_up = len(current) == wanted and all(
            r.worker.ready and (not r.fresh or r.applied == hot_load.wanted(row)) for r in current
        )
        stale = [r for r in replicas if r not in current]
        if caught_up:
            for replica in current:
                replica.fresh = False
            for replica in stale:
                replica.stop()
        self._publish(row, current if caught_up else [r for r in replicas if not r.fresh or not hot_load.wanted(row)])
        serving = [{"ident": r.worker.ident, "generation": r.generation} for r in replicas if r.worker.ready]
        if serving != row.workers:
            await deployments.set_workers(self._control, row, serving)
        if caught_up and not stale and row.state != READY:
            await deployments.move(self._control, row, {CREATING, UPDATING}, READY)

    async def _start(self, row: DeploymentRow, holders: Sequence[str]) -> None:
        """Start the replicas that are missing, as far as there is capacity; the others wait in line for theirs."""
        waited = self._waiting.pop(row.name, set())
        for holder in waited.difference(holders):
            self._control.capacity.release(holder)
        for holder in holders:
            need = training_shapes.need(self._control, await deployments.shape_of(self._control, row))
            devices = self._control.capacity.claim(holder, need)
            if devices is None:
                self._waiting.setdefault(row.name, set()).add(holder)
                continue
            worker = await self._launcher.start(await self._plan(row, devices), self._kicker(row.name))
            self._replicas[row.name].append(_Replica(worker, row.generation, holder))
        if self._waiting.get(row.name, set()) - waited:
            self._control.changes.notify(row.name)  # a client that waits for the deployment hears that it waits, too

    async def _hot_load(self, row: DeploymentRow, replica: _Replica) -> None:
        """Bring one replica to the wanted snapshot; its own status tells whether that worked."""
        try:
            status = await self._control.probe(replica.worker.address)
            for command in await asyncio.to_thread(
                hot_load.commands, row, status.current_snapshot_identity, fresh=replica.fresh
            ):
                status = await _send(replica.worker, command)
                if status.error:
                    break
        except (httpx.HTTPError, msgspec.DecodeError) as error:
            if replica.worker.ended is None:  # one that has ended is replaced
                reason = f"a replica did not answer a hot-load: {error!r}"
                await deployments.move(self._control, row, LIVE, FAILED, reason)
        except FireboxError as error:
            await deployments.move(self._control, row, LIVE, FAILED, f"a replica cannot catch up: {error.message}")
        finally:
            replica.loading, replica.applied = None, hot_load.wanted(row)
            self.driver.kick(row.name)

    def _publish(self, row: DeploymentRow, replicas: list[_Replica]) -> None:
        ready = [r for r in replicas if r.worker.ready] if row.state in LIVE else []
        before = self._control.fleet.applied(row.name)
        self._control.fleet.publish(row.name, [r.worker.address for r in ready])
        if ready:
            applied = min(r.applied for r in ready)
            self._control.fleet.record_applied(row.name, applied)
            if applied != before:
                self._control.changes.notify(row.name)

    async def _wind_down(self, row: DeploymentRow, replicas: list[_Replica]) -> None:
        await self._start(row, ())
        for replica in replicas:
            replica.stop()
        if row.state == DELETING and not replicas:
            del self._replicas[row.name]
            self._losses.pop(row.name, None)
            await deployments.remove(self._control, row)

    def _is_hopeless(self, row: DeploymentRow, lost: list[_Replica]) -> bool:
        """Whether replacing the `lost` replicas would only lose more."""
        now = time.monotonic()
        recent = [at for at in self._losses[row.name] if at > now - _LOSSES_WITHIN_S] + [now] * len(lost)
        self._losses[row.name] = recent
        return len(recent) >= _LOSSES or not all(replica.served for replica in lost)

    async def _fail(self, row: DeploymentRow, lost: _Replica) -> None:
        tail = log_tail(self._control.layout.deployment_log(row.account, row.id))
        message = f"a replica ended: {lost.worker.ended}." + (f" Last log lines: {tail}" if tail else "")
        await deployments.move(self._control, row, LIVE, FAILED, message)

    async def _failed(self, name: str, reason: str) -> None:
        row = await deployments.by_name(self._control, name)
        if row is not None:
            await deployments.move(self._control, row, LIVE, FAILED, reason)

    def _current(self, row: DeploymentRow) -> list[_Replica]:
        return [r for r in self._replicas[row.name] if r.generation == row.generation and not r.stopping]

    async def _plan(self, row: DeploymentRow, devices: Sequence[Device]) -> WorkerPlan:
        shape = await deployments.shape_of(self._control, row)
        base, model_dir, adapter_dir = await deployments.served_model(self._control, row)
        options = serving_options.parse(row.request.get("extraArgs"), row.request.get("extraValues"))
        limit = min(shape.template.max_context_length, int(base.facts["context_length"]))

        def spec(runtime: WorkerRuntime) -> SamplerSpec:
            return SamplerSpec(
                deployment=row.name,
                base_model=base.name,
                model_dir=str(model_dir),
                adapter_dir=str(adapter_dir) if adapter_dir else None,
                max_context_length=min(limit, options.get(MAX_CONTEXT, limit)),
                max_batch=options.get(MAX_BATCH, DEFAULT_MAX_BATCH),
                transition=row.request.get("hotLoadTransitionType") or "ASYNC",
                dtype=shape.template.dtype,
                runtime=runtime,
            )

        return WorkerPlan(
            ident=f"s-{uuid.uuid4().hex[:8]}",
            kind="sampler",
            log=self._control.layout.deployment_log(row.account, row.id),
            threads=self._control.capacity.threads(shape.template.threads),
            devices=[device.ordinal for device in devices if device.ordinal],
            spec=spec,
        )

    def _kicker(self, name: str) -> Callable[[], None]:
        return lambda: self.driver.kick(name)


async def _send(worker: Worker, command: HotloadCommand) -> ReplicaStatus:
    body = msgspec.json.encode(command)
    answer = await ask(worker.address, "POST", "/worker/hotload", body, timeout_s=_HOTLOAD_WITHIN_S)
    return msgspec.json.decode(answer, type=ReplicaStatus)
