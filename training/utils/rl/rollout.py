"""Prompts to scored rollouts: sampling by tokens, rewards, and what a trainer makes of them.

Knows neither the loop nor its schedule. Invariant: the tokens that are trained on are the tokens that were sampled,
never text that was tokenized again.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.constructors import PrimitiveConstructorSpec

from training.utils.client import ReconnectableClient
from training.utils.data import Row
from training.utils.datums import build_datum
from training.utils.errors import ConfigError, DataError
from training.utils.losses import Array, mismatch

if TYPE_CHECKING:
    from fireworks.training.sdk import DeploymentSampler
    from fireworks.training.sdk.types import Datum

RewardFunction = Callable[[str, dict[str, Any]], float]
# Either the function or "module:function"; on a command line only the latter can be said.
RewardSpec = Annotated[
    str | RewardFunction,
    PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar="MODULE:FUNCTION",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str) or callable(value),
        str_from_instance=lambda value: [str(value)],
    ),
]
CLOSE_TIMEOUT_S = 5


@dataclass(frozen=True)
class Prompt:
    """A row to answer and its token ids [P]."""

    row: Row
    tokens: list[int]


@dataclass(frozen=True)
class Rollout:
    """One answer: token ids [C], the sampler's log-prob of each [C], what it says and what it earned.

    The log-probs are the model's own, before temperature, so that they compare with a trainer's.
    """

    prompt: Prompt
    tokens: list[int]
    logprobs: Array
    text: str
    truncated: bool
    reward: float

    def datum(self, advantages: float | Array) -> Datum:
        """The datum of a policy-gradient loss; the prompt carries no advantage and so no gradient."""
        num_prompt = len(self.prompt.tokens)
        per_token = np.broadcast_to(np.asarray(advantages, dtype=np.float64), (len(self.tokens),))
        return build_datum(
            [*self.prompt.tokens, *self.tokens],
            logprobs=[0.0] * num_prompt + self.logprobs.tolist(),
            advantages=[0.0] * num_prompt + per_token.tolist(),
        )


def load_reward(spec: RewardSpec) -> RewardFunction:
    """The reward function itself, or the one that "module:function" names. Raises ConfigError when there is none."""
    if callable(spec):
        return spec
    module, _, name = spec.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError("reward", spec, f"expected 'module:function' that can be imported ({exc})") from exc
    if not callable(function):
        raise ConfigError("reward", spec, "does not name a function (completion, row) -> float")
    return function  # type: ignore[no-any-return]


@dataclass
class Rollouts:
    """Scored answers from a deployment, whatever weights it holds. Use as a context manager: it owns an event loop.

    `max_tokens` bounds one answer, `timeout` (s) the wait for it. `seed` and the step fix every draw for given weights.
    """

    sampler: DeploymentSampler
    tokenizer: Any
    reward: RewardFunction
    max_tokens: int
    timeout: int
    seed: int

    def __enter__(self) -> Rollouts:
        self._loop = asyncio.Runner()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run(self._close())
        self._loop.close()

    def sample(
        self, prompts: Sequence[Prompt], *, group_size: int, temperature: float, step: int
    ) -> list[list[Rollout]]:
        """`group_size` rollouts for each prompt, in order; temperature 0 is greedy."""
        jobs = [(prompt, random.Random(f"{self.seed}/{step}/{p}")) for p, prompt in enumerate(prompts)]
        return self._loop.run(self._sample(jobs, group_size, temperature))

    async def _sample(
        self, jobs: Sequence[tuple[Prompt, random.Random]], group_size: int, temperature: float
    ) -> list[list[Rollout]]:
        requests = [
            self._one(prompt, temperature, draw.getrandbits(31)) for prompt, draw in jobs for _ in range(group_size)
        ]
        rollouts = await asyncio.gather(*requests)
        return [rollouts[start : start + group_size] for start in range(0, len(rollouts), group_size)]

    async def _one(self, prompt: Prompt, temperature: float, seed: int) -> Rollout:
        completions = await self.sampler.sample_with_prompt_tokens(
            prompt.tokens,
            max_tokens=self.max_tokens,
            temperature=temperature,
            logprobs=True,
            seed=seed,
            http_timeout=self.timeout,
        )
        return _scored(prompt, completions[0], self.tokenizer, self.reward)

    async def _close(self) -> None:
        # The SDK closes its connections in a task of its own; the loop must live until that is done.
        self.sampler.close()
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        if pending:
            await asyncio.wait(pending, timeout=CLOSE_TIMEOUT_S)


def describe(groups: Sequence[Sequence[Rollout]], advantages: Sequence[Array]) -> dict[str, float]:
    """What was sampled in one step, as metrics."""
    rollouts = [rollout for group in groups for rollout in group]
    rewards = [rollout.reward for rollout in rollouts]
    return {
        "rollout/reward": float(np.mean(rewards)),
        "rollout/reward_std": float(np.std(rewards)),
        "rollout/tokens": float(sum(len(rollout.tokens) for rollout in rollouts)),
        "rollout/truncated_fraction": float(np.mean([rollout.truncated for rollout in rollouts])),
        "rollout/zero_variance_fraction": float(np.mean([not values.any() for values in advantages])),
    }


def answer_parts(rollouts: Sequence[Rollout], output: Any) -> list[Array]:
    """A trainer's log-probs of the sampled tokens, [C] per rollout, out of its answer for all positions [P+C-1]."""
    return [
        np.asarray(result["logprobs"].data, dtype=np.float64)[len(rollout.prompt.tokens) - 1 :]
        for rollout, result in zip(rollouts, output.loss_fn_outputs, strict=True)
    ]


