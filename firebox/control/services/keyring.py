"""The active API keys, in memory: found on every request without a disk.

Invariant: the look-up compares the digest with every key's in constant time, whether one fits or not.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from firebox.control.tables.api_keys import ApiKeyRow

_NOTED_EVERY_S: Final = 60.0


class Keyring:
    def __init__(self) -> None:
        self._keys: dict[str, ApiKeyRow] = {}
        self._noted: dict[str, float] = {}
        self._writing: set[asyncio.Future[None]] = set()

    def hold(self, rows: Iterable[ApiKeyRow]) -> None:
        self._keys |= {row.name: row for row in rows}

    def drop(self, row: ApiKeyRow) -> None:
        self._keys.pop(row.name, None)

    def find(self, digest: str) -> ApiKeyRow | None:
        """The key whose secret has this SHA-256."""
        found = None
        for row in self._keys.values():
            if hmac.compare_digest(row.sha256, digest):
                found = row
        return found

    def note(self, row: ApiKeyRow, write: Callable[[], Awaitable[None]]) -> None:
        """The key was used: `write` that down beside the request, unless that was done in the last minute."""
        last = self._noted.get(row.name)
        if last is not None and time.monotonic() - last < _NOTED_EVERY_S:
            return
        self._noted[row.name] = time.monotonic()
        task = asyncio.ensure_future(write())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def close(self) -> None:
        """Return once nothing is being written."""
        await asyncio.gather(*self._writing, return_exceptions=True)
