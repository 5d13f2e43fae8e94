"""The one attention function of trainer and sampler.

Owns how queries meet keys; does not know about caches, batching policy or gradients. Models run on packed tokens
of shape [1, T] without padding and without a mask: who may attend to whom is the business of an
`AttentionContext`, handed down through the model's keyword arguments.

Invariant: what this function cannot compute (sliding windows, soft-capped scores, attention sinks) is refused,
never left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from firebox.wire.errors import FailedPrecondition

ATTENTION_NAME: Final = "firebox"

_UNSUPPORTED: Final = ("sliding_window", "softcap", "s_aux")


class AttentionContext(Protocol):
    """Decides what every packed position of one forward pass attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Map query [T, H, D], key and value [T, Hk, D] of one layer to the attention output [T, H, D]."""
        ...


class PackedCausal:
    """Causal attention inside each of several sequences that lie end to end: `lengths` sum to T."""

    def __init__(self, lengths: Sequence[int]) -> None:
        # Equal neighbours share one batched kernel call: [(count, length), ...].
        self._runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        outputs, start = [], 0
        for count, length in self._runs:
            end = start + count * length
            q, k, v = (t[start:end].unflatten(0, (count, length)).transpose(1, 2) for t in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
            start = end
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    context: AttentionContext,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    for name in _UNSUPPORTED:
        if options.get(name) is not None:
            raise FailedPrecondition(
                f"{type(module).__name__} needs {name}, which is not supported; use a model without it",
                reason="UNSUPPORTED_ATTENTION",
            )
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    scale = scaling if scaling is not None else float(q.shape[-1]) ** -0.5
    return context.attend(module.layer_idx, q, k, v, scale).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, _attention)
