"""Weights change under many streams: nobody is turned away, every token is labelled, and its label is the truth."""

from __future__ import annotations

import asyncio
import json
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fireworks.training.sdk import FiretitanServiceClient, TrainerJobConfig, TrainerJobManager, types
from proofs import Record, count
from running import MODEL, RunningServer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SNAPSHOTS = 5
STREAMS = count(8, 32)
REPLICAS = 2
MAX_TOKENS = 80
REPEATED = [11, 12, 13, 14, 15, 16, 17, 18]
SWAPS_ARE_APART_S = 0.15
TOLERANCE = 1e-5
BATCH = 32


@dataclass
class Answer:
    """One completion: `labels` name the snapshot of each token of `tokens`, and `logprobs` are in nats."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    labels: list[str | None]


@dataclass
class Trained:
    """A job that has saved snapshots, with a step between each: by identity, where their weights are."""

    job: str
    weights: dict[str, Path]


@pytest.fixture(scope="module")
def trained(server: RunningServer) -> Trained:
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    shape = "accounts/local/trainingShapes/tiny-cpu"
    created = trainers.create(TrainerJobConfig(base_model=MODEL, training_shape_ref=f"{shape}/versions/1"))
    endpoint = trainers.wait_for_ready(created.job_id, created.job_name, timeout_s=120)
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=server.key)
    try:
        client = service.create_training_client(base_model=MODEL, lora_rank=0)
        saved = [train_and_save(client, number) for number in range(SNAPSHOTS)]
    finally:
        service.close()
        trainers.delete(created.job_id)
    folder = server.data / "jobs" / "local" / created.job_id / "snapshots"
    return Trained(created.job_name, {identity: folder / identity / "model.safetensors" for identity in saved})


def train_and_save(client: Any, number: int) -> str:
    tokens = np.random.default_rng(number).integers(0, 1000, 24)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={"target_tokens": types.TensorData.from_numpy(tokens[1:])},
    )
    client.forward_backward([datum], "cross_entropy").result(timeout=60)
    client.optim_step(types.AdamParams(learning_rate=5e-3)).result(timeout=60)
    return str(client.save_weights_for_sampler_ext(f"swap-{number}", checkpoint_type="base").snapshot_name)


class Deployment:
    """A deployment and the calls that its clients make."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self._http = http
        self.name = name

    async def stream(self, prompt: list[int], **fields: Any) -> Answer:
        body = {
            "model": self.name, "prompt": prompt, "max_tokens": MAX_TOKENS, "logprobs": True, "stream": True,
            "ignore_eos": True, **fields,
        }  # fmt: skip
        rows: list[dict[str, Any]] = []
        labels: list[str | None] = []
        async with self._http.stream("POST", "/inference/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                assert not line.startswith("event: error"), line
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    rows += choice["logprobs"]["content"]
                    for span in choice.get("snapshot_identities", []):
                        labels += [span["snapshot_identity"]] * span["count"]
        assert len(rows) == len(labels) == body["max_tokens"], "the stream was cut off"
        return Answer(prompt, [row["token_id"] for row in rows], [row["logprob"] for row in rows], labels)

    async def hot_load(self, identity: str) -> None:
        headers = {"fireworks-deployment": self.name}
        answer = await self._http.post("/hot_load/v1/models/hot_load", headers=headers, json={"identity": identity})
        assert answer.status_code == 200, answer.text
        replicas = answer.json()["replicas"]
        assert [replica["current_snapshot_identity"] for replica in replicas] == [identity] * REPLICAS, replicas


async def swap_under_load(deployment: Deployment, order: list[str]) -> tuple[list[Answer], list[Answer]]:
    """(answers of the streams, answers to the repeated prompt right after each swap); raises what any call raises."""
    answers: list[Answer] = []
    repeated: list[Answer] = []
    over = asyncio.Event()

    async def ask(number: int) -> None:
        rng = random.Random(number)
        while not over.is_set():
            prompt = [rng.randrange(1000) for _ in range(rng.randrange(1, 30))]
            answers.append(await deployment.stream(prompt, temperature=1.0, seed=rng.randrange(2**31)))

    async def swap() -> None:
        for identity in order:
            await deployment.hot_load(identity)
            both = [deployment.stream(REPEATED, temperature=0.0, max_tokens=4) for _ in range(REPLICAS)]
            fresh = await asyncio.gather(*both)
            assert {label for answer in fresh for label in answer.labels} == {identity}, "a stale answer"
            repeated.extend(fresh)
            await asyncio.sleep(SWAPS_ARE_APART_S)
        over.set()

    async with asyncio.TaskGroup() as group:
        for number in range(STREAMS):
            group.create_task(ask(number))
        group.create_task(swap())
    return answers, repeated


def largest_difference(answers: list[Answer], weights: dict[str, Path], model_dir: Path) -> float:
    """Over all tokens: how far the log-prob is from what plain transformers computes with the labelled weights."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_label: defaultdict[str | None, list[Answer]] = defaultdict(list)
    for answer in answers:
        for label in dict.fromkeys(answer.labels):
            by_label[label].append(answer)
    worst = 0.0
    with torch.inference_mode():
        for label, labelled in by_label.items():
            model.load_state_dict(base if label is None else load_file(weights[label]), strict=False)
            labelled.sort(key=lambda answer: len(answer.prompt))
            for first in range(0, len(labelled), BATCH):
                worst = max(worst, difference(model, labelled[first : first + BATCH], label))
    return worst


def difference(model: Any, answers: list[Answer], label: str | None) -> float:
    """Over the tokens of that label; what pads a row lies behind them, where causal attention does not look."""
    rows = [torch.tensor(answer.prompt + answer.tokens) for answer in answers]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    logprobs = model(tokens[:, :-1]).logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    worst = 0.0
    for answer, row in zip(answers, logprobs, strict=True):
        first = len(answer.prompt) - 1
        errors = (row[first : first + len(answer.tokens)] - torch.tensor(answer.logprobs)).abs()
        worst = max(worst, float(errors[torch.tensor([own == label for own in answer.labels])].max()))
    return worst


@pytest.mark.prove
@pytest.mark.timeout(900)
@pytest.mark.parametrize("transition", ["ASYNC", "SYNC"])
def test_swaps_under_load(server: RunningServer, trained: Trained, record: Record, transition: str) -> None:
    ident = f"swaps-{transition.lower()}"
    body = {
        "baseModel": MODEL, "enableHotLoad": True, "hotLoadTrainerJob": trained.job,
        "hotLoadTransitionType": transition, "minReplicaCount": REPLICAS, "maxReplicaCount": REPLICAS,
    }  # fmt: skip
    made = server.ask("POST", "/v1/accounts/local/deployments", params={"deploymentId": ident}, json=body)
    assert made.json()["state"] == "READY", made.text

    async def load() -> tuple[list[Answer], list[Answer]]:
        limits = httpx.Limits(max_connections=None)
        headers = {"X-Api-Key": server.key}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120, limits=limits) as http:
            deployment = Deployment(http, f"accounts/local/deployments/{ident}")
            order = [list(trained.weights)[number % SNAPSHOTS] for number in range(count(2, 50))]
            await deployment.hot_load(order[-1])
            return await swap_under_load(deployment, order)

    answers, repeated = asyncio.run(load())
    server.ask("DELETE", f"/v1/accounts/local/deployments/{ident}")
    mixed = [answer for answer in answers if len(set(answer.labels)) > 1]
    worst = largest_difference(answers + repeated, trained.weights, server.data / "models" / "local" / "tiny")
    record("swaps", count(2, 50))
    record("streams at once", STREAMS)
    record("responses", len(answers))
    record("responses of mixed weights", len(mixed))
    record("failed requests", 0)  # one would have ended the test
    record("stale answers to a repeated prompt", 0)  # as would one of these
    record("tokens", sum(len(answer.tokens) for answer in answers))
    record("largest difference of a log-prob from its labelled snapshot", worst)
    assert worst <= TOLERANCE
    assert (mixed == []) is (transition == "SYNC"), "under ASYNC some response should have seen a swap"
