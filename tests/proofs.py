"""The two tiers of proof: everyday counts, and the full counts of `make prove` with their figures.

A test marked `prove` belongs to the proofs: it runs every day at `count(small, full)`'s small number, and under
FIREBOX_PROVE=1 at the full one. `record` keeps its figures, which then go to `docs/proofs/` with commit, date, machine.
A proof that passed on the same code is not repeated, so a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROOFS = ROOT / "docs" / "proofs"
FULL = os.environ.get("FIREBOX_PROVE") == "1"

Record = Callable[[str, Any], None]


def count(small: int, full: int) -> int:
    """How often a test does what it does: `full` under `make prove`, else `small`."""
    return full if FULL else small


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """`record(name, value)` keeps a figure of this test; every day it is only shown when the test fails."""
    figures: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        figures[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        print(f"{name}: {figures[name]}")

    request.node.stash[_FIGURES] = figures
    return keep


_FIGURES = pytest.StashKey[dict[str, Any]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not FULL or (code := _code()) is None:
        return
    for item in items:
        done = _read(_page(item)).get(item.name)
        if done and done["code"] == code:
            item.add_marker(pytest.mark.skip(reason=f"proven at {code}, see {_page(item).relative_to(ROOT)}"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if not (FULL and report.when == "call" and report.passed and item.get_closest_marker("prove")):
        return
    page = _page(item)
    proven = _read(page)
    proven[item.name] = {
        "code": _code() or "uncommitted changes",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": _machine(),
        "seconds": round(report.duration, 1),
        "figures": item.stash.get(_FIGURES, {}),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps(dict(sorted(proven.items())), indent=1) + "\n")


def _page(item: pytest.Item) -> Path:
    return PROOFS / f"{item.path.stem.removeprefix('test_')}.json"


def _read(page: Path) -> dict[str, Any]:
    return json.loads(page.read_text()) if page.exists() else {}


def _code() -> str | None:
    """The commit that last changed anything but the proofs themselves; None when there are changes on top of it."""
    outside = ["--", ".", ":!docs/proofs"]
    if _git("status", "--porcelain", *outside):
        return None
    return _git("log", "-1", "--format=%h", *outside)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _machine() -> str:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    about = [names[0] if names else platform.machine(), f"{cores} cores", f"{memory_gib:.0f} GiB"]
    return ", ".join([*about, f"Python {platform.python_version()}", f"torch {torch.__version__}"])
