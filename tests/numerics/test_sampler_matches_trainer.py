"""What the sampler says of its own tokens is what the trainer says of them, after every kind of published weights.

The trainer's engine and the sampler's whole app run in this process; snapshots go through files, as in production. The
tiny model ties its head to its embedding, which is where an adapter of the head can go wrong.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
import torch
from proofs import Record, count
from trainer_harness import BASE_MODEL, Driver, datum, trainer_spec

from firebox.sampler.server import build_app
from firebox.trainer.engine import Engine
from firebox.weights.manifest import read_snapshot
from firebox.wire.training import AdamParams, Forward, LoraConfig, OptimStep, SaveForSampler
from firebox.wire.worker import HotloadCommand, SamplerSpec, WorkerRuntime

RUNTIME = WorkerRuntime(socket="", token="")
TOLERANCE = 1e-5

LORAS = {
    "full": LoraConfig(),
    "lora of attention and mlp": LoraConfig(rank=8, seed=7, train_unembed=False),
    "lora of the head, too": LoraConfig(rank=8, seed=7),
    "lora of the head alone": LoraConfig(rank=8, seed=7, train_attn=False, train_mlp=False),
}


class Trainer(Driver):
    """One model on a trainer's engine."""

    def __init__(self, model_dir: Path, root: Path, lora: LoraConfig, runtime: WorkerRuntime = RUNTIME) -> None:
        self.spec = trainer_spec(model_dir, root, lora_rank=lora.rank, runtime=runtime)
        self.engine = Engine(self.spec)
        self.create(lora)

    def train(self, rows: list[list[int]]) -> None:
        """One step, large enough that a sampler without it is far off."""
        self.do(Forward(data=[datum(row) for row in rows], loss_fn="cross_entropy", backward=True))
        self.do(OptimStep(adam_params=AdamParams(learning_rate=5e-3), normalization="num_loss_tokens"))

    def publish(self, identity: str, kind: str) -> Path:
        self.do(SaveForSampler(name=identity, checkpoint_type=kind))
        return Path(self.spec.job_dir) / "snapshots" / identity

    def logprobs(self, rows: list[list[int]]) -> list[np.ndarray]:
        """Per row [T] the log-probs [T-1] of its tokens 1..T-1."""
        done = self.forward(Forward(data=[datum(row) for row in rows], loss_fn="cross_entropy"))
        return [np.asarray(output["logprobs"].data) for output in done.loss_fn_outputs]


def random_rows(rng: random.Random, num: int, shortest: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(1000) for _ in range(rng.randint(shortest, longest))] for _ in range(num)]


async def hotload(client: httpx.AsyncClient, path: Path) -> None:
    manifest = read_snapshot(path)
    assert manifest is not None
    command = HotloadCommand(identity=path.name, path=str(path), previous=manifest.parent)
    status = (await client.post("/worker/hotload", content=msgspec.json.encode(command))).json()
    assert (status["current_snapshot_identity"], status["error"]) == (path.name, "")


async def sample(client: httpx.AsyncClient, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Per prompt the completion and its log-probs; all requests run together, every other one greedily."""

    async def one(number: int, prompt: list[int]) -> tuple[list[int], list[float]]:
        body = {
            "prompt": prompt, "max_tokens": 3 + 2 * number % 40, "temperature": float(number % 2), "seed": number,
            "ignore_eos": True, "raw_output": True, "logprobs": True,
        }  # fmt: skip
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["raw_output"]["completion_token_ids"], [row["logprob"] for row in choice["logprobs"]["content"]]

    return await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


async def differences(model_dir: Path, trainer: Trainer, rounds: list[str], num: int) -> list[float]:
    """Train, publish, hot-load and sample once per entry of `rounds`; per sequence the largest difference, in nats."""
    spec = SamplerSpec(
        deployment="accounts/local/deployments/d", base_model=BASE_MODEL, model_dir=str(model_dir),
        max_context_length=256, max_batch=8, runtime=trainer.spec.runtime,
    )  # fmt: skip
    app, rng, found = build_app(spec), random.Random(0), []
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://s") as client:
        for number, kind in enumerate(rounds):
            rows = random_rows(rng, 4, 8, 40)
            before = trainer.logprobs(rows)
            for _ in range(3):
                trainer.train(rows)
            moved = max(np.abs(a - b).max() for a, b in zip(before, trainer.logprobs(rows), strict=True))
            assert moved > 100 * TOLERANCE, "the training is too small for this test to see anything"
            path = trainer.publish(f"s-{number}", kind)
            await hotload(client, path)
            prompts = random_rows(rng, num, 1, 60)
            done = await sample(client, prompts)
            expected = trainer.logprobs([p + tokens for p, (tokens, _) in zip(prompts, done, strict=True)])
            for prompt, (_, sampled), full in zip(prompts, done, expected, strict=True):
                found.append(float(np.abs(full[len(prompt) - 1 :] - np.asarray(sampled)).max()))
    return found


@pytest.mark.prove
@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_sampler_matches_trainer(tiny_dir: Path, tmp_path: Path, record: Record, lora: LoraConfig) -> None:
    torch.set_num_threads(1)
    trainer = Trainer(tiny_dir, tmp_path, lora)
    rounds = ["base", "delta"] * count(1, 3)
    found = asyncio.run(differences(tiny_dir, trainer, rounds, count(20, 60)))
    record("sequences", len(found))
    record("largest difference, nats", max(found))
    assert max(found) <= TOLERANCE
