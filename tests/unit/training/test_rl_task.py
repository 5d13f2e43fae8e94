"""Rewards and environments as users write them: by name, plain or asynchronous, of a text or of a whole trajectory."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tyro

from training.recipes.rl_loop import Config
from training.utils.data import Row
from training.utils.errors import ConfigError, DataError
from training.utils.rl.config import RolloutConfig
from training.utils.rl.rewards import Task
from training.utils.rl.trajectory import Prompt, Trajectory

ROW = Row([{"role": "user", "content": "?"}], {"answer": "42"}, "rows.jsonl:3")
TRAJECTORY = Trajectory(Prompt(ROW, [1]), [2, 3], np.zeros(2), np.array([True, True]), [], "42", 1, False, 0)


def exact(completion: str, row: dict[str, Any]) -> float:
    return float(completion == row["answer"])


async def exact_later(completion: str, row: dict[str, Any]) -> float:
    await asyncio.sleep(0)
    return exact(completion, row)


def length(trajectory: Trajectory) -> float:
    return float(len(trajectory.tokens))


def echo(row: dict[str, Any]) -> Callable[[str], list[dict[str, str]]]:
    told = iter(["first", "second"])
    return lambda completion: [
        {"role": "tool", "content": f"{text}: {completion}"} for text in [next(told, "")] if text
    ]


def reward_of(function: Any, **settings: Any) -> float:
    return asyncio.run(Task(function, RolloutConfig(**settings)).reward(TRAJECTORY))


@pytest.mark.parametrize(("function", "expected"), [(exact, 1.0), (exact_later, 1.0), (length, 2.0)])
def test_a_reward_takes_the_answer_and_its_row_or_the_whole_trajectory(function: Any, expected: float) -> None:
    assert reward_of(function) == expected


def test_a_reward_can_be_named() -> None:
    row = Row([], {"ground_truth": {"numbers": [1], "target": 1}}, "rows.jsonl:1")
    trajectory = Trajectory(Prompt(row, [1]), [2], np.zeros(1), np.array([True]), [], "<answer>1</answer>", 1, False, 0)
    task = Task("training.examples.countdown:reward", RolloutConfig())
    assert asyncio.run(task.reward(trajectory)) == 1.0


@pytest.mark.parametrize(
    "wrong",
    ["countdown", "training.examples.countdown:nothing", "no.such.module:f", "training.utils:__name__", dict.pop],
)
def test_what_cannot_be_a_reward_is_refused_before_anything_runs(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="reward"):
        Task(wrong, RolloutConfig())
    with pytest.raises(ConfigError, match=r"rollout\.environment"):
        Task(exact, RolloutConfig(environment=wrong if isinstance(wrong, str) else lambda: None))


@pytest.mark.parametrize("value", [None, "1", float("nan"), float("inf")])
def test_a_reward_must_be_a_finite_number(value: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the reward function returned"):
        reward_of(lambda completion, row: value)


def test_a_command_line_names_functions() -> None:
    said = (
        "--base-model m --dataset d --reward training.examples.calculator:reward "
        "--rollout.environment training.examples.calculator:Calculator --policy-loss cispo --policy.clip-high 3"
    )
    config = tyro.cli(Config, args=said.split())
    assert (config.policy_loss, config.policy.clip_high) == ("cispo", 3)
    talk = asyncio.run(Task(config.reward, config.rollout).begin(ROW))
    assert asyncio.run(talk("no call")) == []


def test_what_a_reward_raises_is_not_dressed_up() -> None:
    def broken(completion: str, row: dict[str, Any]) -> float:
        raise TimeoutError("my own")

    with pytest.raises(TimeoutError, match="my own"):
        reward_of(broken)


def test_a_reward_that_hangs_is_given_up_and_keeps_nobody_alive() -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the reward gave no answer in 0\.1 s; .*call_timeout_s"):
        reward_of(lambda completion, row: time.sleep(30), call_timeout_s=0.1)
    assert time.monotonic() - started < 5


def test_slow_rewards_wait_side_by_side() -> None:
    async def many() -> list[float]:
        task = Task(lambda completion, row: time.sleep(0.3) or 1.0, RolloutConfig())
        return await asyncio.gather(*[task.reward(TRAJECTORY) for _ in range(40)])

    started = time.monotonic()
    assert asyncio.run(many()) == [1.0] * 40
    assert time.monotonic() - started < 3  # one after the other would take 12 s


def test_an_environment_keeps_what_it_knows_about_one_rollout() -> None:
    async def talk() -> list[list[dict[str, Any]]]:
        task = Task(exact, RolloutConfig(environment=echo))
        one, other = await task.begin(ROW), await task.begin(ROW)
        return [await one("a"), await other("b"), await one("c"), await one("d")]

    said = [[message["content"] for message in messages] for messages in asyncio.run(talk())]
    assert said == [["first: a"], ["first: b"], ["second: c"], []]


def test_an_environment_must_answer_with_messages() -> None:
    async def talk() -> None:
        task = Task(exact, RolloutConfig(environment=lambda row: lambda completion: [{"role": "tool", "content": 4}]))
        await (await task.begin(ROW))("a")

    with pytest.raises(DataError, match=r"the environment returned .*'role' and 'content' of a message must be text"):
        asyncio.run(talk())


def test_without_an_environment_a_conversation_ends_at_once() -> None:
    async def talk() -> list[dict[str, Any]]:
        return await (await Task(exact, RolloutConfig()).begin(ROW))("a")

    assert asyncio.run(talk()) == []
