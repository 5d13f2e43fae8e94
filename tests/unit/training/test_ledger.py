"""What a run has created is on disk before it is created, and one run at a time uses a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from training.utils import ConfigError
from training.utils.ledger import Entry, Ledger

TRAINER, DEPLOYMENT = Entry("trainer", "trainer-1"), Entry("deployment", "d")


def test_a_killed_run_leaves_its_names(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from training.utils.ledger import Entry, Ledger\n"
        "ledger = Ledger(sys.argv[1])\n"
        "assert ledger.claim() == []\n"
        "ledger.add(Entry('trainer', 'trainer-1'))\n"
        "ledger.add(Entry('deployment', 'd'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=False, timeout=60)
    ledger = Ledger(tmp_path / "run")
    with ledger.path.open("a") as file:
        file.write('{"kind": "trai')
    assert ledger.claim() == [TRAINER, DEPLOYMENT]
    ledger.removed(TRAINER)
    ledger.release()
    assert ledger.claim() == [DEPLOYMENT]
    ledger.removed(DEPLOYMENT)
    ledger.release()
    assert ledger.path.read_text() == ""


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    first.claim()
    first.add(TRAINER)
    with pytest.raises(ConfigError, match=r"Config\.log_path = .* another run is using it"):
        second.claim()
    first.release()
    assert second.claim() == [TRAINER]
