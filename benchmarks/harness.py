"""Two ways of doing one thing, timed in turns in one process, and how the result is kept.

Knows no model. Invariant: a figure is a ratio of medians over interleaved pairs, so that whatever else the machine does
hits both sides alike.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Comparison:
    """Seconds of both sides, pair by pair. `ratio` above 1 means that ours is the faster one."""

    what: str
    peer: str
    ours_s: list[float]
    peer_s: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.peer_s) / statistics.median(self.ours_s)

    def __str__(self) -> str:
        ours, peer = statistics.median(self.ours_s), statistics.median(self.peer_s)
        return f"{self.what:<58} {ours * 1e3:9.1f} ms {peer * 1e3:9.1f} ms {self.ratio:6.2f}x   against {self.peer}"


def interleave(
    what: str, peer: str, ours: Callable[[], object], theirs: Callable[[], object], pairs: int
) -> Comparison:
    """Time `ours` and `theirs` in turns, after one round of each that does not count."""
    ours(), theirs()
    ours_s, peer_s = [], []
    for number in range(pairs):
        # Who goes first changes, so that neither profits from the other's warm caches.
        for side, times in [(ours, ours_s), (theirs, peer_s)][:: 1 if number % 2 else -1]:
            started = time.perf_counter()
            side()
            times.append(time.perf_counter() - started)
    return Comparison(what, peer, ours_s, peer_s)


def keep(name: str, comparisons: list[Comparison]) -> Path:
    """Write the figures with commit, date and machine to `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    about = {
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    rows = [asdict(comparison) | {"ratio": round(comparison.ratio, 3)} for comparison in comparisons]
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"about": about, "comparisons": rows}, indent=1) + "\n")
    return path


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
