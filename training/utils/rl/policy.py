"""Rollouts and their advantages to a policy gradient: which loss of the server, and what each token brings to it.

Knows no sampling and no loop. Invariant: only tokens that the model sampled carry an advantage; what the environment
said and the prompt never have a gradient. Legend: C tokens behind a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, get_args

import numpy as np

from training.utils import losses
from training.utils.datums import build_datum
from training.utils.losses import Array
from training.utils.rl.config import PolicyConfig, PolicyLoss
from training.utils.rl.trajectory import Groups, Rollout

if TYPE_CHECKING:
    from fireworks.training.sdk.types import Datum


class ServerLoss(NamedTuple):
    """A loss by the server's name, and its settings."""

    name: str
    config: dict[str, float]


def _clip(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": low, "clip_high_threshold": high}


# The settings are those of the papers; a bound is the ratio itself, not a distance from 1.
POLICY_LOSSES: Final[dict[str, ServerLoss]] = {
    "grpo": ServerLoss("ppo", _clip(0.8, 1.2)),  # Shao et al. 2024
    "importance_sampling": ServerLoss("importance_sampling", {}),
    "dapo": ServerLoss("dapo", _clip(0.8, 1.28)),  # Yu et al. 2025
    "gspo": ServerLoss("gspo", _clip(1 - 3e-4, 1 + 4e-4)),  # Zheng et al. 2025
    "cispo": ServerLoss("cispo", _clip(0.0, 4.0)),  # MiniMax 2025, no lower bound
    "dro": ServerLoss("dro", {"beta": 0.05}),  # Richemond et al. 2024
    "reinforce": ServerLoss("reinforce", {}),  # Williams 1992
}
assert set(POLICY_LOSSES) == set(get_args(PolicyLoss))


def server_loss(policy_loss: PolicyLoss, settings: PolicyConfig) -> ServerLoss:
    """The server's loss with the bounds that are set. Raises ConfigError for a bound of a loss that does not clip."""
    name, config = POLICY_LOSSES[policy_loss]
    asked = {"clip_low_threshold": settings.clip_low, "clip_high_threshold": settings.clip_high}
    bounds = {key: value for key, value in asked.items() if value is not None}
    if bounds and not bounds.keys() <= config.keys():
        field = "clip_low" if settings.clip_low is not None else "clip_high"
        raise settings.refuse(field, f"leave it unset: {policy_loss} does not clip")
    return ServerLoss(name, config | bounds)


class Scorer(Protocol):
    """Whatever answers `forward` with the log-probs of datums: a trainer, or the frozen base in its session."""

    def forward(self, data: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Example:
    """One rollout as the loss reads it: advantage, old log-prob and weight of each token behind the prompt, all [C]."""

    rollout: Rollout
    advantages: Array
    old_logprobs: Array
    weights: Array | None

    def datum(self) -> Datum:
        prompt = [0.0] * len(self.rollout.prompt.tokens)
        weights = {} if self.weights is None else {"weights": prompt + self.weights.tolist()}
        return build_datum(
            [*self.rollout.prompt.tokens, *self.rollout.tokens],
            logprobs=prompt + self.old_logprobs.tolist(),
            advantages=prompt + self.advantages.tolist(),
            **weights,
        )


def instructive(groups: Groups, advantages: Sequence[Array], settings: PolicyConfig) -> list[tuple[Rollout, float]]:
    """The rollouts to train on with their advantages: all, or those of groups whose rewards differ."""
    return [
        (rollout, float(value))
        for group, values in zip(groups, advantages, strict=True)
        if values.any() or not settings.drop_zero_variance
        for rollout, value in zip(group, values, strict=True)
    ]


def examples(
    chosen: Sequence[tuple[Rollout, float]], settings: PolicyConfig, policy: Scorer, reference: Scorer | None
) -> tuple[list[Example], dict[str, float]]:
    """What the loss reads, and what was measured on the way.

    `policy` and `reference` are asked for log-probs where a correction or a penalty needs them.
    """
    rollouts, metrics = [rollout for rollout, _ in chosen], {}
    old = [rollout.logprobs for rollout in rollouts]
    weights: list[Array | None] = [None] * len(rollouts)
    if settings.tis_cap > 0:
        sampler, old = old, logprobs_of(policy, rollouts)
        truncated = [losses.truncated_weights(*pair, settings.tis_cap) for pair in zip(old, sampler, strict=True)]
        metrics["train/tis_weight"] = float(_sampled(rollouts, truncated).mean())
        weights = list(truncated)
    if settings.answer_mean:
        means = [rollout.sampled / rollout.sampled.sum() for rollout in rollouts]
        weights = [mean if own is None else own * mean for own, mean in zip(weights, means, strict=True)]
    shaped = [np.full(len(rollout.tokens), value) for rollout, value in chosen]
    if reference is not None:
        theirs = logprobs_of(reference, rollouts)
        penalties = [losses.k3(*pair) for pair in zip(old, theirs, strict=True)]
        metrics["train/kl"] = float(_sampled(rollouts, penalties).mean())
        shaped = [losses.kl_shaped(*three, settings.kl_beta) for three in zip(shaped, old, theirs, strict=True)]
    return [
        Example(rollout, values * rollout.sampled, logprobs, weight)
        for rollout, values, logprobs, weight in zip(rollouts, shaped, old, weights, strict=True)
    ], metrics


def outcome(prepared: Sequence[Example], output: Any, config: dict[str, float]) -> dict[str, float]:
    """What a gradient step has shown, as metrics: loss, share of clipped ratios, sampler against trainer."""
    rollouts = [example.rollout for example in prepared]
    trainer = answer_parts(rollouts, output)
    now, old = _sampled(rollouts, trainer), _sampled(rollouts, [example.old_logprobs for example in prepared])
    metrics = {"train/loss": output.metrics["loss:sum"] / len(now)}
    if "clip_high_threshold" in config:
        ratios = np.exp(now - old)
        outside = (ratios < config["clip_low_threshold"]) | (ratios > config["clip_high_threshold"])
        metrics["train/ratio_outside_fraction"] = float(outside.mean())
    return metrics | compare(rollouts, trainer)


def answer_parts(rollouts: Sequence[Rollout], output: Any) -> list[Array]:
    """A trainer's log-probs of the tokens behind the prompt, [C] per rollout, out of its answer for all [P+C-1]."""
    return [
        np.asarray(result["logprobs"].data, dtype=np.float64)[len(rollout.prompt.tokens) - 1 :]
        for rollout, result in zip(rollouts, output.loss_fn_outputs, strict=True)
    ]


def logprobs_of(scorer: Scorer, rollouts: Sequence[Rollout]) -> list[Array]:
    """This model's log-probs of the tokens behind the prompt, [C] per rollout; no gradient is touched."""
    datums = [build_datum([*rollout.prompt.tokens, *rollout.tokens]) for rollout in rollouts]
    return answer_parts(rollouts, scorer.forward(datums))


def compare(rollouts: Sequence[Rollout], trainer_logprobs: Sequence[Array]) -> dict[str, float]:
    """The mismatch between sampler and trainer over all sampled tokens, as metrics."""
    sampler = _sampled(rollouts, [rollout.logprobs for rollout in rollouts])
    return losses.mismatch(sampler, _sampled(rollouts, trainer_logprobs))


def _sampled(rollouts: Sequence[Rollout], values: Sequence[Array]) -> Array:
    """The values [C] per rollout of all tokens that the model sampled, end to end."""
    return np.concatenate([per_token[rollout.sampled] for rollout, per_token in zip(rollouts, values, strict=True)])
