"""Loss functions: log-probabilities in, loss per token out.

Owns the formulas and the list of what each loss reads. Pure functions on tensors; does not know about models,
batches or gradients. Every tensor has the shape of the targets: [T] or [T, K].

Invariant: a loss is a plain sum over cells, so requests and micro-batches add up whatever way they are cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor

from firebox.wire.errors import InvalidArgument

Inputs = Mapping[str, Tensor]
Config = Mapping[str, float]


class Loss(NamedTuple):
    """`per_token` maps (log-probs, inputs, config) to the loss of every cell."""

    per_token: Callable[[Tensor, Inputs, Config], Tensor]
    required: tuple[str, ...]
    config: dict[str, float]


def cross_entropy(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-w log p; without weights every token counts once."""
    return _weighted(-logprobs, inputs)


def importance_sampling(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-r A with r = p / p_old."""
    return _weighted(-_ratio(logprobs, inputs, config) * inputs["advantages"], inputs)


def ppo(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    """-min(r A, clip(r, low, high) A); the thresholds bound the ratio itself."""
    ratio, advantages = _ratio(logprobs, inputs, config), inputs["advantages"]
    low = inputs.get("clip_low_threshold", config["clip_low_threshold"])
    high = inputs.get("clip_high_threshold", config["clip_high_threshold"])
    clipped = ratio.clamp(min=low).clamp(max=high)
    return _weighted(-(ratio * advantages).minimum(clipped * advantages), inputs)


def _ratio(logprobs: Tensor, inputs: Inputs, config: Config) -> Tensor:
    cap = config["ratio_log_cap"]
    return (logprobs - inputs["logprobs"]).clamp(-cap, cap).exp()


def _weighted(loss: Tensor, inputs: Inputs) -> Tensor:
    weights = inputs.get("weights")
    return loss if weights is None else loss * weights


_RL_INPUTS: Final = ("logprobs", "advantages")

LOSSES: Final = {
    "cross_entropy": Loss(cross_entropy, (), {}),
    "importance_sampling": Loss(importance_sampling, _RL_INPUTS, {"ratio_log_cap": 20.0}),
    "ppo": Loss(ppo, _RL_INPUTS, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "ratio_log_cap": 20.0}),
}

FLOAT_INPUTS: Final = ("weights", "logprobs", "advantages", "clip_low_threshold", "clip_high_threshold")
"""Every per-token input that some loss reads; the others ignore it, so that one datum serves several losses."""


def find_loss(name: str) -> Loss:
    """The loss called `name`; raises InvalidArgument listing the known ones."""
    if name not in LOSSES:
        raise InvalidArgument(f"loss_fn: {name!r} is not known; use one of {', '.join(sorted(LOSSES))}")
    return LOSSES[name]


def resolve_config(name: str, loss: Loss, given: Mapping[str, Any]) -> dict[str, float]:
    """The loss's defaults overlaid with `given`; raises InvalidArgument for an unknown key or a non-number."""
    for key, value in given.items():
        if key not in loss.config:
            known = ", ".join(sorted(loss.config)) or "none"
            raise InvalidArgument(f"loss_fn_config: {name} has no key {key!r}; its keys: {known}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidArgument(f"loss_fn_config.{key}: {value!r} is not a number")
    resolved = loss.config | {key: float(value) for key, value in given.items()}
    if resolved.get("ratio_log_cap", 1.0) <= 0:
        raise InvalidArgument(f"loss_fn_config.ratio_log_cap: {resolved['ratio_log_cap']} must be above 0")
    low, high = resolved.get("clip_low_threshold", 0.0), resolved.get("clip_high_threshold", 1.0)
    if low > high:
        raise InvalidArgument(f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}")
    return resolved
