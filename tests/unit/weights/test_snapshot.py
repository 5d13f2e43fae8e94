"""The snapshot format, without a model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

from firebox.weights.manifest import AdapterInfo, SnapshotManifest, read_snapshot, sweep_scratch
from firebox.weights.snapshot import read_tensors, write_snapshot
from firebox.wire.errors import AlreadyExists, FailedPrecondition


def manifest(adapter: AdapterInfo | None = None) -> SnapshotManifest:
    return SnapshotManifest(
        identity="one",
        kind="adapter" if adapter else "base",
        base_model="accounts/local/models/tiny",
        dtype="float32",
        step=3,
        created_at="2026-01-01T00:00:00Z",
        files=[],
        adapter=adapter,
    )


TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(3).expand(2, 3)}


def test_what_is_written_is_read(tmp_path: Path):
    written = write_snapshot(tmp_path / "one", TENSORS, manifest())
    assert read_snapshot(tmp_path / "one") == written
    tensors = read_tensors(tmp_path / "one", written)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


def test_a_snapshot_never_changes(tmp_path: Path):
    write_snapshot(tmp_path / "one", TENSORS, manifest())
    with pytest.raises(AlreadyExists, match="one"):
        write_snapshot(tmp_path / "one", TENSORS, manifest())


def test_damage_is_named(tmp_path: Path):
    written = write_snapshot(tmp_path / "one", TENSORS, manifest())
    (tmp_path / "one" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(FailedPrecondition, match=r"model\.safetensors"):
        read_tensors(tmp_path / "one", written)


def test_an_adapter_has_the_layout_of_peft(tmp_path: Path):
    info = AdapterInfo(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj"])
    written = write_snapshot(tmp_path / "one", TENSORS, manifest(info))
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "one"))
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8.0, {"q_proj", "v_proj"})
    assert read_tensors(tmp_path / "one", written).keys() == TENSORS.keys()


def test_leftovers_of_a_killed_writer_are_swept(tmp_path: Path):
    write_snapshot(tmp_path / "one", TENSORS, manifest())
    (tmp_path / ".two.1234").mkdir()
    (tmp_path / ".two.1234" / "model.safetensors").write_bytes(b"half")
    sweep_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
