"""The throughput mode: requests of several LoRA models in shared passes give what each of them gives alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from live_engine import LiveEngine, random_rows
from proofs import Record, count
from trainer_harness import datum

from firebox.trainer import mixed
from firebox.wire.training import Command, Failed, Forward, ForwardOutput, LoraConfig

TOLERANCE = 1e-6
MODELS = {
    "wide": LoraConfig(rank=8, alpha=32, seed=1),
    "narrow": LoraConfig(rank=1, alpha=1, seed=2, train_mlp=False),
    "mlp": LoraConfig(rank=4, alpha=8, seed=3, train_attn=False),
    "head": LoraConfig(rank=2, alpha=16, seed=4, train_unembed=True),
}


@pytest.fixture
def engines(tiny_dir: Path, tmp_path: Path) -> tuple[LiveEngine, LiveEngine]:
    """One in throughput mode and one in exact mode, with the same four models, all moved away from their start."""
    together = LiveEngine(tiny_dir, tmp_path, "together", rank=8, models=(), mode="throughput")
    alone = LiveEngine(tiny_dir, tmp_path, "alone", rank=8, models=())
    for engine in (together, alone):
        for number, (model, lora) in enumerate(MODELS.items()):
            engine.create(lora, model)
            for step in range(2):
                engine.backward("cross_entropy", random_rows(10 * number + step), model)
                engine.step(model, learning_rate=1e-2)
    for model in MODELS:
        assert all(torch.equal(a, b) for a, b in zip(tensors(together, model), tensors(alone, model), strict=True))
    return together, alone


def tensors(engine: LiveEngine, model: str) -> list[torch.Tensor]:
    return list(engine.state(model).values())


def request(loss_fn: str, seed: int, lengths: list[int], bad_token: bool = False) -> Forward:
    rng = np.random.default_rng(seed)
    data = []
    for row in random_rows(seed, lengths):
        inputs = {}
        if loss_fn != "cross_entropy":
            inputs["logprobs"] = rng.normal(-6.9, 0.2, len(row) - 1).astype(np.float32)
            inputs["advantages"] = rng.normal(0, 1, len(row) - 1).astype(np.float32)
        if bad_token:
            row[0] = 10**6
        data.append(datum(row, **inputs))
    return Forward(data=data, loss_fn=loss_fn, backward=True)


def commands(seed: int, bad: str = "") -> list[Command]:
    """One request per model, of different losses and sizes: from a few tokens to more than one micro-batch together."""
    rng = np.random.default_rng(seed)
    longest, most = ((250, 30), (8, 3))[seed % 2]
    losses = ("cross_entropy", "ppo", "importance_sampling", "cross_entropy")
    return [
        Command(
            model_id=model,
            operation=request(
                loss_fn, seed + i, rng.integers(2, longest, rng.integers(1, most)).tolist(), model == bad
            ),
        )
        for i, (model, loss_fn) in enumerate(zip(MODELS, losses, strict=True))
    ]


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """|ours - theirs| / |theirs| over all numbers."""
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in side]) for side in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def gradients(engine: LiveEngine, model: str) -> list[np.ndarray]:
    return [t.numpy() for name, t in sorted(engine.state(model).items()) if name.startswith("gradients/")]


@pytest.mark.prove
def test_together_equals_alone(engines: tuple[LiveEngine, LiveEngine], record: Record):
    together, alone = engines
    worst_gradient = worst_logprob = worst_loss = 0.0
    rounds = count(2, 20)
    for number in range(rounds):
        asked = commands(1001 * number)
        ours = together.engine.execute_together(asked)
        for command, output in zip(asked, ours, strict=True):
            expected = alone.engine.execute(command)
            assert isinstance(output, ForwardOutput)
            assert isinstance(expected, ForwardOutput)
            assert output.metrics["models_together:max"] == len(MODELS)
            scores = [[one["logprobs"].data for one in result.loss_fn_outputs] for result in (output, expected)]
            worst_logprob = max(worst_logprob, *(float(abs(a - b).max()) for a, b in zip(*scores, strict=True)))
            losses = [result.metrics["loss:sum"] for result in (output, expected)]
            worst_loss = max(worst_loss, abs(losses[0] - losses[1]) / abs(losses[1]))
            model = command.model_id
            worst_gradient = max(worst_gradient, distance(gradients(together, model), gradients(alone, model)))
            counters = [engine.state(model)["counters"].tolist() for engine in engines]
            assert counters[0] == counters[1]
    record("requests", rounds * len(MODELS))
    record("largest difference of gradients, relative", worst_gradient)
    record("largest difference of log-probs, nats", worst_logprob)
    record("largest difference of losses, relative", worst_loss)
    assert worst_gradient <= TOLERANCE
    assert worst_loss <= TOLERANCE
    assert worst_logprob <= 1e-5  # absolute, of log-probs around -7


def test_one_wrong_request_fails_alone_and_the_others_are_as_alone(engines: tuple[LiveEngine, LiveEngine]):
    together, alone = engines
    asked = commands(7, bad="mlp")
    answers = dict(zip(MODELS, together.engine.execute_together(asked), strict=True))
    assert isinstance(answers["mlp"], Failed)
    assert "token id 1000000" in answers["mlp"].error
    assert answers["mlp"].category == "user"
    for command in asked:
        alone.engine.execute(command)
    for model in MODELS:
        assert all(torch.equal(a, b) for a, b in zip(tensors(together, model), tensors(alone, model), strict=True))
    assert not gradients(together, "mlp")


def test_a_pass_that_breaks_is_run_one_by_one(engines: tuple[LiveEngine, LiveEngine], monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    together, alone = engines
    monkeypatch.setattr(mixed, "run", broken)
    asked = commands(9)
    assert all(isinstance(answer, ForwardOutput) for answer in together.engine.execute_together(asked))
    for command in asked:
        alone.engine.execute(command)
    for model in MODELS:
        assert all(torch.equal(a, b) for a, b in zip(tensors(together, model), tensors(alone, model), strict=True))


def test_only_small_requests_of_the_throughput_mode_share(engines: tuple[LiveEngine, LiveEngine]):
    together, alone = engines
    small, large = (Command(model_id="wide", operation=request("ppo", 1, lengths)) for lengths in ([129], [130]))
    assert together.engine.may_share(small)
    assert not together.engine.may_share(large)
    assert not alone.engine.may_share(small)
    scoring = Forward(data=small.operation.data, loss_fn="ppo", backward=False)
    assert not together.engine.may_share(Command(model_id="wide", operation=scoring))
    assert not together.engine.may_share(Command(model_id="nobody", operation=small.operation))
