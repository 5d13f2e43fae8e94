"""Bring-up costs what loading the model costs: no sleep of a client, and next to nothing of the server's own.

The names are those of public scripts, which a registered model answers to by an alias.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fireworks.training.sdk import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
)
from proofs import FULL, Record, count
from running import RunningServer

MODEL = "accounts/fireworks/models/qwen3-8b"
SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-cpu"
MAX_RATIO = 1.3
SHORTEST_CLIENT_SLEEP_S = 5.0
BARE = "import sys, torch, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"


class RequestLog:
    """What a manager of the SDK sent, and how long it sat still between an answer and the next request."""

    def __init__(self, client: httpx.Client) -> None:
        self.sent: list[str] = []
        self.longest_pause_s = 0.0
        self._answered: float | None = None
        self._client = client
        client.event_hooks = {"request": [self._request], "response": [self._response]}

    def close(self) -> None:
        self._client.event_hooks = {"request": [], "response": []}

    def _request(self, request: httpx.Request) -> None:
        if self._answered is not None:
            self.longest_pause_s = max(self.longest_pause_s, time.monotonic() - self._answered)
        self.sent.append(f"{request.method} {request.url.path}")

    def _response(self, _: httpx.Response) -> None:
        self._answered = time.monotonic()


def bare_start(model: Path) -> float:
    """Seconds that a process as the server starts them takes to import both libraries and load the model."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    env = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", BARE, str(model)], env=env, check=True, capture_output=True)
    return time.monotonic() - begun


def bring_up(server: RunningServer, ident: str) -> tuple[float, float, list[RequestLog]]:
    """Seconds until a trainer, and then a deployment, is ready for its client; both are deleted again."""
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    deployments = DeploymentManager(api_key=server.key, base_url=server.url)
    profile = trainers.resolve_training_profile(SHAPE)
    logs = [RequestLog(manager._sync_client) for manager in (trainers, deployments)]
    begun = time.monotonic()
    job = trainers.create_and_wait(
        TrainerJobConfig(base_model=MODEL, training_shape_ref=profile.training_shape_version, requested_job_id=ident)
    )
    trained = time.monotonic()
    logs[0].close()
    config: dict[str, Any] = {
        "deployment_shape": profile.deployment_shape_version,
        "hot_load_trainer_job": job.job_name,
    }
    deployments.create_or_get(DeploymentConfig(deployment_id=ident, base_model=MODEL, **config))
    assert deployments.wait_for_ready(ident, timeout_s=60).state == "READY"
    served = time.monotonic()
    logs[1].close()
    service = FiretitanServiceClient(base_url=job.base_url, api_key=server.key)
    assert service.create_training_client(base_model=MODEL, lora_rank=0).get_info()
    service.close()
    deployments.delete(ident)
    trainers.delete(job.job_id)
    return trained - begun, served - trained, logs


@pytest.fixture
def aliased(server: RunningServer) -> Iterator[RunningServer]:
    server.command("models", "alias", "tiny", MODEL)
    yield server
    server.ask("PATCH", "/v1/accounts/local/models/tiny", json={"aliases": []})


@pytest.mark.prove
def test_bring_up_takes_no_longer_than_loading(aliased: RunningServer, record: Record) -> None:
    bare, trainer, deployment = [], [], []
    for number in range(count(3, 5)):
        bare.append(bare_start(aliased.data / "models" / "local" / "tiny"))
        *seconds, logs = bring_up(aliased, f"bring-up-{number}")
        trainer.append(seconds[0])
        deployment.append(seconds[1])
        for log in logs:
            assert log.longest_pause_s < SHORTEST_CLIENT_SLEEP_S / 10, log.sent
        ratios = [min(taken) / min(bare) for taken in (trainer, deployment)]
        if max(ratios) <= MAX_RATIO and not FULL:
            break
    record("bare import and load, s", min(bare))
    record("trainer ready, s", min(trainer))
    record("deployment ready, s", min(deployment))
    record("slowest ratio", max(ratios))
    record("longest pause between two requests, s", max(log.longest_pause_s for log in logs))
    assert max(ratios) <= MAX_RATIO
