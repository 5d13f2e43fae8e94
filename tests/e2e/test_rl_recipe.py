"""The RL recipe against a whole server: it learns with every policy loss, ahead of its trainer, and over many turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proofs import FULL, Record, count
from running import MODEL, RunningServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.recipes import rl_loop
from training.utils import DeployConfig, InfraConfig, OptimConfig, PolicyConfig, RolloutConfig
from training.utils.rl.policy import POLICY_LOSSES
from training.utils.rl.trajectory import Trajectory

Metrics = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _address(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    path.write_text("".join(json.dumps({"prompt": f"Say {word}"}) + "\n" for word in words))
    return path


def vowels(completion: str, row: dict[str, Any]) -> float:
    """The share of vowels: a random model earns some, and every answer earns something else."""
    return sum(letter in "aeiou" for letter in completion) / max(len(completion), 1)


def slow_vowels(completion: str, row: dict[str, Any]) -> float:
    time.sleep(0.2)
    return vowels(completion, row)


def config(server: RunningServer, rows: Path, log_path: Path, **changes: Any) -> rl_loop.Config:
    known: dict[str, Any] = {
        "base_model": MODEL,
        "dataset": str(rows),
        "reward": vowels,
        "log_path": str(log_path),
        "infra": InfraConfig(training_shape_id="accounts/local/trainingShapes/tiny-cpu"),
        "deployment": DeployConfig(tokenizer_model=str(server.data / "models" / "local" / "tiny")),
        "optim": OptimConfig(learning_rate=4e-3, weight_decay=0.0),
    }
    return rl_loop.Config(**(known | changes))


def run(settings: rl_loop.Config) -> Metrics:
    rl_loop.main(settings)
    return [json.loads(line) for line in (Path(settings.log_path) / "metrics.jsonl").read_text().splitlines()]


def rewards(steps: Metrics) -> list[float]:
    return [step["rollout/reward"] for step in steps]


@pytest.mark.prove
@pytest.mark.parametrize("policy_loss", list(POLICY_LOSSES) if FULL else ["importance_sampling"])
def test_the_reward_rises_with_weights_that_are_one_version_old(
    policy_loss: Any, server: RunningServer, rows: Path, tmp_path: Path, record: Record
) -> None:
    """Samples of older weights are what the seven formulas differ by: on fresh ones their gradients are the same."""
    rollout = RolloutConfig(prompts_per_step=4, group_size=8, max_tokens=8, max_head_offpolicy_versions=1)
    steps = run(config(server, rows, tmp_path, policy_loss=policy_loss, max_steps=count(10, 16), rollout=rollout))
    before, after = rewards(steps)[0], float(np.mean(rewards(steps)[-3:]))
    record("reward before", before)
    record("reward after", after)
    record("steps", len(steps))
    assert [step["rollout/staleness"] for step in steps] == [0.0] + [1.0] * (len(steps) - 1)
    assert after > before + 0.05
    assert all(step["rollout/window"] >= 1 for step in steps)


@pytest.mark.prove
@pytest.mark.skipif(not FULL, reason="a race of two runs belongs to the full proofs")
def test_sampling_ahead_reaches_the_same_reward_sooner(
    server: RunningServer, rows: Path, tmp_path: Path, record: Record
) -> None:
    """The reward waits for 200 ms, as a tool call would. Ahead of the trainer, that wait costs next to nothing."""
    seconds = {}
    for staleness in (0, 2):
        rollout = RolloutConfig(prompts_per_step=4, group_size=8, max_tokens=8, max_head_offpolicy_versions=staleness)
        settings = config(
            server, rows, tmp_path / str(staleness), reward=slow_vowels, policy_loss="importance_sampling",
            max_steps=30, rollout=rollout, optim=OptimConfig(learning_rate=2e-3, weight_decay=0.0),
        )  # fmt: skip
        steps = run(settings)
        started = steps[0]["time"] - steps[0]["time/step_s"]
        reached = next(step for step in steps if step["rollout/reward"] >= 0.45)
        seconds[staleness] = reached["time"] - started
        record(f"staleness {staleness}: seconds to a reward of 0.45", seconds[staleness])
        record(f"staleness {staleness}: steps to a reward of 0.45", reached["step"])
        record(f"staleness {staleness}: seconds of all {len(steps)} steps", steps[-1]["time"] - started)
        record(f"staleness {staleness}: reward of the last three steps", float(np.mean(rewards(steps)[-3:])))
    assert seconds[2] < seconds[0]


class Questioner:
    """An environment: asks twice more, then is done."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.questions = iter(["And then?", "And now?"])

    def __call__(self, completion: str) -> list[dict[str, str]]:
        return [{"role": "tool", "content": text} for text in [next(self.questions, None)] if text]


