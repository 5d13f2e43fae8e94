"""The last words of a worker, for the message of a failure."""

from __future__ import annotations

from pathlib import Path

_BYTES = 4000
_LINES = 5


def log_tail(path: Path) -> str:
    """The last lines of the log in `path`, joined by ` | `; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return " | ".join(line.strip() for line in lines[-_LINES:] if line.strip())
