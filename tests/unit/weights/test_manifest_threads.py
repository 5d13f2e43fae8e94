"""Manifests are read by many threads; the first to do so, all at once, must not bring the process down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from firebox.weights.manifest import SnapshotManifest, committed_dir, seal

READ_AT_ONCE = """
import sys, threading
from pathlib import Path
from firebox.weights.manifest import read_snapshot
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(16)
def read():
    barrier.wait()
    assert read_snapshot(Path(sys.argv[1])).identity == "one"
threads = [threading.Thread(target=read) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_first_reads_at_once(tmp_path: Path) -> None:
    with committed_dir(tmp_path / "one") as scratch:
        seal(scratch, SnapshotManifest(identity="one", kind="base", base_model="m", dtype="float32", step=1,
                                       created_at="2026-01-01T00:00:00Z", files=[]))  # fmt: skip
    for _ in range(6):
        subprocess.run([sys.executable, "-c", READ_AT_ONCE, str(tmp_path / "one")], check=True, timeout=60)
