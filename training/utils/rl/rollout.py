"""Prompts to scored rollouts: conversations sampled by tokens from a deployment, in a thread of their own.

Knows neither the loop nor its schedule. Invariant: rollouts come back in the order in which they were asked for, and
the seed, the step and the position of a rollout fix its draws for given weights.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from training.utils.data import Row
from training.utils.errors import DataError, PlatformError
from training.utils.render import render_prompt
from training.utils.rl.config import RolloutConfig
from training.utils.rl.rewards import Task
from training.utils.rl.trajectory import Message, Prompt, Rollout, Trajectory

if TYPE_CHECKING:
    from fireworks.training.sdk import DeploymentSampler

CLOSE_TIMEOUT_S = 5


class Sampled(NamedTuple):
    """The rollouts of one step, a group per prompt, and how the server's queue was meanwhile."""

    groups: list[list[Rollout]]
    metrics: dict[str, float]


class Rollouts:
    """Scored answers from a deployment, whatever weights it holds. Use as a context manager: it owns an event loop.

    `timeout` (s) bounds the wait for one completion. Raise `version` after each hot-load: rollouts that are begun
    later carry it.
    """

    def __init__(
        self,
        sampler: DeploymentSampler,
        tokenizer: Any,
        task: Task,
        settings: RolloutConfig,
        *,
        timeout: int,
        seed: int,
    ) -> None:
        self._sampler, self._tokenizer, self._task, self._settings = sampler, tokenizer, task, settings
        self._timeout, self._seed = timeout, seed
        self.version = 0

    def __enter__(self) -> Rollouts:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(2 * CLOSE_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()

    def begin(self, prompts: Sequence[Prompt], step: int) -> Future[Sampled]:
        """Start on the training rollouts of a step: `group_size` for each prompt, in order."""
        settings = self._settings
        return self._begin(prompts, step, settings.group_size, settings.temperature)

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """The most likely answer to each prompt."""
        return [group[0] for group in self._begin(prompts, 0, 1, 0.0).result().groups]

    def _begin(self, prompts: Sequence[Prompt], step: int, group_size: int, temperature: float) -> Future[Sampled]:
        jobs = []
        for position, prompt in enumerate(prompts):
            draw = random.Random(f"{self._seed}/{step}/{position}")
            jobs += [_Job(prompt, draw.getrandbits(31), temperature, self.version) for _ in range(group_size)]
        return asyncio.run_coroutine_threadsafe(self._groups(jobs, group_size), self._loop)

    async def _groups(self, jobs: Sequence[_Job], group_size: int) -> Sampled:
        rollouts = await asyncio.gather(*[self._rollout(job) for job in jobs])
        groups = [list(rollouts[start : start + group_size]) for start in range(0, len(rollouts), group_size)]
        return Sampled(groups, self._queueing())

    def _queueing(self) -> dict[str, float]:
        """The server's queue since rollouts came back last, and how many requests at once that allows, as metrics."""
        controller, metrics = self._sampler.concurrency_controller, self._sampler.drain_metrics()
        controller.step_completed()
        waits = [one.prefill_queue_duration for one in metrics if one.prefill_queue_duration is not None]
        return {"rollout/window": float(controller.window_size)} | ({"rollout/queue_s": fmean(waits)} if waits else {})

    async def _rollout(self, job: _Job) -> Rollout:
        trajectory = await self._trajectory(job)
        return Rollout(**vars(trajectory), reward=await self._task.reward(trajectory))

    async def _trajectory(self, job: _Job) -> Trajectory:
        prompt, row, limit = job.prompt, job.prompt.row, self._settings.max_tokens
        respond = await self._task.begin(row)
        said, messages, num_turns = _Said(), list(row.messages), 0
        while True:
            room, seed = limit - len(said.tokens), job.seed + num_turns
            completion = await self._complete(prompt.tokens + said.tokens, room, job.temperature, seed)
            said.add(completion.tokens, completion.logprobs)
            messages.append({"role": "assistant", "content": completion.text})
            num_turns, truncated = num_turns + 1, completion.truncated
            if truncated or num_turns == self._settings.max_turns:
                break
            replies = await respond(completion.text)
            if not replies:
                break
            tokens = reply_tokens(self._tokenizer, replies, row)
            truncated = len(said.tokens) + len(tokens) >= limit
            if truncated:
                break
            said.add(tokens, None)
            messages += replies
        return Trajectory(
            prompt,
            said.tokens,
            np.asarray(said.logprobs, dtype=np.float64),
            np.asarray(said.sampled),
            messages,
            completion.text,
            num_turns,
            truncated,
            job.version,
        )

    async def _complete(self, tokens: list[int], max_tokens: int, temperature: float, seed: int) -> _Completion:
        (completion,) = await self._sampler.sample_with_prompt_tokens(
            tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            logprobs=True,
            seed=seed,
            http_timeout=self._timeout,
        )
        sampled = completion.full_tokens[completion.prompt_len :]
        logprobs = completion.inference_logprobs
        if logprobs is None or len(logprobs) != len(sampled):
            found = "no" if logprobs is None else len(logprobs)
            raise PlatformError(f"the deployment returned {found} log-probs for {len(sampled)} sampled tokens")
        text = self._tokenizer.decode(sampled, skip_special_tokens=True)
        return _Completion(sampled, logprobs, text, completion.finish_reason == "length")

    async def _close(self) -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        # The SDK closes its connections in a task of its own; the loop must live until that is done.
        self._sampler.close()
        pending = asyncio.all_tasks() - {asyncio.current_task()}
        if pending:
            await asyncio.wait(pending, timeout=CLOSE_TIMEOUT_S)


class _Job(NamedTuple):
    """One rollout to be sampled: its prompt, its draw, and the weights that it is begun with."""

    prompt: Prompt
    seed: int
    temperature: float
    version: int


class _Completion(NamedTuple):
    """What one request brought: token ids and log-probs of what the model said, its text, whether it was cut off."""

    tokens: list[int]
    logprobs: list[float]
    text: str
    truncated: bool


@dataclass
class _Said:
    """What follows a prompt, as it grows; see `Trajectory`."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """Append what the model said, or, without log-probs, what the environment did."""
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if logprobs is None else logprobs
        self.sampled += [logprobs is not None] * len(tokens)


def reply_tokens(tokenizer: Any, replies: Sequence[Message], row: Row) -> list[int]:
    """What the chat template puts between the stop token of an assistant's turn and the beginning of the next one.

    It is found on a stand-in for the conversation, so that no token that was sampled is ever rendered again. Raises
    DataError for a template that ends a turn in another way than the model does, or leaves a reply out.
    """

    def rendered(said: str, replies: Sequence[Message]) -> list[int]:
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
        return render_prompt(tokenizer, replace(row, messages=[*turn, *replies]))

    whole, other = rendered(".", replies), rendered("!", replies)
    others = {"assistant": other}
    for index, reply in enumerate(replies):
        changed = [*replies[:index], reply | {"content": reply["content"] + "?"}, *replies[index + 1 :]]
        others[reply["role"]] = rendered(".", changed)
    fix = "let the environment answer in another role"
    if lost := [role for role, changed in others.items() if changed == whole]:
        raise DataError(f"{row.origin}: the chat template leaves out messages of role {lost[0]!r}; {fix}")
    # What follows the assistant's words is what two renderings have in common at their ends.
    num_common = next(num for num in range(len(whole)) if whole[~num:] != other[~num:])
    tail = whole[len(whole) - num_common :]
    if tokenizer.eos_token_id not in tail:
        ends = f"does not end a turn before {replies[0]['role']!r} with {tokenizer.eos_token!r}, as the model does"
        raise DataError(f"{row.origin}: the chat template {ends}; {fix}")
    return tail[tail.index(tokenizer.eos_token_id) + 1 :]
