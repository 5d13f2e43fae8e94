"""Specs with a data directory of the test's own, and one served full-parameter trainer per module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from trainer_harness import serving, trainer_spec

from firebox.wire.worker import TrainerSpec


@pytest.fixture
def make_spec(tiny_dir: Path, tmp_path: Path) -> Callable[..., TrainerSpec]:
    return partial(trainer_spec, tiny_dir, tmp_path)


@pytest.fixture(scope="module")
def url(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(trainer_spec(tiny_dir, tmp_path_factory.mktemp("served"))) as base_url:
        yield base_url
