"""From logits to tokens: temperature, top-k, top-p, and one uniform number per token.

Pure functions on batches; knows nothing of sequences, caches or requests.

Invariant: the token of a row depends on that row's logits, settings and uniform only, never on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from firebox.modeling.causal_lm import logprobs_of


class Settings(NamedTuple):
    """Per row [B]: `temperature` float32 (0 = greedy), `top_k` int64 (0 = off), `top_p` float64 (1 = off)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor


class Drawn(NamedTuple):
    """Per row [B]: the `tokens` int64, and their log-probabilities in nats, float32.

    `logprobs` are the plain model's (temperature 1, nothing filtered), `sampling_logprobs` those of the distribution
    that was drawn from; a greedy choice is certain, so 0.
    """

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor


def draw(logits: Tensor, settings: Settings, uniforms: Tensor) -> Drawn:
    """Draw one token per row of float32 `logits` [B, V] by inverse CDF of `uniforms` [B] (float64, in [0, 1))."""
    greedy = settings.temperature == 0
    if bool(greedy.all()):
        tokens = logits.argmax(-1)
        return Drawn(tokens, logprobs_of(logits, tokens), torch.zeros_like(logits[:, 0]))
    policy = _behaviour(logits, settings)
    tokens = torch.where(greedy, logits.argmax(-1), _inverse_cdf(policy, uniforms))
    raw = logprobs_of(logits, tokens)
    sampling = raw if policy is logits else logprobs_of(policy, tokens)
    return Drawn(tokens, raw, sampling.masked_fill(greedy, 0.0))


def top_logprobs(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens [B, count] int64 of the plain model and their log-probabilities, best first."""
    values, tokens = logits.topk(min(count, logits.shape[-1]), dim=-1)
    return tokens, values - logits.logsumexp(-1, keepdim=True)


def _behaviour(logits: Tensor, settings: Settings) -> Tensor:
    """Logits [B, V] of the distribution to draw from, excluded tokens at -inf; `logits` itself when nothing changes."""
    policy = logits
    if bool((settings.temperature != 1).any()):
        divisor = settings.temperature.masked_fill(settings.temperature == 0, 1.0).unsqueeze(-1)
        # The maximum goes first: a small temperature then overflows towards -inf only. A row at 1 stays as it is.
        shift = logits.amax(-1, keepdim=True).masked_fill(divisor == 1, 0.0)
        policy = (logits - shift) / divisor
    rows = ((settings.top_k > 0) | (settings.top_p < 1)).nonzero().squeeze(-1)
    if len(rows):
        chosen = policy[rows]
        kept = _kept(chosen, settings.top_k[rows], settings.top_p[rows])
        policy = policy.index_copy(0, rows, chosen.masked_fill(~kept, float("-inf")))
    return policy


def _kept(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """bool [B, V]: the `top_k` likeliest, and of these the fewest whose renormalised mass reaches `top_p`."""
    ordered, order = logits.sort(descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = top_k.masked_fill(top_k == 0, logits.shape[-1]).unsqueeze(-1)
    kept = rank < limit
    mass = ordered.masked_fill(~kept, float("-inf")).softmax(-1, dtype=torch.float64)
    mass_before = mass.cumsum(-1) - mass
    top_p = top_p.unsqueeze(-1)
    # Rounding can bring the mass to 1 before the last token: 1 must still keep them all.
    kept &= (mass_before < top_p) | (top_p >= 1)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _inverse_cdf(policy: Tensor, uniforms: Tensor) -> Tensor:
    cdf = policy.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = cdf[:, -1:]
    # Strictly below the total, so that the first larger entry exists and is a token of positive probability.
    target = torch.minimum(uniforms.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    # NaN logits find no entry at all; the clamp keeps the index legal, the caller sees the NaN log-probability.
    return torch.searchsorted(cdf, target, right=True).squeeze(-1).clamp(max=policy.shape[-1] - 1)
