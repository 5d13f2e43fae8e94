"""The losses of preference recipes: functions of log-probs that torch can differentiate, and what they report.

Knows no tokens and no trainer. Legend: B pairs of a chosen and a rejected answer, T tokens. A loss comes with metrics:
`margin` is how much further the chosen answer is ahead, as the loss sees it, and `accuracy` the share of pairs where it
is ahead at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Loss = tuple["Tensor", dict[str, float]]

DPO_METRICS = ("loss", "margin", "accuracy", "chosen_reward", "rejected_reward")
ORPO_METRICS = ("loss", "margin", "accuracy", "nll", "odds_loss")

LARGEST_MEAN_LOGPROB = -1e-6
"""Mean log-probs are held below this: the odds p / (1 - p) of an answer that the model is certain of are infinite."""


def dpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float,
) -> Loss:
    """Direct preference optimization (Rafailov et al. 2023) on log-probs of whole answers, the mean over the pairs.

    `beta` scales the implicit reward; `label_smoothing` is the share of labels taken to be wrong (Mitchell 2023).
    Metrics: `margin`, `accuracy`, `chosen_reward` and `rejected_reward`, in units of that reward.
    """
    from torch.nn.functional import logsigmoid

    chosen_rewards, rejected_rewards = beta * (chosen_B - ref_chosen_B), beta * (rejected_B - ref_rejected_B)
    margins = chosen_rewards - rejected_rewards
    loss = (-(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)).mean()
    return loss, _reported(DPO_METRICS, loss, margins, _ahead(margins), chosen_rewards, rejected_rewards)


def orpo(
    chosen_B: Tensor, rejected_B: Tensor, chosen_lengths_B: Tensor, rejected_lengths_B: Tensor, *, weight: float
) -> Loss:
    """Odds ratio preference optimization (Hong et al. 2024) on log-probs of whole answers and their lengths in tokens.

    The nats per token of the chosen answers, plus `weight` times the mean over the pairs of how little the odds favour
    the chosen answer. Odds are those of the mean log-prob per token. Metrics: `margin` (log of the odds ratio),
    `accuracy`, `nll` and `odds_loss`, the two parts of the loss before the weight.
    """
    from torch.nn.functional import logsigmoid

    nll = -chosen_B.sum() / chosen_lengths_B.sum()
    margins = _log_odds(chosen_B / chosen_lengths_B) - _log_odds(rejected_B / rejected_lengths_B)
    odds_loss = -logsigmoid(margins).mean()
    loss = nll + weight * odds_loss
    return loss, _reported(ORPO_METRICS, loss, margins, _ahead(margins), nll, odds_loss)


def _log_odds(logprob_B: Tensor) -> Tensor:
    bounded = logprob_B.clamp(max=LARGEST_MEAN_LOGPROB)
    log_odds: Tensor = bounded - (-bounded.expm1()).log()
    return log_odds


def _ahead(margins_B: Tensor) -> Tensor:
    return (margins_B > 0).double()


def _reported(names: tuple[str, ...], *values: Tensor) -> dict[str, float]:
    return {name: float(value.detach().mean()) for name, value in zip(names, values, strict=True)}
