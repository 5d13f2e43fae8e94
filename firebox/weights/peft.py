"""Read a PEFT directory as what it is here: plain low-rank updates of linear layers, W + scale * B A.

Owns which of PEFT's settings are understood. Does not know the model that the layers belong to, nor who asked.

Invariant: a directory is read completely or refused; a setting that would change the arithmetic is never passed over.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from firebox.weights.snapshot import ADAPTER_CONFIG_FILE, ADAPTER_FILE, PEFT_PREFIX
from firebox.wire.errors import FailedPrecondition

_LORA_A: Final = ".lora_A.weight"
_LORA_B: Final = ".lora_B.weight"
# What plain low-rank updates cannot express, with the values that ask for nothing.
_NEUTRAL: Final[dict[str, Any]] = {
    "peft_type": "LORA",
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


class Factors(NamedTuple):
    """Of one layer: `down` is A [r, in], `up` is B [out, r]."""

    down: Tensor
    up: Tensor


class PeftAdapter(NamedTuple):
    """`factors` by layer name; `base_model` is what the directory says it belongs to, if anything."""

    rank: int
    scale: float
    base_model: str | None
    factors: dict[str, Factors]


def read_peft(directory: Path) -> PeftAdapter:
    """Read `directory` on the CPU; raises FailedPrecondition naming the file, or the setting, that does not do."""
    config = _config(directory)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise _refused(f"r={rank!r} and lora_alpha={alpha!r} must be a rank from 1 on and a number")
    return PeftAdapter(
        rank=rank,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        base_model=config.get("base_model_name_or_path"),
        factors=_factors(directory, rank),
    )


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / ADAPTER_CONFIG_FILE).read_bytes())
    except OSError as error:
        raise _refused(f"{error.strerror} in {directory.name!r}, so that is no PEFT directory") from None
    except (ValueError, RecursionError) as error:
        raise _refused(f"not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise _refused("a JSON object is needed")
    for name, neutral in _NEUTRAL.items():
        if config.get(name, neutral) not in (neutral, None):
            raise _refused(f"{name}={config[name]!r} is not supported, only {neutral!r}")
    return config


def _factors(directory: Path, rank: int) -> dict[str, Factors]:
    try:
        tensors = {k.removeprefix(PEFT_PREFIX): t for k, t in load_file(directory / ADAPTER_FILE).items()}
    except (OSError, SafetensorError) as error:
        raise FailedPrecondition(f"{ADAPTER_FILE}: cannot be read: {error}", reason="ADAPTER_REFUSED") from error
    layers = {name.removesuffix(_LORA_A).removesuffix(_LORA_B) for name in tensors}
    factors = {}
    for layer in sorted(layers):
        down, up = tensors.get(layer + _LORA_A), tensors.get(layer + _LORA_B)
        if down is None or up is None:
            raise FailedPrecondition(
                f"{ADAPTER_FILE}: {layer}{_LORA_A} and {layer}{_LORA_B} are not both there; only updates of linear "
                "layers are known",
                reason="WEIGHTS_MISMATCH",
            )
        if down.dim() != 2 or up.dim() != 2 or len(down) != rank or up.shape[1] != rank:
            shapes = f"{list(up.shape)} x {list(down.shape)}"
            raise FailedPrecondition(
                f"{ADAPTER_FILE}: {layer}: factors {shapes} are not of rank {rank}", reason="WEIGHTS_MISMATCH"
            )
        factors[layer] = Factors(down, up)
    if not factors:
        raise FailedPrecondition(f"{ADAPTER_FILE}: there is nothing in it", reason="ADAPTER_REFUSED")
    return factors


def _refused(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"{ADAPTER_CONFIG_FILE}: {what}", reason="ADAPTER_REFUSED")
