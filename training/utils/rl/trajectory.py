"""What was sampled: trajectories of tokens, what they earned, their metrics and the file they are kept in.

Knows neither how they were sampled nor what a loss makes of them. Invariant: the tokens of a trajectory are the tokens
that were sampled and sent, never text that was tokenized again. Legend: P tokens of a prompt, C tokens behind it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.utils.data import Row
from training.utils.losses import Array

Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A row to answer and its token ids [P]."""

    row: Row
    tokens: list[int]


@dataclass(frozen=True)
class Trajectory:
    """A prompt and all that followed it, the environment's words included.

    `tokens` [C] with the sampler's log-prob of each [C], zero where the environment speaks; `sampled` [C] says where
    the model did. The log-probs are the model's own, before temperature, so that they compare with a trainer's.
    `messages` is the whole conversation, `text` the last thing the model said; `truncated` when it was cut off there.
    `version` counts the hot-loads before it was begun; single tokens may come from newer weights.
    """

    prompt: Prompt
    tokens: list[int]
    logprobs: Array
    sampled: NDArray[np.bool_]
    messages: list[Message]
    text: str
    num_turns: int
    truncated: bool
    version: int


@dataclass(frozen=True)
class Rollout(Trajectory):
    """A trajectory and what it earned."""

    reward: float


Groups = Sequence[Sequence[Rollout]]


def flatten(groups: Groups) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def describe(groups: Groups, version: int) -> dict[str, float]:
    """What was sampled in one step, as metrics; `version` counts the hot-loads until now."""
    rollouts = flatten(groups)
    rewards = [rollout.reward for rollout in rollouts]
    spreads = [np.ptp([rollout.reward for rollout in group]) for group in groups]
    ages = [version - rollout.version for rollout in rollouts]
    entropy = -np.concatenate([rollout.logprobs[rollout.sampled] for rollout in rollouts]).mean()
    return {
        "rollout/reward": float(np.mean(rewards)),
        "rollout/reward_std": float(np.std(rewards)),
        "rollout/entropy": float(entropy),
        "rollout/tokens": float(sum(rollout.sampled.sum() for rollout in rollouts)),
        "rollout/turns": float(np.mean([rollout.num_turns for rollout in rollouts])),
        "rollout/truncated_fraction": float(np.mean([rollout.truncated for rollout in rollouts])),
        "rollout/zero_variance_fraction": float(np.mean([spread == 0 for spread in spreads])),
        "rollout/staleness": float(max(ages)),
        "rollout/staleness_mean": float(np.mean(ages)),
    }


def save_rollouts(folder: Path, step: int, groups: Groups, advantages: Sequence[Array]) -> Path:
    """Write every rollout of a step to `step-<n>.jsonl`, one object per line. Returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, (group, values) in enumerate(zip(groups, advantages, strict=True)):
            for rollout, advantage in zip(group, values, strict=True):
                file.write(json.dumps({"group": number} | _line(rollout, float(advantage))) + "\n")
    return path


def _line(rollout: Rollout, advantage: float) -> dict[str, Any]:
    return {
        "origin": rollout.prompt.row.origin,
        "messages": rollout.messages,
        "completion": rollout.text,
        "prompt_tokens": rollout.prompt.tokens,
        "tokens": rollout.tokens,
        "logprobs": [round(value, 6) for value in rollout.logprobs.tolist()],
        "sampled": rollout.sampled.astype(int).tolist(),
        "turns": rollout.num_turns,
        "reward": rollout.reward,
        "advantage": round(advantage, 6),
        "truncated": rollout.truncated,
        "version": rollout.version,
    }
