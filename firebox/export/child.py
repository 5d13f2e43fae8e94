"""Turn a snapshot into a directory that plain `transformers`, or `peft`, loads, and prove that it does.

Runs as a process of its own: one ExportRequest as JSON on stdin, one ExportReport as JSON on stdout, everything else
on stderr. Owns the layout of the result. Does not know trainers, samplers or the models' registry.

Invariant: `ok` means that the directory was loaded again by the public libraries and gave the trainer's own log-probs.
Whatever goes wrong leaves no directory behind.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Final

import msgspec
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from firebox.weights.manifest import PROBE_TOLERANCE, Probe, SnapshotManifest, read_snapshot, verify
from firebox.weights.snapshot import ADAPTER_CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE, read_tensors
from firebox.wire.errors import FailedPrecondition, FireboxError
from firebox.wire.worker import ExportReport, ExportRequest

_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def main() -> int:
    """Answer the request on stdin; the exit status is 0 when the export is good."""
    # Libraries print: only the report may reach stdout, even from native code.
    with os.fdopen(os.dup(1), "wb") as answer:
        os.dup2(2, 1)
        report = _answer(sys.stdin.buffer.read())
        answer.write(msgspec.json.encode(report) + b"\n")
    return 0 if report.ok else 1


def export(request: ExportRequest) -> ExportReport:
    """Write, reload and compare.

    Raises FailedPrecondition when the snapshot is missing, damaged or incomplete, when the model cannot be loaded
    again, or when it gives other log-probs than the trainer did.
    """
    directory, manifest = _source(request)
    out_dir = Path(request.out_dir)
    if out_dir.exists():
        raise FailedPrecondition(f"out_dir: {out_dir} exists already; name a new directory")
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, out_dir, ignore_errors=True)
        out_dir.mkdir(parents=True)
        if manifest.adapter is None:
            _write_full(directory, manifest, Path(request.model_dir), out_dir)
        else:
            _write_adapter(directory, out_dir)
        report = _compare(manifest, Path(request.model_dir), out_dir)
        undo.pop_all()
    return report


def _answer(raw: bytes) -> ExportReport:
    try:
        return export(msgspec.json.decode(raw, type=ExportRequest))
    except FireboxError as error:
        return ExportReport(ok=False, error=error.message)
    except Exception as error:  # noqa: BLE001  the boundary of this process: the caller reads a report, not a traceback
        return ExportReport(ok=False, error=f"{type(error).__name__}: {error}")


def _source(request: ExportRequest) -> tuple[Path, SnapshotManifest]:
    """The last snapshot of the chain; a delta holds full weights, so that one suffices. All of them are verified."""
    if not request.chain:
        raise FailedPrecondition("chain: there is no snapshot to export")
    links = [_link(Path(directory)) for directory in request.chain]
    for (_, parent), (_, child) in itertools.pairwise(links):
        if child.parent != parent.identity:
            raise FailedPrecondition(f"chain: the parent of {child.identity} is {child.parent}, not {parent.identity}")
    return links[-1]


def _link(directory: Path) -> tuple[Path, SnapshotManifest]:
    manifest = read_snapshot(directory)
    if manifest is None:
        raise FailedPrecondition(f"chain: there is no committed snapshot in {directory}")
    verify(directory, manifest)
    return directory, manifest


def _write_full(directory: Path, manifest: SnapshotManifest, model_dir: Path, out_dir: Path) -> None:
    """Config, tokenizer, chat template and generation settings of the base model, with the snapshot's weights."""
    for file in model_dir.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copy2(file, out_dir / file.name)
    save_file(read_tensors(directory, manifest), out_dir / WEIGHTS_FILE, metadata={"format": "pt"})
    config = json.loads((out_dir / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = manifest.dtype
    if manifest.untied_head:
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = False
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_adapter(directory: Path, out_dir: Path) -> None:
    for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
        shutil.copy2(directory / name, out_dir / name)


def _compare(manifest: SnapshotManifest, model_dir: Path, out_dir: Path) -> ExportReport:
    model = _reload(manifest, model_dir, out_dir)
    if manifest.probe is None:
        raise FailedPrecondition(f"{manifest.identity}: the manifest has no probe to compare with")
    difference = _difference(model, manifest.probe)
    if not difference <= PROBE_TOLERANCE[manifest.dtype]:
        raise FailedPrecondition(
            f"{manifest.identity}: the exported model differs from the trainer by {difference:.3g} nats",
            reason="EXPORT_MISMATCH",
        )
    adapter = manifest.adapter
    if adapter is None:
        return ExportReport(
            ok=True, max_abs_diff=difference, parameter_count=sum(p.numel() for p in model.parameters())
        )
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return ExportReport(
        ok=True,
        kind="HF_PEFT_ADDON",
        max_abs_diff=difference,
        parameter_count=trained,
        lora_rank=adapter.rank,
        target_modules=adapter.target_modules,
    )


def _reload(manifest: SnapshotManifest, model_dir: Path, out_dir: Path) -> nn.Module:
    """Load the result as a user would. The dtype is fixed, so that the arithmetic is that of the trainer's probe."""
    base_dir = out_dir if manifest.adapter is None else model_dir
    model, info = AutoModelForCausalLM.from_pretrained(
        base_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if missing:
        raise FailedPrecondition(f"{manifest.identity}: weights do not fit the model: {', '.join(missing[:5])}")
    if manifest.adapter is None:
        return model
    from peft import PeftModel  # takes seconds to import, and a full snapshot needs none of it

    return PeftModel.from_pretrained(model, str(out_dir), local_files_only=True)


@torch.inference_mode()
def _difference(model: nn.Module, probe: Probe) -> float:
    tokens = torch.tensor(probe.tokens)
    logprobs = model.eval()(input_ids=tokens[None]).logits[0, :-1].float().log_softmax(-1)
    computed = logprobs.gather(-1, tokens[1:, None]).squeeze(-1)
    return float((computed - torch.tensor(probe.logprobs)).abs().max())


if __name__ == "__main__":
    raise SystemExit(main())
