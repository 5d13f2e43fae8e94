"""Write and read snapshots: weights under their Hugging Face names, with a manifest that commits them.

Owns the file names inside a snapshot. Does not know who made the tensors or who will serve them.

Invariant: what is read here was checked against the manifest's sha256 first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

from firebox.weights.manifest import AdapterInfo, SnapshotManifest, committed_dir, describe, seal, verify

WEIGHTS_FILE: Final = "model.safetensors"
ADAPTER_FILE: Final = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"

PEFT_PREFIX: Final = "base_model.model."


def write_snapshot(target: Path, tensors: Mapping[str, Tensor], manifest: SnapshotManifest) -> SnapshotManifest:
    """Commit `tensors` to the new directory `target` and return the manifest with its files filled in.

    Names are those of the Hugging Face module; an adapter becomes a PEFT directory. Raises AlreadyExists when
    `target` is there.
    """
    with committed_dir(target) as scratch:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        if manifest.adapter is None:
            save_file(contiguous, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        else:
            peft_names = {PEFT_PREFIX + name: tensor for name, tensor in contiguous.items()}
            save_file(peft_names, scratch / ADAPTER_FILE, metadata={"format": "pt"})
            (scratch / ADAPTER_CONFIG_FILE).write_text(_peft_config(manifest.adapter, manifest.base_model))
        manifest = msgspec.structs.replace(manifest, files=describe(scratch))
        seal(scratch, manifest)
    return manifest


def read_tensors(directory: Path, manifest: SnapshotManifest) -> dict[str, Tensor]:
    """The tensors of a snapshot, on the CPU, as `write_snapshot` got them; raises FailedPrecondition when damaged."""
    verify(directory, manifest)
    if manifest.adapter is None:
        return dict(load_file(directory / WEIGHTS_FILE))
    return {name.removeprefix(PEFT_PREFIX): t for name, t in load_file(directory / ADAPTER_FILE).items()}


def _peft_config(adapter: AdapterInfo, base_model: str) -> str:
    return json.dumps(
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": adapter.target_modules,
        },
        indent=1,
    )