async def chatty(trajectory: Trajectory) -> float:
    """A reward of the whole conversation: the vowels of all turns."""
    said = [message["content"] for message in trajectory.messages if message["role"] == "assistant"]
    return vowels("".join(said), {})


@pytest.fixture(scope="module")
def talker(server: RunningServer, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model, made to end its turn at one token of six: its stop token points where its hidden states do."""
    folder = tmp_path_factory.mktemp("talker")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_dir), AutoTokenizer.from_pretrained(tiny_dir)
    asked = [{"role": "user", "content": "Say one"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    said = torch.randint(0, 1000, (64, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.model(torch.cat([prompt.expand(64, -1), said], 1)).last_hidden_state[:, -40:].flatten(0, 1)
        logit = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), 6.0)).solution[:, 0]
        model.model.embed_tokens.weight[tokenizer.eos_token_id] = logit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    server.command("models", "add", "talker", "--from", str(folder))
    return "accounts/local/models/talker"


def test_turns_with_an_environment_are_trained_as_they_were_sampled(
    server: RunningServer, talker: str, rows: Path, tmp_path: Path
) -> None:
    """A LoRA run with its frozen base as the reference, truncated importance sampling and a mean per answer."""
    settings = config(
        server,
        rows,
        tmp_path,
        base_model=talker,
        reward=chatty,
        lora_rank=8,
        max_steps=3,
        optim=OptimConfig(learning_rate=3e-4),
        grad_accumulation_normalization="num_sequences",
        rollout=RolloutConfig(prompts_per_step=4, group_size=4, max_tokens=64, environment=Questioner),
        policy=PolicyConfig(kl_beta=0.01, tis_cap=2.0, answer_mean=True),
        infra=InfraConfig(training_shape_id="accounts/local/trainingShapes/talker-cpu-lora"),
    )
    steps = run(settings)
    assert all(step["mismatch/abs_mean"] < 1e-5 for step in steps)  # all turns, across the environment's words
    assert all(step["train/tis_weight"] == pytest.approx(1, abs=1e-4) for step in steps)
    assert steps[0]["train/kl"] == pytest.approx(0, abs=1e-9)
    assert steps[2]["train/kl"] > 1e-6
    assert all(1.5 < step["rollout/turns"] <= 3 for step in steps)

    tokenizer = AutoTokenizer.from_pretrained(str(settings.deployment.tokenizer_model))
    lines = [json.loads(line) for line in (tmp_path / "rollouts" / "step-2.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert max(line["turns"] for line in lines) == 3
    for line in lines:
        check_conversation(line, tokenizer.decode)


def check_conversation(line: dict[str, Any], decode: Callable[[list[int]], str]) -> None:
    """What was sent is the conversation as the template writes it, and the environment's part of it is not trained."""
    template = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
    replies = [template.format(message["content"]) for message in line["messages"] if message["role"] == "tool"]
    assert len(replies) == line["turns"] - 1
    spoken = decode([token for token, sampled in zip(line["tokens"], line["sampled"], strict=True) if not sampled])
    assert spoken == "".join(replies)
    assert all(p == 0 for p, sampled in zip(line["logprobs"], line["sampled"], strict=True) if not sampled)
    assert decode(line["prompt_tokens"]).endswith("<|im_start|>assistant\n")
