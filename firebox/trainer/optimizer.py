"""The optimizer step: normalize, clip by global norm, AdamW, clear.

Owns the order of these four and the AdamW state, keyed by parameter name. Does not know where gradients come from.

Invariant: a step happens completely or not at all; gradients that are not finite are dropped and reported, never
applied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from firebox.wire.errors import FailedPrecondition, InvalidArgument
from firebox.wire.training import AdamParams, GradNormMetrics

_BUCKETS: Final = ("attn", "mlp", "norm", "embed", "lm_head")
_MOMENTS: Final = ("step", "exp_avg", "exp_avg_sq")


class AdamW:
    """AdamW over named parameters; hyper-parameters come with every step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self.reset()

    def reset(self) -> None:
        """Forget the moments and the step count."""
        self._adam = torch.optim.AdamW(list(self._parameters.values()), fused=True)

    def step(self, params: AdamParams, divisor: int) -> dict[str, float]:
        """Apply the accumulated gradients divided by `divisor` and clear them; a missing gradient counts as zero.

        Returns the metrics that `params.emit_grad_norm_metrics` asks for, `grad_norm` being that after the division
        and before clipping. Raises InvalidArgument for an impossible hyper-parameter, then nothing has changed, and
        FailedPrecondition for gradients that are not finite, which are dropped.
        """
        mode = _check(params)
        parameters = list(self._parameters.values())
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters]
        if divisor != 1:
            torch._foreach_div_(gradients, divisor)
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self.clear_gradients()
            raise FailedPrecondition(
                f"optim_step: the gradient norm is {norm.item()}; the step was not applied and the gradients were "
                "dropped. Look for extreme advantages or log-probs in the data",
                reason="GRADIENT_NOT_FINITE",
            )
        metrics = self._metrics(mode, norm.item(), params)
        if params.grad_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, params.grad_clip_norm, norm)
        self._adam.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._adam.step()
        self.clear_gradients()
        return metrics

    def clear_gradients(self) -> None:
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<parameter name>/<step | exp_avg | exp_avg_sq>` -> tensor; empty before the first step."""
        return {
            f"{name}/{moment}": self._adam.state[parameter][moment]
            for name, parameter in self._parameters.items()
            if parameter in self._adam.state
            for moment in _MOMENTS
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state()` gave; the tensors are kept, not copied."""
        self.reset()
        if state:
            for name, parameter in self._parameters.items():
                self._adam.state[parameter] = {moment: state[f"{name}/{moment}"] for moment in _MOMENTS}

    def _metrics(self, mode: GradNormMetrics, norm: float, params: AdamParams) -> dict[str, float]:
        metrics = {"lr": params.learning_rate}
        if mode != "off":
            clip = params.grad_clip_norm
            metrics["grad_norm"] = norm
            metrics["grad_norm_rms"] = norm / math.sqrt(sum(p.numel() for p in self._parameters.values()))
            metrics["grad_norm_post_clip"] = min(norm, clip) if clip > 0 else norm
        if mode == "detailed":
            metrics |= self._bucket_norms()
        return metrics | {f"{name}:last": value for name, value in metrics.items()}

    def _bucket_norms(self) -> dict[str, float]:
        buckets: dict[str, list[Tensor]] = {}
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            bucket = next((b for b in _BUCKETS if b in name), "other")
            buckets.setdefault(bucket, []).append(parameter.grad)
        return {f"grad_norm_{b}": torch.nn.utils.get_total_norm(g).item() for b, g in buckets.items()}


def _check(params: AdamParams) -> GradNormMetrics:
    for field in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, field)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgument(f"adam_params.{field}: {value} must be a finite number, 0 or above")
    for field in ("beta1", "beta2"):
        value = getattr(params, field)
        if not 0 <= value < 1:
            raise InvalidArgument(f"adam_params.{field}: {value} must lie in [0, 1)")
    mode = params.emit_grad_norm_metrics
    if isinstance(mode, bool):
        return "basic" if mode else "off"
    return mode or "off"
