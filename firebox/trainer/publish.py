"""Publish the current weights as a snapshot that a sampler, or an export, can take over.

Owns which tensors go into a snapshot, its kind and its probe. Does not know file formats (`weights.snapshot`) or who
will load it.

Invariant: every snapshot carries log-probs of fixed tokens under exactly its weights, so whoever loads it can prove
that it computes the same model.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from firebox.modeling.causal_lm import CausalLM
from firebox.trainer.lora import Adapter
from firebox.weights.manifest import Probe, SnapshotManifest
from firebox.weights.snapshot import write_snapshot
from firebox.wire.errors import FailedPrecondition, InvalidArgument
from firebox.wire.worker import SnapshotKind

_PROBE_TOKENS: Final = 16
_PROBE_STRIDE: Final = 7919


def snapshot_kind(checkpoint_type: str, *, is_lora: bool, parent: str | None) -> SnapshotKind:
    """What `checkpoint_type` means for this model.

    Raises InvalidArgument for a type that is unknown or not supported, FailedPrecondition for a delta without a base.
    """
    if checkpoint_type == "merged_base":
        raise InvalidArgument(
            "checkpoint_type: 'merged_base' is not supported; save the adapter with 'base' and promote that"
        )
    if checkpoint_type not in ("base", "delta"):
        raise InvalidArgument(f"checkpoint_type: {checkpoint_type!r} is not known; use 'base' or 'delta'")
    if is_lora:
        return "adapter"
    if checkpoint_type == "delta" and parent is None:
        raise FailedPrecondition(
            "checkpoint_type: a 'delta' needs a snapshot saved before it by this model; save a 'base' first",
            reason="DELTA_WITHOUT_BASE",
        )
    return "base" if checkpoint_type == "base" else "delta"


def publish(
    target: Path, lm: CausalLM, adapter: Adapter | None, *, kind: SnapshotKind, parent: str | None, base_model: str,
    step: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Commit the weights of `lm`, or `adapter` alone, as the snapshot `target.name`.

    A delta holds full weights and names its parent. The adapter must be active, so that the probe sees it. Raises
    AlreadyExists when the identity is taken.
    """
    manifest = SnapshotManifest(
        identity=target.name,
        kind=kind,
        parent=parent if kind == "delta" else None,
        base_model=base_model,
        dtype=str(dtype).removeprefix("torch."),
        step=step,
        created_at=datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        files=[],
        probe=_probe(lm),
        adapter=adapter.info if adapter else None,
    )
    tensors = dict(adapter.parameters) if adapter else weights_of(lm)
    write_snapshot(target, {name: tensor.to(dtype) for name, tensor in tensors.items()}, manifest)


def weights_of(lm: CausalLM) -> dict[str, Tensor]:
    """The model's parameters and persistent buffers under their Hugging Face names, tied ones once."""
    model = lm.model
    first_names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in first_names}


@torch.no_grad()
def _probe(lm: CausalLM) -> Probe:
    tokens = torch.arange(_PROBE_TOKENS, device=lm.device) * _PROBE_STRIDE % lm.vocab_size
    return Probe(tokens=tokens.tolist(), logprobs=lm.score(tokens).tolist())
