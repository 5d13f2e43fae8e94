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
from firebox.wire.training import SaveForSampler
from firebox.wire.worker import SnapshotKind

_PROBE_TOKENS: Final = 16
_PROBE_STRIDE: Final = 7919


_PRECISIONS: Final = {"bf16": torch.bfloat16}


def snapshot_kind(checkpoint_type: str, adapter: Adapter | None, parent: str | None) -> SnapshotKind:
    """What `checkpoint_type` means for a model with that adapter, or without one.

    Raises InvalidArgument for an unknown type, FailedPrecondition for a delta without a base, or for an adapter to
    merge that is none.
    """
    if checkpoint_type not in ("base", "delta", "merged_base"):
        raise InvalidArgument(
            f"checkpoint_type: {checkpoint_type!r} is not known; use 'base', 'delta' or 'merged_base'"
        )
    if checkpoint_type == "merged_base":
        if adapter is None:
            raise InvalidArgument("checkpoint_type: 'merged_base' is for LoRA models; here 'base' has all weights")
        if adapter.changes_nothing:
            raise FailedPrecondition(
                "checkpoint_type: there is nothing to merge, as the adapter is fresh; train it, or load_adapter first",
                reason="ADAPTER_EMPTY",
            )
        return "base"
    if adapter is not None:
        return "adapter"
    if checkpoint_type == "delta" and parent is None:
        raise FailedPrecondition(
            "checkpoint_type: a 'delta' needs a snapshot saved before it by this model; save a 'base' first",
            reason="DELTA_WITHOUT_BASE",
        )
    return "base" if checkpoint_type == "base" else "delta"


def snapshot_dtype(save: SaveForSampler, own: torch.dtype) -> torch.dtype:
    """The dtype of the tensors in a snapshot, `own` unless a merged model is wanted in another precision."""
    precision = save.export_precision
    if precision is not None and save.checkpoint_type != "merged_base":
        raise InvalidArgument("export_precision: it is for checkpoint_type 'merged_base' only; leave it out")
    if precision in (None, "source"):
        return own
    if precision not in _PRECISIONS:
        raise InvalidArgument(f"export_precision: {precision!r} is not supported; use 'source' or 'bf16'")
    return _PRECISIONS[precision]


def publish(
    target: Path, lm: CausalLM, adapter: Adapter | None, *, kind: SnapshotKind, parent: str | None, base_model: str,
    step: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Commit the weights of `lm`, or its `adapter`, as the snapshot `target.name`.

    An adapter goes alone, or is merged into the weights when `kind` is not 'adapter'. A delta holds full weights and
    names its parent. The adapter must be active, so that the probe sees it. Raises AlreadyExists when the identity is
    taken.
    """
    alone = adapter if kind == "adapter" else None
    own = weights_of(lm)
    merged = adapter.merged() if adapter and not alone else {}
    tensors = dict(alone.parameters) if alone else own | merged
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
        adapter=alone.info if alone else None,
        # What a merge adds is the head, where the model shares its weights with the embedding.
        untied_head=not merged.keys() <= own.keys(),
    )
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
