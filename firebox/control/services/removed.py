"""What was removed a moment ago, in memory: a client whose connection broke asks again, and it is no mistake.

Invariant: only what this server has removed is known here, and for a few minutes only.
"""

from __future__ import annotations

import time
from typing import Final

_KEEP_S: Final = 300.0
"""As long as the SDKs send a request again."""


class Removed:
    def __init__(self) -> None:
        self._removed_at: dict[str, float] = {}

    def note(self, name: str) -> None:
        now = time.monotonic()
        self._removed_at = {n: at for n, at in self._removed_at.items() if at > now - _KEEP_S} | {name: now}

    def lately(self, name: str) -> bool:
        return name in self._removed_at and self._removed_at[name] > time.monotonic() - _KEEP_S
