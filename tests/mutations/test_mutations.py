"""Every day: each bug's place is still there. Under FIREBOX_PROVE=1: planted, the tests see every one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from bugs import BUGS, ROOT, caught, copy_sources, fails, planted
from proofs import FULL, Record


def test_every_bug_has_its_place():
    assert len({bug.name for bug in BUGS}) == 12
    for bug in BUGS:
        assert bug.wrong in planted(bug, (ROOT / bug.file).read_text())


@pytest.mark.prove
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not FULL, reason="takes minutes; runs under FIREBOX_PROVE=1 and as `make mutations`")
def test_the_tests_see_every_bug(tmp_path: Path, record: Record, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FIREBOX_PROVE")  # everyday counts see them, or nobody does before they are committed
    copy = copy_sources(tmp_path)
    assert not [tests for tests in dict.fromkeys(bug.tests for bug in BUGS) if fails(copy, tests)]
    missed = [bug.name for bug in BUGS if not caught(bug, copy)]
    record("caught", f"{len(BUGS) - len(missed)}/{len(BUGS)}")
    assert not missed
