"""Servers to test against, and the smallest model they accept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from control_harness import Server  # type: ignore[import-not-found]

from firebox.launch.local import started_at


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest directory that passes inspection: two tensors, a config and a tokenizer file."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    directory.mkdir()
    header = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [24, 40]},
        "__metadata__": {"format": "pt"},
    }
    raw = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(40))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 512}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    made = []

    def make(machine: list[Any] | None = None) -> Server:
        server = Server(tmp_path / "data", machine)
        server.data.mkdir(exist_ok=True)
        server.start()
        made.append(server)
        return server

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_files: Path) -> Iterator[Server]:
    """One server for a module, with the model `tiny`."""
    running = Server(tmp_path_factory.mktemp("server") / "data")
    running.data.mkdir()
    running.start()
    assert running.add_model("tiny", model_files).status_code == 200
    yield running
    workers = running.workers()
    running.stop()
    assert not [pid for pid in workers if started_at(pid)], "SIGTERM left a worker behind"
    assert os.listdir(running.data / "run") == []
