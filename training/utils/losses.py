"""The arithmetic of the recipes: pure functions on numbers and arrays, no tokens, no network.

Legend: N rollouts of one prompt, T tokens. Log-probabilities are natural logarithms, losses nats per token.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CORRELATED_SPREAD = 0.1  # nats; rounding alone uncorrelates what varies less


def mean_weights(weights: Sequence[float], total: float) -> list[float]:
    """Weights [T] of one row scaled so that the summed loss of its batch is a mean over `total` trained tokens."""
    return [weight / total for weight in weights]


def unigram_loss(train_tokens: Iterable[int], held_out_tokens: Sequence[int], vocab_size: int) -> float:
    """Held-out nats per token of the add-one smoothed unigram of the training targets: what counting alone achieves."""
    counts = Counter(train_tokens)
    log_total = math.log(sum(counts.values()) + vocab_size)
    return sum(log_total - math.log(counts[token] + 1) for token in held_out_tokens) / len(held_out_tokens)


def group_advantages(rewards_N: Sequence[float], kind: str = "grpo") -> Array:
    """What each of the rewards [N] of one prompt is above its group.

    `grpo` centres them and divides by their population standard deviation (Shao et al. 2024), `dr_grpo` only centres
    them (Liu et al. 2025), `rloo` compares each with the mean of the others (Ahmadian et al. 2024). A group whose
    rewards are all equal teaches nothing: its advantages are exactly zero.
    """
    rewards = np.asarray(rewards_N, dtype=np.float64)
    if np.ptp(rewards) == 0:
        return np.zeros_like(rewards)
    advantages: dict[str, Array] = {
        "grpo": (rewards - rewards.mean()) / (rewards.std() + 1e-6),
        "dr_grpo": rewards - rewards.mean(),
        "rloo": (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1),
    }
    return advantages[kind]


def truncated_weights(trainer_T: Array, sampler_T: Array, cap: float) -> Array:
    """min(p_trainer / p_sampler, cap) per token [T]: what sampling with other numerics or older weights is worth.

    Truncated importance sampling (Yao et al. 2025).
    """
    weights: Array = np.exp(np.minimum(trainer_T - sampler_T, math.log(cap)))
    return weights


def k3(logprobs_T: Array, ref_logprobs_T: Array) -> Array:
    """Schulman's k3 estimate [T] of KL(policy || reference) from tokens that the policy sampled; never negative."""
    log_ratio = ref_logprobs_T - logprobs_T
    return np.expm1(log_ratio) - log_ratio


def kl_shaped(advantages_T: Array | float, logprobs_T: Array, ref_logprobs_T: Array, beta: float) -> Array:
    """One rollout's advantages [T] with the penalty beta * log(policy / reference) taken off each token."""
    return advantages_T - beta * (logprobs_T - ref_logprobs_T)


def mismatch(sampler_T: Array, trainer_T: Array) -> dict[str, float]:
    """How far the log-probs of the sampler and the trainer are apart on the same tokens [T].

    Perfect are 0, 0, 0, 1 and a correlation of 1, which is left out where log-probs hardly vary and it means nothing.
    """
    difference = trainer_T - sampler_T
    metrics = {
        "mismatch/abs_mean": float(np.abs(difference).mean()),
        "mismatch/abs_max": float(np.abs(difference).max()),
        "mismatch/k3": float(k3(sampler_T, trainer_T).mean()),
        "mismatch/exp_abs_mean": float(np.exp(np.abs(difference)).mean()),
    }
    if min(sampler_T.std(), trainer_T.std()) > CORRELATED_SPREAD:
        metrics["mismatch/pearson"] = float(np.corrcoef(sampler_T, trainer_T)[0, 1])
    return metrics
