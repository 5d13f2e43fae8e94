"""Learning rate and AdamW settings of one step. Knows the SDK's schedules, nothing of the loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.utils.config import OptimConfig

if TYPE_CHECKING:
    from fireworks.training.sdk.types import AdamParams


def adam_params(optim: OptimConfig, step: int, total_steps: int) -> AdamParams:
    """AdamW for the step with this number, counted from 1, of `total_steps`."""
    from fireworks.training.sdk import compute_lr, parse_lr_scheduler_spec
    from fireworks.training.sdk.types import AdamParams

    # A decay ends one step behind the last, which would otherwise be taken with a learning rate of zero.
    decay_end = total_steps + 1
    schedule = parse_lr_scheduler_spec({"type": optim.lr_schedule, "warmup_steps": optim.warmup_steps})
    return AdamParams(
        learning_rate=compute_lr(schedule, step, optim.learning_rate, total_steps=decay_end),
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        grad_clip_norm=optim.grad_clip_norm,
        emit_grad_norm_metrics=True,
    )