def logprobs_of(trainer: ReconnectableClient, rollouts: Sequence[Rollout]) -> list[Array]:
    """This trainer's log-probs of the sampled tokens, [C] per rollout; no gradient is touched."""
    datums = [build_datum([*rollout.prompt.tokens, *rollout.tokens]) for rollout in rollouts]
    return answer_parts(rollouts, trainer.forward(datums))


def compare(rollouts: Sequence[Rollout], trainer_logprobs: Sequence[Array]) -> dict[str, float]:
    """The mismatch between sampler and trainer over all sampled tokens, as metrics."""
    sampled = np.concatenate([rollout.logprobs for rollout in rollouts])
    return mismatch(sampled, np.concatenate(list(trainer_logprobs)))


def save_rollouts(folder: Path, step: int, groups: Sequence[Sequence[Rollout]], advantages: Sequence[Array]) -> Path:
    """Write every rollout of a step to `step-<n>.jsonl`, one object per line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, (group, values) in enumerate(zip(groups, advantages, strict=True)):
            for rollout, advantage in zip(group, values, strict=True):
                line = {
                    "group": number,
                    "origin": rollout.prompt.row.origin,
                    "messages": rollout.prompt.row.messages,
                    "completion": rollout.text,
                    "tokens": rollout.tokens,
                    "logprobs": [round(value, 6) for value in rollout.logprobs.tolist()],
                    "reward": rollout.reward,
                    "advantage": round(float(advantage), 6),
                    "truncated": rollout.truncated,
                }
                file.write(json.dumps(line) + "\n")
    return path


def _scored(prompt: Prompt, completion: Any, tokenizer: Any, reward: RewardFunction) -> Rollout:
    tokens = completion.full_tokens[completion.prompt_len :]
    logprobs = completion.inference_logprobs
    if logprobs is None or len(logprobs) != len(tokens):
        found = "none" if logprobs is None else len(logprobs)
        raise RuntimeError(f"the deployment returned {found} log-probs for {len(tokens)} sampled tokens")
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    value = reward(text, prompt.row.fields)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{prompt.row.origin}: the reward function returned {value!r}; it must return a finite number")
    truncated = completion.finish_reason == "length"
    return Rollout(prompt, tokens, np.asarray(logprobs, dtype=np.float64), text, truncated, float(value))
