"""Reading a Hugging Face directory without torch: is it complete and harmless, and what is in it.

Opens JSON files and safetensors headers, never a tensor and never code. Every refusal names the file and the fix.
"""

from __future__ import annotations

import json
import math
import shutil
import uuid
from pathlib import Path
from typing import Any, Final, NamedTuple

from firebox.wire.errors import InvalidArgument

_MAX_HEADER_BYTES: Final = 100_000_000
_NOT_NEEDED: Final = (
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.pkl",
    "*.msgpack",
    "*.h5",
    "*.onnx",
    "*.gguf",
    "*.py",
    ".git*",
)


_DTYPE_BYTES: Final = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape) if all(isinstance(n, int) and n >= 0 for n in self.shape) else -1


def stage(source: Path, staging: Path) -> str:
    """Copy the useful files of `source` into a fresh folder of `staging` and return the folder's name."""
    if not source.is_dir():
        raise InvalidArgument(f"{source} is not a directory; give a Hugging Face model directory")
    name = uuid.uuid4().hex
    shutil.copytree(source, staging / name, ignore=shutil.ignore_patterns(*_NOT_NEEDED))
    return name


def inspect(directory: Path) -> dict[str, Any]:
    """The facts of a full model: model_type, parameter_count, moe, context_length, kind.

    Raises InvalidArgument when a file is missing, damaged, a link, or asks for remote code.
    """
    links = [path for path in directory.rglob("*") if path.is_symlink()]
    if links:
        raise InvalidArgument(f"{links[0].name}: links are not accepted; copy the files themselves")
    config = _json(directory / "config.json")
    for path in sorted(directory.rglob("*config*.json")):
        if _has_key(_json(path), "auto_map"):
            raise InvalidArgument(f"{path.name}: auto_map asks for remote code, which is never run; use a plain model")
    if not (directory / "tokenizer.json").exists():
        raise InvalidArgument("tokenizer.json is missing; save the model's fast tokenizer beside it")
    text = config.get("text_config") or config
    context = text.get("max_position_embeddings")
    if not isinstance(context, int) or not isinstance(config.get("model_type"), str):
        raise InvalidArgument("config.json: model_type and max_position_embeddings are needed")
    experts = max((v for k in ("num_experts", "num_local_experts") if isinstance(v := text.get(k), int)), default=0)
    return {
        "kind": "HF_BASE_MODEL",
        "model_type": config["model_type"],
        "parameter_count": count_parameters(directory),
        "moe": experts > 1,
        "context_length": context,
    }


def count_parameters(directory: Path) -> int:
    """Elements of every tensor in the directory's safetensors files, from their headers."""
    index = directory / "model.safetensors.index.json"
    files = sorted(directory.glob("*.safetensors"))
    wanted = {directory / name for name in _json(index).get("weight_map", {}).values()} if index.exists() else set()
    missing = sorted(path.name for path in wanted - set(files))
    if missing or not files:
        raise InvalidArgument(f"{', '.join(missing) or 'model.safetensors'}: weights are missing; save as safetensors")
    return sum(_elements(path) for path in files)


def _elements(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise InvalidArgument(f"{path.name}: not a safetensors file (its header would take {length} bytes)")
        header = _decode(file.read(length), path.name)
    header.pop("__metadata__", None)
    try:
        tensors = [_Tensor(t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for t in header.values()]
        damaged = any(t.end - t.begin != t.num_elements * _DTYPE_BYTES[t.dtype] for t in tensors)
    except (KeyError, TypeError) as error:
        raise InvalidArgument(f"{path.name}: the safetensors header is damaged ({error!r})") from error
    # Readers map the file and trust the header: what it says must lie in the file, piece by piece.
    end = 0
    for tensor in sorted(tensors, key=lambda t: (t.begin, t.end)):
        damaged, end = damaged or tensor.begin != end, tensor.end
    if damaged or end != size - 8 - length:
        raise InvalidArgument(
            f"{path.name}: its tensors do not fill the file; it was cut short or damaged, copy it again"
        )
    return sum(tensor.num_elements for tensor in tensors)


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_has_key(inner, key) for inner in value)


def _json(path: Path) -> dict[str, Any]:
    try:
        return _decode(path.read_bytes(), path.name)
    except FileNotFoundError:
        raise InvalidArgument(f"{path.name} is missing; give a Hugging Face model directory") from None


def _decode(raw: bytes, name: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise InvalidArgument(f"{name}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name}: a JSON object is needed")
    return value
