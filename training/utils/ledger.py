"""`created.jsonl`: what a run has on the platform, so that the next one can remove what a killed one left behind.

Knows names, not what is behind them. Invariants: a name is on disk before the thing is created; one run at a time uses
a `log_path`, which the system watches, also when a run is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import NamedTuple, TextIO

from training.utils.errors import ConfigError


class Entry(NamedTuple):
    """One thing on the platform; `kind` is trainer or deployment."""

    kind: str
    ident: str


class Ledger:
    """The things of one `log_path`. `claim` before the first `add`."""

    def __init__(self, log_path: str | Path) -> None:
        self.path = Path(log_path).expanduser() / "created.jsonl"
        self._file: TextIO | None = None
        self._left: list[Entry] = []

    @property
    def is_claimed(self) -> bool:
        return self._file is not None

    def claim(self) -> list[Entry]:
        """Keep other runs out, and return what earlier ones left. Raises ConfigError when one is still at work."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            fix = "another run is using it: stop that one, or choose another"
            raise ConfigError("Config.log_path", str(self.path.parent), fix) from None
        self._file = file
        file.seek(0)
        # The last line of a killed run may be half written; nothing was created behind it.
        whole = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
        file.truncate(sum(len(line.encode()) for line in whole))
        said = [json.loads(line) for line in whole]
        removed = [row["removed"] for row in said if "removed" in row]
        self._left = [Entry(**row) for row in said if "removed" not in row and row["ident"] not in removed]
        return list(self._left)

    def add(self, entry: Entry) -> None:
        """Record something that is about to be created."""
        self._left.append(entry)
        self._write(entry._asdict())

    def removed(self, entry: Entry) -> None:
        """Record that something is not there any more."""
        self._left.remove(entry)
        self._write({"removed": entry.ident})

    def release(self) -> None:
        """Let other runs in. A file on which nothing is left becomes empty."""
        assert self._file is not None, "claim() comes first"
        if not self._left:
            self._file.truncate(0)
        self._file.close()
        self._file = None

    def _write(self, row: dict[str, str]) -> None:
        assert self._file is not None, "claim() comes first"
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
