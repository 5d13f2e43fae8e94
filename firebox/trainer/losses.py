"""Loss functions: log-probabilities in, loss per token out.

Owns the formulas, the settings and the list of what each loss reads. Pure functions on tensors; does not know about
models, batches or gradients. Every tensor has the shape of the targets, [T] or [T, K], where T counts the tokens of
sequences that lie end to end, `lengths` of them.

Invariant: a loss is a plain sum over cells, and a cell depends on its own sequence only, so requests and micro-batches
add up whatever way they are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from firebox.wire.errors import InvalidArgument

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]
PerToken = Callable[[Tensor, Inputs, Config, Sequence[int]], Tensor]


class Loss(NamedTuple):
    """`per_token` maps (log-probs, inputs, config, lengths) to the loss of every cell, before any weights."""

    per_token: PerToken
    required: tuple[str, ...] = ()
    config: Mapping[str, float] = {}

    def __call__(self, logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
        """The loss of every cell, times `inputs["weights"]` when there are any."""
        loss = self.per_token(logprobs, inputs, config, lengths)
        return loss * inputs["weights"] if "weights" in inputs else loss


def cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-log p; without weights every token counts once."""
    return -logprobs


def reinforce(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-A log p: the policy gradient of samples that are on-policy."""
    return -logprobs * inputs["advantages"]


def importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-r A with r = p / p_old."""
    return -_ratio(logprobs, inputs, config) * inputs["advantages"]


def ppo(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-min(r A, clip(r, low, high) A); the thresholds bound the ratio itself."""
    return _pessimistic(_ratio(logprobs, inputs, config), inputs, config)


def cispo(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-clip(r, low, high) A log p, the clipped ratio being a constant: no token loses its gradient."""
    clipped = _clip(_ratio(logprobs.detach(), inputs, config), inputs, config)
    return -clipped * inputs["advantages"] * logprobs


def dro(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-(A log p - beta / 2 (log r)^2); where A is zero there is no pull towards the old policy either."""
    advantages = inputs["advantages"]
    pull = (logprobs - inputs["logprobs"]).square() * (advantages != 0)
    return -(advantages * logprobs - config["beta"] / 2 * pull)


def gspo(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """-min(s A, clip(s, low, high) A), s having the value of the sequence's geometric mean ratio in every token.

    Only the token's own log-prob carries the gradient. The mean goes over the tokens where `sequence_ratio_mask` is
    not zero; without one, over those with an advantage (and a weight).
    """
    mask = inputs.get("sequence_ratio_mask", inputs["advantages"] * inputs.get("weights", torch.ones_like(logprobs)))
    log_ratio = (logprobs.detach() - inputs["logprobs"]) * (mask != 0)
    parts = zip(log_ratio.split(list(lengths)), (mask != 0).split(list(lengths)), strict=True)
    mean = torch.cat([(part.sum() / chosen.sum().clamp(min=1)).expand_as(part) for part, chosen in parts])
    cap = config["seq_ratio_log_cap"]
    ratio = (logprobs - logprobs.detach() + mean).clamp(-cap, cap).exp()
    return _pessimistic(ratio, inputs, config)


def dapo(logprobs: Tensor, inputs: Inputs, config: Config, lengths: Sequence[int]) -> Tensor:
    """PPO clipped twice: where A is below zero, the loss is at most -c A."""
    advantages = inputs["advantages"]
    loss = _pessimistic(_ratio(logprobs, inputs, config), inputs, config)
    return torch.where(advantages < 0, loss.minimum(-config["eps_clip_c"] * advantages), loss)


def _ratio(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    cap = config["ratio_log_cap"]
    return (logprobs - inputs["logprobs"]).clamp(-cap, cap).exp()


def _clip(ratio: Tensor, inputs: Inputs, config: Config) -> Tensor:
    low = inputs.get("clip_low_threshold", config["clip_low_threshold"])
    high = inputs.get("clip_high_threshold", config["clip_high_threshold"])
    return ratio.clamp(min=low).clamp(max=high)


def _pessimistic(ratio: Tensor, inputs: Inputs, config: Config) -> Tensor:
    advantages = inputs["advantages"]
    return -(ratio * advantages).minimum(_clip(ratio, inputs, config) * advantages)


_RL: Final = ("logprobs", "advantages")
_CLIP: Final = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_CAP: Final = {"ratio_log_cap": 20.0}

LOSSES: Final = {
    "cross_entropy": Loss(cross_entropy),
    "reinforce": Loss(reinforce, ("advantages",)),
    "importance_sampling": Loss(importance_sampling, _RL, _CAP),
    "ppo": Loss(ppo, _RL, _CLIP | _CAP),
    "cispo": Loss(cispo, _RL, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0} | _CAP),
    "dro": Loss(dro, _RL, {"beta": 0.05}),
    "gspo": Loss(gspo, _RL, _CLIP | {"seq_ratio_log_cap": 10.0}),
    "dapo": Loss(dapo, _RL, _CLIP | _CAP | {"eps_clip_c": 3.0}),
}

REFUSED: Final = {
    "stable_reinforce": "it needs statistics that samplers here do not record; use importance_sampling or cispo",
    "custom": "losses are not computed from code on the server; use forward_backward_custom",
    "dppo": "its formula is not public; use ppo or dapo",
}
"""Names that clients know, and why they do not work here."""

FLOAT_INPUTS: Final = (
    "weights",
    "logprobs",
    "advantages",
    "clip_low_threshold",
    "clip_high_threshold",
    "sequence_ratio_mask",
)
"""Every per-token input that some loss reads; the others ignore it, so that one datum serves several losses."""


def find_loss(name: str) -> Loss:
    """The loss called `name`; raises InvalidArgument listing the known ones."""
    if name in REFUSED:
        raise InvalidArgument(f"loss_fn: {name} is not supported: {REFUSED[name]}")
    if name not in LOSSES:
        raise InvalidArgument(f"loss_fn: {name!r} is not known; use one of {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


def resolve_config(name: str, loss: Loss, given: Mapping[str, Any]) -> dict[str, float]:
    """The loss's defaults overlaid with `given`; raises InvalidArgument for an unknown key or an impossible value."""
    for key, value in given.items():
        if key not in loss.config:
            known = ", ".join(sorted(loss.config)) or "none"
            raise InvalidArgument(f"loss_fn_config: {name} has no key {key!r}; its keys: {known}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidArgument(f"loss_fn_config.{key}: {value!r} is not a number")
    resolved = {**loss.config, **{key: float(value) for key, value in given.items()}}
    for key, bound in (("ratio_log_cap", 0.0), ("seq_ratio_log_cap", 0.0), ("eps_clip_c", 1.0)):
        if key in resolved and not resolved[key] > bound:
            raise InvalidArgument(f"loss_fn_config.{key}: {resolved[key]} must be above {bound:g}")
    if resolved.get("beta", 0.0) < 0:
        raise InvalidArgument(f"loss_fn_config.beta: {resolved['beta']} must be 0 or above")
    low, high = resolved.get("clip_low_threshold", 0.0), resolved.get("clip_high_threshold", 1.0)
    if low > high:
        raise InvalidArgument(f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}")
    return resolved
