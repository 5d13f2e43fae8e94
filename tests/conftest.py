"""What tests of several rooms share: one tiny model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-style model with its tokenizer; read it, never write to it."""
    from firebox.modeling.tiny import make_tiny

    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny(directory)
    return directory
