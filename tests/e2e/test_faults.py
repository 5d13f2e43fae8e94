"""What is left after a kill -9: of a trainer in the middle of a save, and of the server with everything running."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fireworks.training.sdk import TrainingError
from proofs import Record, count
from running import MODEL, RunningServer, running

from firebox.launch.local import started_at
from training.utils import DeployConfig, InfraConfig, ReconnectableClient, Workspace, load_state
from training.utils.datums import build_datum

SHAPE = "accounts/local/trainingShapes/tiny-cpu"
ORPHANS_GONE_WITHIN_S = 10
SAVE_S = 0.06
"""About what a save of this model takes; the kills are spread over it."""


def enter(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return Workspace()


def trainer(workspace: Workspace) -> ReconnectableClient:
    return workspace.trainer(MODEL, workspace.resolve(SHAPE), InfraConfig(training_shape_id=SHAPE))


def loss(client: ReconnectableClient) -> float:
    return float(client.forward([build_datum([1, 2, 3, 4, 5])]).metrics["loss:sum"])


def wait_until(happened: Callable[[], bool], within_s: float, what: str) -> float:
    """Seconds until it happened. Files and processes of others give no event to wait for."""
    started = time.monotonic()
    while not happened():
        assert time.monotonic() - started < within_s, what
        time.sleep(0.002)
    return time.monotonic() - started


@pytest.mark.prove
@pytest.mark.timeout(1800)
def test_a_save_killed_half_way_leaves_the_one_before(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """The trainer dies at any moment of a save: what is listed is whole and loads, and the old one is always there."""
    half_way, rounds = 0, count(2, 20)
    rng = random.Random(0)
    for number in range(rounds):
        delay_s = SAVE_S * (number + rng.random()) / rounds if number else 0.0  # the first one is in time, surely
        with enter(server, monkeypatch) as workspace:
            client = trainer(workspace)
            expected = loss(client)
            client.save_state("good")
            folder = server.data / "jobs" / "local" / client.job_id / "checkpoints"
            pid = server.pid_of(client.endpoint.job_name)
            killer = threading.Thread(target=_kill_during_save, args=(folder, pid, delay_s))
            killer.start()
            with contextlib.suppress(TrainingError):  # which one depends on the moment; never a wait in vain
                client.inner.save_state("cut").result(timeout=60)
            killer.join(60)
            listed = [entry["name"].rpartition("/")[2] for entry in workspace.trainers.list_checkpoints(client.job_id)]
            assert listed in (["good"], ["good", "cut"])  # a kill may come after the commit
            half_way += listed == ["good"]
            resumed = trainer(workspace)
            for name in listed:
                load_state(
                    resumed, resumed.resolve_checkpoint_path(name, source_job_id=client.job_id), 60, with_optimizer=True
                )
                assert loss(resumed) == expected
    record("kills", rounds)
    record("of them before the commit", half_way)
    assert half_way > 0


def _kill_during_save(folder: Path, pid: int, delay_s: float) -> None:
    wait_until(lambda: any(p.name.startswith(".") for p in folder.iterdir()), 60, "no save began")
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.prove
def test_no_worker_outlives_its_server_but_saves_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """kill -9: no worker is left after 10 s, and a server on the same data finds the save. SIGTERM: none at once."""
    with running(tmp_path) as server:
        workspace = enter(server, monkeypatch)
        client = trainer(workspace)
        workspace.deployment(MODEL, workspace.resolve(SHAPE), DeployConfig(), client)
        expected = loss(client)
        client.save_state("kept")
        workers = server.workers()
        assert len(workers) == 2
        server.end(signal.SIGKILL)
        gone_s = wait_until(
            lambda: not any(started_at(pid) for pid in workers), ORPHANS_GONE_WITHIN_S, "a worker outlived the server"
        )
        record("seconds until the last worker was gone", gone_s)

        server.start()
        again = enter(server, monkeypatch)
        job = again.trainers.get(client.job_id)
        assert job["state"] == "JOB_STATE_FAILED"
        assert "kept" in str(job), "the job should name the checkpoint to resume from"
        resumed = trainer(again)
        load_state(
            resumed, resumed.resolve_checkpoint_path("kept", source_job_id=client.job_id), 60, with_optimizer=True
        )
        assert loss(resumed) == expected

        workers = server.workers()
        assert len(workers) == 2, "the resumed trainer, and a replica in place of the lost one"
        server.end(signal.SIGTERM)
        assert not any(started_at(pid) for pid in workers)
