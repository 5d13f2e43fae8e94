"""Plant each bug, run its tests, print a line per bug and the sum; a bug that nobody sees makes it fail."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bugs import BUGS, caught, copy_sources, fails

with tempfile.TemporaryDirectory() as folder:
    copy = copy_sources(Path(folder))
    for tests in dict.fromkeys(bug.tests for bug in BUGS):
        if fails(copy, tests):
            sys.exit(f"{tests} fails without any bug")
    found = 0
    for bug in BUGS:
        seen = caught(bug, copy)
        found += seen
        print(f"{'caught' if seen else 'MISSED':7} {bug.name:36} {bug.tests}", flush=True)
print(f"{found}/{len(BUGS)}")
sys.exit(found < len(BUGS))
