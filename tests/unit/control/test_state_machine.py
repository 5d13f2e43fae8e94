"""Jobs and deployments under every order of events: calls of users, ends of workers, deaths of the server.

Invariants: no job has two trainers, no more workers run than there is room for, requests only go to workers that are
ready, what was deleted stays deleted, and once the workers have done what they were told, everything is where its
owner wants it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from in_memory import MODEL, MemoryWorker, World, living  # type: ignore[import-not-found]
from proofs import Record, count

from firebox.control.services import deployments, hot_load, trainer_jobs
from firebox.control.services.context import Control
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.trainer_jobs import (
    CANCELLED,
    FAILED,
    PENDING,
    RUNNING,
    TOMBSTONES,
    TrainerJobRow,
)
from firebox.weights.manifest import SnapshotManifest, committed_dir, seal
from firebox.wire.control import CreateDeployment, CreateTrainerJob, HotLoad, TrainingConfig, UpdateDeployment
from firebox.wire.errors import FireboxError

T = TypeVar("T")

SLOTS = 3
SNAPSHOTS = ("one", "two")
ANY = st.integers(0, 7)
JOB = st.sampled_from(["j-1", "j-2"])
DEPLOYMENT = st.sampled_from(["d-1", "d-2"])
REPLICAS = st.integers(0, 2)
SETTLED = {PENDING, RUNNING, FAILED, CANCELLED} | TOMBSTONES


class Machine(RuleBasedStateMachine):
    """Every rule ends when nothing is left to do but for a worker to change."""

    world: World
    loop: asyncio.AbstractEventLoop
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.deleted_jobs: set[str] = set()
        self.deleted_deployments: set[str] = set()
        self.loop.run_until_complete(self.world.empty())

    def do(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do it and settle; a refusal is as good as anything else, a crash is not."""

        async def both() -> T | None:
            result = None
            with contextlib.suppress(FireboxError):
                result = await work
            await self.world.settle()
            return result

        type(self).steps += 1
        return self.loop.run_until_complete(both())

    @property
    def control(self) -> Control:
        return self.world.control

    @property
    def workers(self) -> list[MemoryWorker]:
        return list(self.world.launcher.living.values())

    @initialize(kinds=st.sampled_from(["", "j", "d", "jd", "jd"]), replicas=st.integers(1, 2))
    def something_runs(self, kinds: str, replicas: int) -> None:
        if "j" in kinds:
            self.create_job("j-1")
        if "d" in kinds:
            self.create_deployment("d-1", replicas)
        self._workers_obey()

    @rule(ident=JOB)
    def create_job(self, ident: str) -> None:
        request = CreateTrainerJob(training_config=TrainingConfig(base_model=MODEL))
        self.do(trainer_jobs.create(self.control, "local", request, ident, ""))

    @rule(ident=JOB)
    def cancel_job(self, ident: str) -> None:
        self.do(trainer_jobs.cancel(self.control, "local", ident))

    @rule(ident=JOB)
    def resume_job(self, ident: str) -> None:
        self.do(trainer_jobs.resume(self.control, "local", ident))

    @rule(ident=JOB)
    def delete_job(self, ident: str) -> None:
        if self.do(trainer_jobs.delete(self.control, "local", ident)) is not None:
            self.deleted_jobs.add(ident)

    @rule(ident=DEPLOYMENT, replicas=REPLICAS)
    def create_deployment(self, ident: str, replicas: int) -> None:
        request = CreateDeployment(
            base_model=MODEL,
            enable_hot_load=True,
            hot_load_trainer_job="accounts/local/rlorTrainerJobs/j-1",
            min_replica_count=replicas,
            max_replica_count=replicas,
        )
        if self.do(deployments.create(self.control, "local", request, ident)) is not None:
            self.deleted_deployments.discard(ident)

    @rule(ident=DEPLOYMENT, replicas=REPLICAS)
    def scale(self, ident: str, replicas: int) -> None:
        request = UpdateDeployment(min_replica_count=replicas, max_replica_count=replicas)
        self.do(deployments.update(self.control, "local", ident, request, None))

    @rule(ident=DEPLOYMENT, transition=st.sampled_from(["ASYNC", "SYNC"]))
    def change_transition(self, ident: str, transition: Any) -> None:
        request = UpdateDeployment(hot_load_transition_type=transition)
        self.do(deployments.update(self.control, "local", ident, request, None))

    @rule(ident=DEPLOYMENT)
    def delete_deployment(self, ident: str) -> None:
        if self.do(deployments.delete(self.control, "local", ident)) is not None:
            self.deleted_deployments.add(ident)

    @rule(ident=DEPLOYMENT, identity=st.sampled_from(SNAPSHOTS), is_cut_off=st.booleans())
    def load(self, ident: str, identity: str, is_cut_off: bool) -> None:
        async def ask() -> None:
            row = await deployments.get(self.control, "local", ident)
            await hot_load.request(self.control, "local", row, HotLoad(identity=identity))
            if is_cut_off:
                await self.world.restart()

        self.do(ask())

    @precondition(lambda self: any(not worker.ready for worker in self.workers))
    @rule(which=ANY)
    def worker_becomes_ready(self, which: int) -> None:
        starting = [worker for worker in self.workers if not worker.ready]
        self.do(self._now(starting[which % len(starting)].become_ready))

    @precondition(lambda self: any(worker.stopping for worker in self.workers))
    @rule(which=ANY)
    def worker_ends_as_told(self, which: int) -> None:
        stopping = [worker for worker in self.workers if worker.stopping]
        self.do(self._now(lambda: self.world.launcher.end(stopping[which % len(stopping)], "ended with status 0")))

    @precondition(lambda self: self.workers)
    @rule(which=ANY)
    def worker_dies(self, which: int) -> None:
        worker = self.workers[which % len(self.workers)]
        self.do(self._now(lambda: self.world.launcher.end(worker, "ended by signal 9")))

    @rule()
    def server_dies(self) -> None:
        self.do(self.world.restart())

    async def _now(self, event: Any) -> None:
        event()

    def _workers_obey(self) -> None:
        """Workers become ready, or end when they were told to, until none is left to do so."""
        for _ in range(40):
            unsettled = [worker for worker in self.workers if worker.stopping or not worker.ready]
            if not unsettled:
                return
            worker = unsettled[0]
            if worker.stopping:
                self.do(self._now(lambda worker=worker: self.world.launcher.end(worker, "ended with status 0")))
            else:
                self.do(self._now(worker.become_ready))
        raise AssertionError("workers start and stop without end")

    def rows(self) -> tuple[dict[str, TrainerJobRow], dict[str, DeploymentRow]]:
        async def read() -> tuple[dict[str, TrainerJobRow], dict[str, DeploymentRow]]:
            jobs = await trainer_jobs.listing(self.control, "local", deleted=True)
            return {row.id: row for row in jobs}, {
                row.id: row for row in await deployments.listing(self.control, "local")
            }

        return self.loop.run_until_complete(read())

    @invariant()
    def nothing_is_wrong(self) -> None:
        jobs, served = self.rows()
        assert len(self.workers) <= SLOTS
        for row in jobs.values():
            own = living(self.workers, row.name)
            assert len(own) <= 1, f"{row.id} has {len(own)} trainers"
            published = [address.socket for address in self.control.fleet.all(row.name)]
            assert published == [worker.ident for worker in own if worker.ready and row.state == RUNNING]
            assert row.state != RUNNING or own, f"{row.id} runs without a trainer"
        for row in served.values():
            ready = {worker.ident for worker in living(self.workers, row.name) if worker.ready}
            published = {address.socket for address in self.control.fleet.all(row.name)}
            assert published <= ready, f"{row.id}: requests go to workers that are not ready"
            wanted = deployments.num_replicas(row.request)
            assert row.state != deployments.READY or len(published) == wanted, f"{row.id} is READY with {published}"
        self._deleted_is_gone(jobs, served)

    def _deleted_is_gone(self, jobs: dict[str, TrainerJobRow], served: dict[str, DeploymentRow]) -> None:
        for ident in self.deleted_jobs:
            assert jobs[ident].state in {"JOB_STATE_DELETING"} | TOMBSTONES, f"{ident} is back"
        for ident in self.deleted_deployments:
            assert ident not in served or served[ident].state == deployments.DELETING, f"{ident} is back"

    def teardown(self) -> None:
        """Workers that do what they are told bring everything to rest, and to where it is wanted."""
        self._workers_obey()
        jobs, served = self.rows()
        self.nothing_is_wrong()
        full = len(self.workers) == SLOTS
        for row in jobs.values():
            assert row.state in SETTLED, f"{row.id} hangs in {row.state}"
            assert row.state != PENDING or full, f"{row.id} waits although there is room"
        for row in served.values():
            assert row.state in {deployments.READY, deployments.FAILED} or full, f"{row.id} hangs in {row.state}"
            if row.state == deployments.READY and row.desired is not None:
                loaded = {worker.loaded for worker in living(self.workers, row.name)}
                assert loaded <= {row.desired["identity"]}, f"{row.id} serves {loaded}"
        owners = {row.name for row in (*jobs.values(), *served.values())}
        assert {worker.serves for worker in self.workers} <= owners, "a worker belongs to nobody"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path, SLOTS)
    for number, identity in enumerate(SNAPSHOTS):
        with committed_dir(made.layout.job("local", "j-1") / "snapshots" / identity) as scratch:
            manifest = SnapshotManifest(
                identity=identity, kind="base", base_model=MODEL, dtype="float32", step=number,
                created_at=f"2026-01-01T00:00:0{number}Z", files=[],
            )  # fmt: skip
            seal(scratch, manifest)
    with asyncio.Runner() as runner:
        runner.run(made.prepare())
        Machine.world, Machine.loop, Machine.steps = made, runner.get_loop(), 0
        yield made
    made.close()


@pytest.mark.prove
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("world")
def test_every_order_of_events(record: Record) -> None:
    sequences = count(60, 5000)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=sequences,
            stateful_step_count=12,
            deadline=None,
            phases=[Phase.generate],
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    record("sequences", sequences)
    record("events", Machine.steps)
    record("broken invariants", 0)  # one would have ended the test
