"""Numbers across processes, through the genuine SDK: sampler against trainer, and a resumed run against a whole one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from proofs import Record, count
from running import MODEL, RunningServer
from safetensors.numpy import load_file

from firebox.trainer.checkpoint import read_checkpoint_tensors
from firebox.weights.manifest import read_checkpoint
from training.utils import DeployConfig, InfraConfig, ReconnectableClient, Workspace, load_state
from training.utils.datums import build_datum

SHAPE = "accounts/local/trainingShapes/tiny-cpu"


@pytest.fixture
def workspace(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    with Workspace() as opened:
        yield opened


def trainer(workspace: Workspace, shape: str = SHAPE, lora_rank: int = 0) -> ReconnectableClient:
    infra = InfraConfig(training_shape_id=shape)
    return workspace.trainer(MODEL, workspace.resolve(shape), infra, lora_rank=lora_rank)


def train(client: ReconnectableClient, *steps: int) -> None:
    from fireworks.training.sdk import types

    for step in steps:
        rng = np.random.default_rng(step)
        rows = [rng.integers(0, 1000, rng.integers(8, 40)).tolist() for _ in range(4)]
        client.forward_backward([build_datum(row) for row in rows])
        client.optim_step(types.AdamParams(learning_rate=1e-3), "num_loss_tokens")


@pytest.mark.prove
@pytest.mark.parametrize("lora_rank", [0, 8], ids=["full", "lora"])
def test_sampled_logprobs_equal_the_trainers(
    server: RunningServer, workspace: Workspace, lora_rank: int, record: Record
) -> None:
    """After a hot-load of a base, and of the delta behind it, every sampled token has the trainer's log-prob: 1e-5."""
    client = trainer(workspace, SHAPE + "-lora" * bool(lora_rank), lora_rank)
    deployment = workspace.deployment(MODEL, workspace.resolve(SHAPE), DeployConfig(), client)
    syncer = workspace.syncer(client, deployment, MODEL, lora_rank, sync=_sync())
    differences, num_tokens = [], 0
    for step in range(1, count(2, 5) + 1):
        train(client, step)
        syncer.save_and_hotload(f"step-{step}")
        rng = np.random.default_rng(100 + step)
        prompts = [rng.integers(0, 1000, rng.integers(1, 60)).tolist() for _ in range(count(8, 40))]
        completions = asyncio.run(_sample(workspace, deployment, prompts))
        outputs = client.forward([build_datum(done.full_tokens) for done in completions]).loss_fn_outputs
        for done, output in zip(completions, outputs, strict=True):
            trained = np.asarray(output["logprobs"].data)[done.prompt_len - 1 :]
            differences.append(float(np.abs(trained - np.asarray(done.inference_logprobs)).max()))
            num_tokens += len(trained)
    record("sequences", len(differences))
    record("tokens", num_tokens)
    record("largest difference, nats", max(differences))
    assert max(differences) <= 1e-5


@pytest.mark.prove
@pytest.mark.parametrize("lora_rank", [0, 8], ids=["full", "lora"])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    server: RunningServer, workspace: Workspace, lora_rank: int, record: Record
) -> None:
    """Train 2, save, new job, load, train 2 gives what train 4 gives: log-probs, published weights, saved state."""
    shape = SHAPE + "-lora" * bool(lora_rank)
    whole, first, second = (trainer(workspace, shape, lora_rank) for _ in range(3))
    # Adapters and random states begin at random: both runs start from one of each.
    first.save_state("start")
    load_state(whole, first.resolve_checkpoint_path("start", source_job_id=first.job_id), 60, with_optimizer=True)
    train(whole, 1, 2, 3, 4)
    train(first, 1, 2)
    first.save_state("half")
    load_state(second, first.resolve_checkpoint_path("half", source_job_id=first.job_id), 60, with_optimizer=True)
    train(second, 3, 4)
    half, expected, got = (weights(server, client) for client in (first, whole, second))
    assert different(expected, got) == []
    assert different(expected, half), "two more steps changed nothing"
    states = [saved_state(server, client) for client in (whole, second)]
    assert any(name.startswith("optimizer/") for name in states[0])
    assert different(*states) == []
    assert logprobs(whole) == logprobs(second) != logprobs(first)
    record("published tensors equal bit for bit", len(expected))
    record("saved tensors equal bit for bit, optimizer included", len(states[0]))


def different(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of the tensors that are not the same bytes in both."""
    assert a.keys() == b.keys()
    return [name for name, value in a.items() if value.tobytes() != b[name].tobytes()]


def logprobs(client: ReconnectableClient) -> list[float]:
    (output,) = client.forward([build_datum(list(range(40)))]).loss_fn_outputs
    return list(output["logprobs"].data)


def saved_state(server: RunningServer, client: ReconnectableClient) -> dict[str, np.ndarray]:
    """Everything a checkpoint of this moment holds, random state included."""
    client.save_state("end")
    (directory,) = (server.data / "jobs" / "local").glob(f"{client.job_id}/checkpoints/end")
    manifest = read_checkpoint(directory)
    assert manifest is not None
    tensors = read_checkpoint_tensors(directory, manifest)
    return {name: value.numpy() for name, value in tensors.items()}


def weights(server: RunningServer, client: ReconnectableClient) -> dict[str, np.ndarray]:
    """The job's weights as it publishes them; names are fresh, as a snapshot is never overwritten."""
    jobs = server.data / "jobs" / "local" / client.job_id / "snapshots"
    number = len(list(jobs.iterdir())) if jobs.exists() else 0
    name = client.save_weights_for_sampler_ext(f"weights-{number}", checkpoint_type="base").snapshot_name
    (file,) = Path(jobs / name).glob("*.safetensors")
    return load_file(file)


async def _sample(workspace: Workspace, deployment: str, prompts: list[list[int]]) -> list[Any]:
    sampler = workspace.sampler(deployment, tokenizer=None)
    try:
        requests = [
            sampler.sample_with_prompt_tokens(
                prompt, max_tokens=4 + i % 20, temperature=[1.0, 0.0, 0.7][i % 3], logprobs=True, seed=i
            )
            for i, prompt in enumerate(prompts)
        ]
        return [completions[0] for completions in await asyncio.gather(*requests)]
    finally:
        sampler.close()
        await asyncio.sleep(0)


def _sync() -> Any:
    from training.utils import WeightSyncConfig

    return WeightSyncConfig()
