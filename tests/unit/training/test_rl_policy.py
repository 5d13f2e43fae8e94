"""Rollouts to what a loss reads: masks, corrections and penalties, token by token."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from training.recipes.rl_loop import Config
from training.utils import ConfigError, DeployConfig, InfraConfig, PolicyConfig, validate
from training.utils.data import Row
from training.utils.losses import Array
from training.utils.rl import policy
from training.utils.rl.trajectory import Prompt, Rollout, describe

PROMPT = Prompt(Row([], {}, "rows.jsonl:1"), [7, 8])


def rollout(reward: float, logprobs: list[float], sampled: list[bool] | None = None, version: int = 0) -> Rollout:
    mask = np.array(sampled or [True] * len(logprobs))
    tokens = list(range(10, 10 + len(logprobs)))
    return Rollout(PROMPT, tokens, np.array(logprobs), mask, [], "", 1, False, version, reward)


class Answers:
    """A model that gives every token behind the prompt the log-probs it is told to."""

    def __init__(self, *logprobs: list[float]) -> None:
        self.logprobs = logprobs

    def forward(self, data: Any) -> Any:
        outputs = [{"logprobs": SimpleNamespace(data=[-9.0, *values])} for values in self.logprobs]
        return SimpleNamespace(loss_fn_outputs=outputs)


def prepared(settings: PolicyConfig, *chosen: tuple[Rollout, float], **scorers: Any) -> tuple[Any, dict[str, float]]:
    return policy.examples(chosen, settings, scorers.get("trainer", Answers()), scorers.get("reference"))


def inputs(example: policy.Example) -> dict[str, list[float]]:
    return {name: list(value.data) for name, value in example.datum().loss_fn_inputs.items()}


def test_only_what_the_model_said_is_trained() -> None:
    spoken = rollout(1.0, [-1.0, 0.0, -2.0], sampled=[True, False, True])
    (example,), metrics = prepared(PolicyConfig(), (spoken, 0.5))
    assert metrics == {}
    assert inputs(example) == {
        "target_tokens": [8, 10, 11, 12],
        "logprobs": [0.0, -1.0, 0.0, -2.0],
        "advantages": [0.0, 0.5, 0.0, 0.5],
    }


def test_the_penalty_and_its_metric_see_only_what_the_model_said() -> None:
    spoken = rollout(1.0, [-1.0, 0.0, -2.0], sampled=[True, False, True])
    reference = Answers([-1.5, -30.0, -2.0])
    (example,), metrics = prepared(PolicyConfig(kl_beta=0.1), (spoken, 0.5), reference=reference)
    assert inputs(example)["advantages"] == pytest.approx([0.0, 0.5 - 0.1 * 0.5, 0.0, 0.5])
    assert metrics["train/kl"] == pytest.approx((np.exp(-0.5) - 1 + 0.5 + 0) / 2)


def test_truncated_importance_sampling_weighs_tokens_and_measures_ratios_from_the_trainer() -> None:
    trainer = Answers([-1.0, -5.0, -1.0])
    (example,), metrics = prepared(PolicyConfig(tis_cap=2.0), (rollout(1.0, [-1.0, -4.0, -3.0]), 0.5), trainer=trainer)
    assert inputs(example)["logprobs"] == [0.0, -1.0, -5.0, -1.0]
    assert inputs(example)["weights"] == pytest.approx([0.0, 1.0, np.exp(-1), 2.0])  # e^2 is cut to the cap
    assert metrics["train/tis_weight"] == pytest.approx((1 + np.exp(-1) + 2) / 3)


def test_an_answer_mean_divides_by_the_tokens_that_the_model_said() -> None:
    spoken = rollout(1.0, [-1.0, 0.0, -2.0], sampled=[True, False, True])
    (example,), _ = prepared(PolicyConfig(answer_mean=True), (spoken, 0.5))
    assert inputs(example)["weights"] == [0.0, 0.5, 0.0, 0.5]


def test_groups_of_equal_rewards_are_left_out_unless_asked_for() -> None:
    groups = [[rollout(1.0, [-1.0]), rollout(1.0, [-1.0])], [rollout(0.0, [-1.0]), rollout(1.0, [-1.0])]]
    advantages: list[Array] = [np.zeros(2), np.array([-1.0, 1.0])]
    assert [value for _, value in policy.instructive(groups, advantages, PolicyConfig())] == [-1.0, 1.0]
    everything = policy.instructive(groups, advantages, PolicyConfig(drop_zero_variance=False))
    assert [value for _, value in everything] == [0.0, 0.0, -1.0, 1.0]
    metrics = describe(groups, version=2)
    assert metrics["rollout/zero_variance_fraction"] == 0.5
    assert metrics["rollout/staleness"] == 2


def test_the_outcome_counts_ratios_outside_their_bounds() -> None:
    spoken = rollout(1.0, [-1.0, 0.0, -2.0], sampled=[True, False, True])
    examples, _ = prepared(PolicyConfig(), (spoken, 0.5))
    output = Answers([-1.0, -30.0, -1.5]).forward(examples)
    output.metrics = {"loss:sum": 3.0}
    metrics = policy.outcome(examples, output, policy.server_loss("grpo", PolicyConfig()).config)
    assert metrics["train/loss"] == 1.5
    assert metrics["train/ratio_outside_fraction"] == 0.5
    assert metrics["mismatch/abs_max"] == 0.5


def test_bounds_are_the_papers_unless_set_and_refused_where_nothing_is_clipped() -> None:
    assert policy.server_loss("dapo", PolicyConfig()).config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
    wider = policy.server_loss("grpo", PolicyConfig(clip_high=1.5))
    assert wider == ("ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.5})
    with pytest.raises(ConfigError, match=r"PolicyConfig\.clip_low = 0\.5: leave it unset: dro does not clip"):
        policy.server_loss("dro", PolicyConfig(clip_low=0.5))


def config(**changes: Any) -> Config:
    known = {
        "base_model": "accounts/local/models/tiny",
        "dataset": "rows.jsonl",
        "reward": "m:f",
        "infra": InfraConfig(training_shape_id="accounts/local/trainingShapes/tiny-cpu"),
        "deployment": DeployConfig(tokenizer_model="tiny"),
    }
    return Config(**(known | changes))


def test_an_answer_mean_is_not_divided_twice() -> None:
    validate(config())
    with pytest.raises(ConfigError, match=r"num_loss_tokens.*use num_sequences"):
        validate(config(policy=PolicyConfig(answer_mean=True)))
    validate(config(policy=PolicyConfig(answer_mean=True), grad_accumulation_normalization="num_sequences"))


def test_a_bound_without_a_clip_is_refused_with_the_whole_configuration() -> None:
    with pytest.raises(ConfigError, match="reinforce does not clip"):
        validate(config(policy_loss="reinforce", policy=PolicyConfig(clip_high=2.0)))
