"""A frozen reference that needs no trainer of its own. Knows no algorithm.

Invariant: its weights are those of the base model, whatever the run's adapter has learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.utils.client import ReconnectableClient, to_datums


class FrozenBase:
    """The base model of a LoRA run, asked in the session of the run's own trainer."""

    def __init__(self, client: ReconnectableClient, base_model: str) -> None:
        self._timeout = client.default_timeout
        self._inner = client.inner.create_base_training_client(base_model)

    def forward(self, data: Sequence[Any], loss_fn: str = "cross_entropy") -> Any:
        """Loss and `logprobs` per datum under the base model."""
        return self._inner.forward(to_datums(data), loss_fn).result(timeout=self._timeout)
