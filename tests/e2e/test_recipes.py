"""Both recipes on real rows against a whole server. Needs FIREBOX_TEST_DATA, a folder with the data sets."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
from proofs import Record, count
from running import MODEL, RunningServer

from training.recipes import rl_loop, sft_loop
from training.utils import DeployConfig, InfraConfig, OptimConfig, RolloutConfig, WeightSyncConfig
from training.utils.data import load_chats, split
from training.utils.render import load_tokenizer, render_chat

DATA = Path(os.environ.get("FIREBOX_TEST_DATA") or "/nonexistent")
INFRA = InfraConfig(training_shape_id="accounts/local/trainingShapes/tiny-cpu")


@pytest.fixture(autouse=True)
def _address(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def rows() -> Path:
    if not DATA.is_dir():
        pytest.skip("FIREBOX_TEST_DATA is not set")
    return DATA


def tokenizer(server: RunningServer) -> str:
    return str(server.data / "models" / "local" / "tiny")


@pytest.mark.prove
def test_sft_on_real_chats_beats_counting_tokens(
    server: RunningServer, rows: Path, tmp_path: Path, record: Record
) -> None:
    """80 rows to train on, 20 held out: the held-out loss gets below that of a unigram of the training targets."""
    config = sft_loop.Config(
        base_model=MODEL,
        tokenizer_model=tokenizer(server),
        dataset=str(rows / "text2sql_sft.jsonl"),
        log_path=str(tmp_path),
        eval_fraction=0.2,
        max_steps=count(40, 100),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=5),
        infra=INFRA,
    )
    metrics = sft_loop.main(config)["metrics"]
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    record("held-out loss before, nats per token", first["eval/loss"])
    record("held-out loss after, nats per token", metrics["eval/loss"])
    record("held-out loss of a unigram, nats per token", metrics["eval/unigram_loss"])
    assert metrics["eval/unigram_loss"] == pytest.approx(unigram_loss(config), rel=1e-9)
    assert metrics["eval/loss"] < metrics["eval/unigram_loss"] < first["eval/loss"]
    assert (tmp_path / "curves.png").stat().st_size > 0


def unigram_loss(config: sft_loop.Config) -> float:
    """What the counts of the 80 rows' targets, plus one each, make of the targets of the 20: nats per token."""
    tokenizer = load_tokenizer(config.tokenizer_model)
    train, held_out = (
        [token for row in side for chat in render_chat(tokenizer, row) for token in chat.trained_tokens]
        for side in split(load_chats(config.dataset), config.eval_fraction, config.seed)
    )
    seen, num_outcomes = Counter(train), len(train) + len(tokenizer)
    return -sum(math.log((seen[token] + 1) / num_outcomes) for token in held_out) / len(held_out)


@pytest.mark.prove
def test_rl_runs_end_to_end_on_real_prompts(server: RunningServer, rows: Path, tmp_path: Path, record: Record) -> None:
    """A random model earns nothing on this task; every part of the loop runs, and trainer and sampler agree."""
    config = rl_loop.Config(
        base_model=MODEL,
        dataset=str(rows / "countdown_rl.jsonl"),
        reward=_length_reward,
        log_path=str(tmp_path),
        max_steps=count(2, 10),
        rollout=RolloutConfig(prompts_per_step=4, group_size=4, max_tokens=16),
        infra=INFRA,
        deployment=DeployConfig(tokenizer_model=tokenizer(server)),
        weight_sync=WeightSyncConfig(dcp_save_interval=2),
    )
    result = rl_loop.main(config)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == list(range(1, config.max_steps + 1))
    assert all(math.isfinite(row["train/loss"]) and row["time/weight_sync_s"] > 0 for row in steps)
    # The loss itself is near zero, as advantages are centred and ratios begin at one; its gradient is not.
    norms = [row["optim/grad_norm"] for row in steps]
    assert all(0 < norm < math.inf for norm in norms)
    worst = max(row["mismatch/abs_mean"] for row in steps)
    record("steps", len(steps))
    record("losses, first and last step", [steps[0]["train/loss"], steps[-1]["train/loss"]])
    record("gradient norms, smallest and largest", [min(norms), max(norms)])
    record("largest mean mismatch of a step, nats", worst)
    record("weight sync, median s", sorted(row["time/weight_sync_s"] for row in steps)[len(steps) // 2])
    assert worst <= 1e-5
    assert len(result["checkpoints"]) == config.max_steps // 2
    assert len(list((tmp_path / "rollouts").glob("step-*.jsonl"))) == config.max_steps


def _length_reward(completion: str, row: dict[str, object]) -> float:
    """The task's own reward is always 0 for a random model, and equal rewards teach nothing; this one varies."""
    from training.examples.countdown import reward

    return reward(completion, row) + len(completion) / 100
