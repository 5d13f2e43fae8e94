"""Registering models, what is refused, and promotions that fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from control_harness import Server  # type: ignore[import-not-found]

from firebox.control.services.model_dir import inspect, stage
from firebox.weights.manifest import SnapshotManifest, committed_dir, seal
from firebox.wire.errors import InvalidArgument


def edit(file: str, **changes: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | changes))

    return apply


def remove(file: str) -> Callable[[Path], None]:
    return lambda directory: (directory / file).unlink()


def overwrite(file: str, content: bytes) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        (directory / file).write_bytes(content)

    return apply


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def header(**changes: Any) -> Callable[[Path], None]:
    """The first tensor's entry in the header, with other values."""

    def apply(directory: Path) -> None:
        raw = (directory / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        entries["a"] |= changes
        new = json.dumps(entries).encode()
        (directory / "model.safetensors").write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])

    return apply


def link(directory: Path) -> None:
    (directory / "secret.json").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove("config.json"), "config.json is missing"),
        (remove("tokenizer.json"), "tokenizer.json"),
        (remove("model.safetensors"), "weights are missing"),
        (edit("config.json", max_position_embeddings=None), "max_position_embeddings"),
        (edit("config.json", auto_map={"AutoModel": "evil.py"}), "auto_map"),
        (edit("tokenizer_config.json", auto_map={"AutoTokenizer": "evil.py"}), "tokenizer_config.json"),
        (edit("model.safetensors.index.json", weight_map={"c": "model-2.safetensors"}), "model-2.safetensors"),
        (overwrite("config.json", b"[1]"), "JSON object"),
        (overwrite("config.json", b"{"), "not valid JSON"),
        (overwrite("model.safetensors", b"\xff" * 64), "not a safetensors file"),
        (overwrite("model.safetensors", b""), "not a safetensors file"),
        (overwrite("model.safetensors", (9).to_bytes(8, "little") + b'{"a": {}}'), "damaged"),
        (cut, "cut short"),
        (edit("generation_config.json", inner={"auto_map": {}}), "generation_config.json"),
        (header(shape=[3, 3]), "do not fill"),
        (header(shape=[-2, -3]), "do not fill"),
        (header(dtype="F16"), "do not fill"),
        (header(dtype="PICKLE"), "damaged"),
        (header(data_offsets=[16, 40]), "do not fill"),
        (header(data_offsets=[0, "24"]), "damaged"),
        (link, "links"),
    ],
)
def test_bad_directory_is_refused_naming_the_file(
    model_files: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_files, directory)
    damage(directory)
    with pytest.raises(InvalidArgument, match=words):
        inspect(directory)


def test_facts_come_from_the_headers(model_files: Path) -> None:
    facts = inspect(model_files)
    assert (facts["parameter_count"], facts["context_length"], facts["moe"]) == (10, 512, False)


def test_staging_leaves_pickles_behind(model_files: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_files, source)
    (source / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "staging").mkdir()
    staged = tmp_path / "staging" / stage(source, tmp_path / "staging")
    assert sorted(p.name for p in staged.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_model_is_registered_shown_and_removed(server: Server, model_files: Path) -> None:
    made = server.add_model("second-0.5b", model_files).json()
    assert made["state"] == "READY"
    assert made["baseModelDetails"] == {
        "modelType": "qwen3", "parameterCount": "10", "moe": False, "supportsFireattention": False
    }  # fmt: skip
    assert server.ask("GET", "/v1/accounts/fireworks/models/second-0.5b").json()["name"] == made["name"]
    assert server.add_model("second-0.5b", model_files).status_code == 409
    assert server.add_model("../up", model_files).status_code == 400
    assert list((server.data / "staging").iterdir()) == []
    assert server.own("DELETE", "models/second-0.5b").json() == {}
    missing = server.own("GET", "models/second-0.5b")
    assert missing.status_code == 404
    assert "known models: tiny" in missing.json()["error"]["message"]
    assert not (server.data / "models" / "local" / "second-0.5b").exists()


@pytest.mark.parametrize("folder", ["../models/local/tiny", "/etc", "", "0" * 31])
def test_only_staged_folders_are_taken(server: Server, folder: str) -> None:
    answer = server.own("POST", "models", json={"modelId": "thief", "stagedDir": folder})
    assert answer.status_code == 400
    assert (server.data / "models" / "local" / "tiny" / "config.json").exists()


def test_model_in_use_is_kept(server: Server) -> None:
    server.create_job("user")
    refused = server.own("DELETE", "models/tiny")
    assert refused.status_code == 400
    assert "rlorTrainerJobs/user" in refused.json()["error"]["message"]
    server.own("DELETE", "rlorTrainerJobs/user")


def promote(server: Server, checkpoint: str, output: str = "out", **changes: str) -> Any:
    body = {
        "output_model": f"accounts/local/models/{output}",
        "trainer_job_id": "accounts/local/rlorTrainerJobs/exporter",
        "base_model": "accounts/local/models/tiny",
        "async_promotion": True,
        **changes,
    }
    return server.own("POST", f"checkpoints/{checkpoint}:promote", json=body)


@pytest.fixture(scope="module")
def exporter(server: Server) -> None:
    server.create_job("exporter")
    for identity, kind in (("whole", "base"), ("part", "delta")):
        with committed_dir(server.data / "jobs" / "local" / "exporter" / "snapshots" / identity) as scratch:
            manifest = SnapshotManifest(
                identity=identity, kind=kind, base_model="accounts/local/models/tiny", dtype="float32", step=1,
                created_at="2026-01-01T00:00:00Z", files=[], parent="whole" if kind == "delta" else None,
            )  # fmt: skip
            seal(scratch, manifest)


@pytest.mark.usefixtures("exporter")
@pytest.mark.parametrize(
    ("checkpoint", "changes", "code", "words"),
    [
        ("nope", {}, 404, "whole"),
        ("part", {}, 400, "checkpoint_type='base'"),
        ("whole", {"output": "tiny"}, 409, "already"),
        ("whole", {"output": "Bad_Name"}, 400, "output_model"),
        ("whole", {"base_model": "accounts/local/models/other"}, 400, "base_model"),
        ("whole", {"trainer_job_id": "accounts/local/rlorTrainerJobs/unknown"}, 404, "unknown"),
        ("whole", {}, 400, "refused"),  # the snapshot holds no weights: the export child finds out
    ],
)
def test_promotion_that_cannot_be_is_explained(
    server: Server, checkpoint: str, changes: dict[str, str], code: int, words: str
) -> None:
    answer = promote(server, checkpoint, **changes)
    assert answer.status_code == code, answer.text
    assert words in answer.json()["error"]["message"]
    assert server.own("GET", "models/out").status_code == 404
    assert list((server.data / "staging").iterdir()) == []
