"""Weights between jobs and deployments of a whole server, moved by the genuine SDK."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fireworks.training.sdk import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
    types,
)
from running import MODEL, RunningServer, running

SHAPE = "accounts/local/trainingShapes/tiny-cpu"
ADAM = types.AdamParams(learning_rate=1e-2)
TOKENS = np.random.default_rng(1).integers(0, 1000, 24).tolist()


@pytest.fixture(scope="module")
def allowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    """A server, and the folder that its trainers may read adapters from."""
    folder = tmp_path_factory.mktemp("allowing")
    allowed = folder / "allowed"
    allowed.mkdir()
    with running(folder, "--allow-dir", str(allowed)) as up:
        yield up, allowed


@contextmanager
def training(server: RunningServer) -> Iterator[tuple[Any, Any]]:
    """(job, training client) of a fresh LoRA job, deleted at the end."""
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    profile = trainers.resolve_training_profile(f"{SHAPE}-lora")
    config = TrainerJobConfig(base_model=MODEL, training_shape_ref=profile.training_shape_version, lora_rank=4)
    job = trainers.create(config)
    endpoint = trainers.wait_for_ready(job.job_id, job.job_name, timeout_s=120)
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=server.key)
    try:
        yield job, service.create_training_client(base_model=MODEL, lora_rank=4)
    finally:
        service.close()
        trainers.delete(job.job_id)


@contextmanager
def deployed(server: RunningServer, job_name: str) -> Iterator[Callable[[str | None], str]]:
    """A deployment of the base model; the function loads a snapshot of the job, if any, and gives its model name."""
    deployments = DeploymentManager(api_key=server.key, base_url=server.url)
    ident = f"merged-{uuid.uuid4().hex[:6]}"
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    deployments.create_or_get(
        DeploymentConfig(
            deployment_id=ident,
            base_model=MODEL,
            deployment_shape=trainers.resolve_training_profile(SHAPE).deployment_shape_version,
            hot_load_trainer_job=job_name,
        )
    )
    deployments.wait_for_ready(ident, timeout_s=120)

    def load(snapshot: str | None) -> str:
        assert snapshot is None or deployments.hotload_and_wait(ident, MODEL, snapshot, timeout_seconds=60)
        return f"accounts/local/deployments/{ident}"

    try:
        yield load
    finally:
        deployments.delete(ident)


def train(client: Any) -> None:
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:]}
    )
    client.forward_backward([datum], "cross_entropy").result(timeout=60)
    client.optim_step(ADAM).result(timeout=60)


def logprobs(client: Any) -> list[float]:
    """Of `TOKENS` after the first, by the trainer."""
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:]}
    )
    return client.forward([datum], "cross_entropy").result(timeout=60).loss_fn_outputs[0]["logprobs"].data


def served(server: RunningServer, model: str) -> list[float]:
    """The same, by whatever serves `model`."""
    body = {"model": model, "prompt": TOKENS, "max_tokens": 1, "echo": True, "logprobs": True, "temperature": 0.0}
    answer = server.ask("POST", "/inference/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return [row["logprob"] for row in answer.json()["choices"][0]["logprobs"]["content"]][1 : len(TOKENS)]


def test_weights_travel(allowing: tuple[RunningServer, Path]) -> None:
    """A first job trains and is deleted. A second one goes on from its checkpoint, loads its adapter by name and by
    directory, and merges it; the base model's deployment serves the result."""
    server, allowed = allowing
    jobs = TrainerJobManager(api_key=server.key, base_url=server.url)
    with training(server) as (first, client):
        train(client)
        client.save_state("end").result(timeout=60)
        expected = logprobs(client)
        snapshot = client.save_weights_for_sampler_ext("one").snapshot_name
        jobs.promote_checkpoint(first.job_id, snapshot, "mine", MODEL)
        train(client)
        later = logprobs(client)
    assert jobs.try_get(first.job_id)["state"] in ("JOB_STATE_DELETING", "JOB_STATE_DELETED")
    shutil.copytree(server.data / "models" / "local" / "mine", allowed / "mine")

    with training(server) as (second, client):
        fresh = logprobs(client)
        with pytest.raises(Exception, match="nothing to merge"):
            client.save_weights_for_sampler_ext("none", checkpoint_type="merged_base")
        path = client.resolve_checkpoint_path("end", source_job_id=first.job_id)
        assert client.load_state_with_optimizer(path).result(timeout=60).path == f"cross_job://{first.job_id}/end"
        assert logprobs(client) == expected != fresh
        train(client)
        assert logprobs(client) == later  # also the moments were taken over
        for path in ("accounts/local/models/mine", str(allowed / "mine")):
            assert client.load_adapter(path).result(timeout=60).adapter_path == path
            assert logprobs(client) == expected
            train(client)
        with pytest.raises(Exception, match="--allow-dir"):
            client.load_adapter(str(server.data)).result(timeout=60)
        with pytest.raises(Exception, match="known ones: mine"):
            client.load_adapter("accounts/local/models/tiny").result(timeout=60)
        expected = logprobs(client)
        merged = client.save_weights_for_sampler_ext("merged", checkpoint_type="merged_base").snapshot_name
        kinds = {row["name"].rpartition("/")[2]: row["checkpointType"] for row in jobs.list_checkpoints(second.job_id)}
        assert kinds[merged] == "CHECKPOINT_TYPE_INFERENCE_BASE"
        with deployed(server, second.job_name) as load:
            name = load(None)
            assert served(server, name) == pytest.approx(fresh, abs=1e-5)
            load(merged)
            assert served(server, name) == pytest.approx(expected, abs=1e-5)
