"""What tests of several rooms share: one tiny model on disk, one whole server, and the tiers of proof."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import RunningServer, running

pytest_plugins = ["proofs"]


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-style model with its tokenizer; read it, never write to it."""
    from firebox.modeling.tiny import make_tiny

    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(directory)
    return directory


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for all tests that need a whole one, with the model `tiny`. Tests of its end start their own."""
    with running(tmp_path_factory.mktemp("server")) as up:
        yield up
