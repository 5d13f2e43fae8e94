"""The lease that ties workers to their server: one file lock, released by the kernel however the server ends.

The server holds the file exclusively for its life, which also makes it the only server of its data directory. A
worker waits for a shared lock in a thread; getting it means that the server is gone. No traffic, no heartbeat, no
false alarm while either side is busy. Knows nothing of what either side does.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from firebox.wire.errors import FailedPrecondition

_RETRY_S: Final = 0.1
_TAKE_FOR_S: Final = 2.0
ORPHAN_EXIT_CODE: Final = 75


class ServerLock:
    """The exclusive lock on `path`, held from construction to `release`.

    Raises FailedPrecondition when another server holds it. Workers of a dead server touch the lock for an instant,
    so a busy lock is tried again for two seconds.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _TAKE_FOR_S
        while not _try_lock(self._handle, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(self._handle)
                raise FailedPrecondition(
                    f"another Firebox server is running on {path.parent}; stop it, or choose another --data-dir",
                    reason="SERVER_RUNNING",
                )
            time.sleep(_RETRY_S)

    def release(self) -> None:
        os.close(self._handle)


def watch_lease(path: Path, grace_s: float, expired: Callable[[], None]) -> None:
    """Start a daemon thread that calls `expired` once no server has held `path` for `grace_s` seconds."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def watch() -> None:
        while True:
            fcntl.flock(handle, fcntl.LOCK_SH)
            fcntl.flock(handle, fcntl.LOCK_UN)
            if not _held_again(handle, grace_s):
                expired()
                return

    threading.Thread(target=watch, name="lease", daemon=True).start()


def _held_again(handle: int, grace_s: float) -> bool:
    """Whether a server takes the lock within `grace_s`; the lock is only touched, so that a server can get it."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        time.sleep(_RETRY_S)
        if not _try_lock(handle, fcntl.LOCK_SH):
            return True
        fcntl.flock(handle, fcntl.LOCK_UN)
    return False


def _try_lock(handle: int, mode: int) -> bool:
    try:
        fcntl.flock(handle, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
