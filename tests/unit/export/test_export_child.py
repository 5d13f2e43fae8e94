"""Snapshots of a real trainer, exported by the real child process and loaded by the public libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from trainer_harness import Driver, datum, trainer_spec
from transformers import AutoModelForCausalLM, AutoTokenizer

from firebox.weights.manifest import read_snapshot
from firebox.wire.training import AdamParams, Forward, OptimStep, SaveForSampler
from firebox.wire.worker import ExportReport, ExportRequest


def train(model_dir: Path, root: Path, rank: int, dtype: str = "float32") -> Path:
    """Two steps, then snapshots `one` (base or adapter) and `two` (its delta); returns their directory."""
    trainer = Driver(trainer_spec(model_dir, root, max_context_length=64, lora_rank=rank, dtype=dtype), rank)
    for name, kind in (("one", "base"), ("two", "delta")):
        trainer.do(Forward(data=[datum(range(21))], loss_fn="cross_entropy", backward=True))
        trainer.do(OptimStep(adam_params=AdamParams(learning_rate=1e-2)))
        trainer.do(SaveForSampler(name=name, checkpoint_type=kind))
    return root / "jobs" / "job" / "snapshots"


def export(chain: list[Path], model_dir: Path, out_dir: Path) -> ExportReport:
    request = ExportRequest(chain=[str(link) for link in chain], model_dir=str(model_dir), out_dir=str(out_dir))
    code = "from firebox.export.child import main; raise SystemExit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], input=msgspec.json.encode(request), capture_output=True, timeout=120, check=False
    )
    report = msgspec.json.decode(done.stdout, type=ExportReport)
    assert (done.returncode == 0) == report.ok
    return report


def test_a_full_snapshot_becomes_a_model_directory(tiny_dir: Path, tmp_path: Path):
    snapshots = train(tiny_dir, tmp_path, rank=0)
    report = export([snapshots / "one", snapshots / "two"], tiny_dir, tmp_path / "out")
    assert report.ok, report.error
    assert report.kind == "HF_BASE_MODEL"
    assert report.max_abs_diff <= 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.parameter_count == model.num_parameters()
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    manifest = read_snapshot(snapshots / "two")
    assert manifest is not None
    assert (manifest.kind, manifest.parent, manifest.step) == ("delta", "one", 2)


def test_an_adapter_becomes_a_peft_directory(tiny_dir: Path, tmp_path: Path):
    snapshots = train(tiny_dir, tmp_path, rank=4)
    report = export([snapshots / "two"], tiny_dir, tmp_path / "out")
    assert report.ok, report.error
    assert (report.kind, report.lora_rank) == ("HF_PEFT_ADDON", 4)
    assert {"q_proj", "down_proj", "lm_head"} <= set(report.target_modules)
    assert report.max_abs_diff <= 1e-5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_bfloat16_is_kept(tiny_dir: Path, tmp_path: Path):
    snapshots = train(tiny_dir, tmp_path, rank=0, dtype="bfloat16")
    report = export([snapshots / "one"], tiny_dir, tmp_path / "out")
    assert report.ok, report.error
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_flipped_byte_is_found_and_nothing_is_left(tiny_dir: Path, tmp_path: Path, file: str):
    snapshots = train(tiny_dir, tmp_path, rank=0)
    path = snapshots / "one" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)
    report = export([snapshots / "one"], tiny_dir, tmp_path / "out")
    assert not report.ok
    assert file in report.error
    assert not (tmp_path / "out").exists()


def test_impossible_requests_are_told(tiny_dir: Path, tmp_path: Path):
    assert "no snapshot" in export([], tiny_dir, tmp_path / "out").error
    assert "no committed snapshot" in export([tmp_path / "none"], tiny_dir, tmp_path / "out").error
