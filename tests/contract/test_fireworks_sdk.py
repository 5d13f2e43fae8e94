"""The genuine, unmodified Fireworks SDK drives a whole life; nothing of ours stands between it and the server."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from fireworks.training.sdk import (
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
    WeightSyncer,
    types,
)
from running import MODEL, RunningServer

SHAPE = "accounts/local/trainingShapes/tiny-cpu"
PROMPT = [5, 6, 7, 8]
ADAM = types.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0)


def datum(seed: int) -> types.Datum:
    tokens = np.random.default_rng(seed).integers(0, 1000, 24)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={"target_tokens": types.TensorData.from_numpy(tokens[1:])},
    )


def answer(server: RunningServer, model: str) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probs, by the SDK's sampler."""

    async def ask() -> Any:
        sampler = DeploymentSampler(inference_url=server.url, model=model, api_key=server.key, tokenizer=None)
        try:
            (got,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=8, temperature=0.0, logprobs=True)
            return got
        finally:
            sampler.close()
            await asyncio.sleep(0)

    got = asyncio.run(ask())
    return got.full_tokens[got.prompt_len :], got.inference_logprobs


@contextmanager
def trainer(server: RunningServer, trainers: TrainerJobManager, **changes: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(endpoint, service, training client) of a fresh job, deleted at the end."""
    profile = trainers.resolve_training_profile(SHAPE)
    created = trainers.create(
        TrainerJobConfig(base_model=MODEL, training_shape_ref=profile.training_shape_version, **changes)
    )
    endpoint = trainers.wait_for_ready(created.job_id, created.job_name, timeout_s=120)
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=server.key)
    try:
        yield endpoint, service, service.create_training_client(base_model=MODEL, lora_rank=0)
    finally:
        service.close()
        trainers.delete(created.job_id)


@pytest.mark.prove
def test_whole_life(server: RunningServer) -> None:
    """Job from a shape, train, save, sample from a hot-loaded deployment, a delta, promote, serve, delete."""
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    deployments = DeploymentManager(api_key=server.key, base_url=server.url)
    deployment_id, output = f"life-{uuid.uuid4().hex[:6]}", f"life-{uuid.uuid4().hex[:6]}"
    with trainer(server, trainers) as (endpoint, _, client):
        profile = trainers.resolve_training_profile(SHAPE)
        config = DeploymentConfig(
            deployment_id=deployment_id,
            base_model=MODEL,
            deployment_shape=profile.deployment_shape_version,
            hot_load_trainer_job=endpoint.job_name,
        )
        deployments.create_or_get(config)
        assert deployments.wait_for_ready(deployment_id, timeout_s=120).state == "READY"
        name = f"accounts/local/deployments/{deployment_id}"
        syncer = WeightSyncer(client, deployments, deployment_id, base_model=MODEL, hotload_timeout=60)

        answers, losses = [answer(server, name)], []
        for step in (1, 2):
            for _ in range(3):
                future = client.forward_backward([datum(1), datum(2)], "cross_entropy")
                client.optim_step(ADAM, grad_accumulation_normalization="num_loss_tokens").result(timeout=60)
                losses.append(future.result(timeout=60).metrics["loss:sum"])
            assert syncer.save_and_hotload(f"step-{step}")
            answers.append(answer(server, name))
        assert losses == sorted(losses, reverse=True)
        assert answers[0][1] != answers[1][1] != answers[2][1]
        kinds = {e["checkpointType"] for e in trainers.list_checkpoints(endpoint.job_id)}
        assert len(kinds) == 2, f"the second save should have been a delta: {kinds}"

        # A LoRA-free job promotes full weights; the model then serves without the job.
        snapshot = client.save_weights_for_sampler_ext("final", checkpoint_type="base").snapshot_name
        client.save_state("end").result(timeout=60)
        assert client.list_checkpoints() == ["end"]
        model = trainers.promote_checkpoint(endpoint.job_id, snapshot, output, MODEL)
        assert model["name"] == f"accounts/local/models/{output}"
        # The SDK asks again when an answer is lost: it is the same promotion.
        assert trainers.promote_checkpoint(endpoint.job_id, snapshot, output, MODEL) == model
        other = trainers.list_checkpoints(endpoint.job_id)[0]["name"].rpartition("/")[2]
        with pytest.raises(RuntimeError, match="registered already"):
            trainers.promote_checkpoint(endpoint.job_id, other, output, MODEL)
        deployments.delete(deployment_id)
        assert deployments.get(deployment_id) is None
    deployments.create_or_get(
        DeploymentConfig(
            deployment_id=deployment_id,
            base_model=f"accounts/local/models/{output}",
            deployment_shape=f"accounts/local/deploymentShapes/{output}-cpu",
            enable_hot_load=False,
        )
    )
    deployments.wait_for_ready(deployment_id, timeout_s=120)
    tokens, logprobs = answer(server, name)
    assert tokens == answers[2][0]
    assert logprobs == pytest.approx(answers[2][1], abs=1e-5)
    deployments.delete(deployment_id)
    assert trainers.try_get(endpoint.job_id)["state"] == "JOB_STATE_DELETED"  # what remains tells what it was


def running_jobs(server: RunningServer) -> set[str]:
    jobs = server.ask("GET", "/v1/accounts/local/rlorTrainerJobs").json()["rlorTrainerJobs"]
    return {job["name"] for job in jobs if job["state"] == "JOB_STATE_RUNNING"}


@pytest.mark.prove
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_managed_service(server: RunningServer, lora_rank: int) -> None:
    """`from_firetitan_config` provisions trainer and deployment by itself, samples what was saved, and cleans up."""
    before = running_jobs(server)
    service = FiretitanServiceClient.from_firetitan_config(
        base_url=server.url,
        api_key=server.key,
        inference_url=server.url,
        hotload_api_url=server.url,
        base_model=MODEL,
        tokenizer_model=str(server.data / "models" / "local" / "tiny"),
        lora_rank=lora_rank,
        training_shape_id=SHAPE + ("-lora" if lora_rank else ""),
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )
    try:
        client = service.create_training_client(base_model=MODEL, lora_rank=lora_rank)
        first = client.forward_backward([datum(3)], "cross_entropy").result(timeout=60).metrics["loss:sum"]
        client.optim_step(ADAM, grad_accumulation_normalization="num_loss_tokens").result(timeout=60)
        assert client.forward([datum(3)], "cross_entropy").result(timeout=60).metrics["loss:sum"] < first
        path = client.save_weights_for_sampler("one").result(timeout=60).path
        sampler = service.create_sampling_client(model_path=path)
        params = types.SamplingParams(max_tokens=6, temperature=0.0)
        future = sampler.sample(types.ModelInput.from_ints(PROMPT), num_samples=2, sampling_params=params)
        sequences = future.result(timeout=60).sequences
        assert len(sequences) == 2
        assert sequences[0].tokens == sequences[1].tokens
    finally:
        service.close()
    assert running_jobs(server) <= before, "closing the service left its trainer behind"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/accounts/local/models"),
        ("POST", "/inference/v1/completions"),
        ("POST", "/training/v1/rlorTrainerJobs/local/any/api/v1/forward"),
        ("GET", "/api/v1/healthz"),
        ("GET", "/nowhere"),
    ],
)
def test_wrong_key_is_refused_everywhere(server: RunningServer, method: str, path: str) -> None:
    assert server.ask(method, path, headers={"X-Api-Key": "fb_wrong"}).status_code == 401
    assert httpx.request(method, server.url + path).status_code == 401


def test_unknown_names_are_answered_with_the_known_ones(server: RunningServer) -> None:
    for answer_ in (
        server.ask("POST", "/inference/v1/completions", json={"model": "accounts/local/deployments/no", "prompt": [1]}),
        server.ask("GET", "/v1/accounts/local/models/no"),
        server.ask(
            "POST",
            "/v1/accounts/local/rlorTrainerJobs",
            json={"trainingConfig": {"baseModel": "accounts/local/models/no"}},
        ),
    ):
        assert answer_.status_code == 404, answer_.text
    assert "tiny" in server.ask("GET", "/v1/accounts/local/models/no").json()["error"]["message"]
    with pytest.raises(RuntimeError, match="tiny-cpu"):
        TrainerJobManager(api_key=server.key, base_url=server.url).create(
            TrainerJobConfig(base_model=MODEL, training_shape_ref="accounts/local/trainingShapes/no/versions/1")
        )


MALFORMED = [b"", b"{", b"[]", b'{"model": 5}', b"\xff\xfe", b"[" * 10_000]


def refused(server: RunningServer, url: str, body: bytes) -> None:
    answer_ = server.ask(
        "POST", url.removeprefix(server.url), content=body, headers={"Content-Type": "application/json"}
    )
    assert 400 <= answer_.status_code < 500, f"{url}: {answer_.status_code} {answer_.text}"
    assert answer_.json()["error"]["message"] if "error" in answer_.json() else answer_.json()


@pytest.mark.parametrize("body", MALFORMED)
def test_malformed_json_is_the_callers_mistake_and_the_server_lives(server: RunningServer, body: bytes) -> None:
    for path in (
        "/v1/accounts/local/rlorTrainerJobs",
        "/v1/accounts/local/deployments",
        "/v1/accounts/local/models",
        "/hot_load/v1/models/hot_load",
        "/inference/v1/completions",
        "/inference/v1/chat/completions",
        "/training/v1/rlorTrainerJobs/local/no/api/v1/forward_backward",
    ):
        refused(server, path, body)
    assert server.ask("GET", "/v1/accounts/local/models").status_code == 200


def test_malformed_json_does_not_harm_a_running_trainer(server: RunningServer) -> None:
    """Bodies that cannot be read never enter the session: the client's next operation gets the answer it had before."""
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    with trainer(server, trainers) as (endpoint, _, client):
        before = client.forward([datum(1)], "cross_entropy").result(timeout=60)
        for operation in ("forward_backward", "optim_step", "save_weights", "create_model", "retrieve_future"):
            for body in MALFORMED:
                refused(server, f"{endpoint.base_url}/api/v1/{operation}", body)
        after = client.forward([datum(1)], "cross_entropy").result(timeout=60)
        assert after.loss_fn_outputs[0]["logprobs"].data == before.loss_fn_outputs[0]["logprobs"].data
