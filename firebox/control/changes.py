"""Who waits for a resource, and who acts on it. In memory; names in, wake-ups out.

Invariant: a waiter subscribes before it reads, so no change between the two is missed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """Call `notify` after every committed change of the resource `name`."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._listeners: list[Callable[[str], None]] = []

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have `listener` called with the name of every changed resource."""
        self._listeners.append(listener)

    def notify(self, name: str) -> None:
        for future in self._waiting.pop(name, ()):
            if not future.done():
                future.set_result(None)
        for listener in self._listeners:
            listener(name)

    async def until(
        self, name: str, read: Callable[[], Awaitable[T]], settled: Callable[[T], bool], within_s: float
    ) -> T:
        """Read the resource until `settled` holds, once per change; after `within_s` seconds return it as it is."""
        deadline = asyncio.get_running_loop().time() + within_s
        while True:
            changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(name, set()).add(changed)
            try:
                value = await read()
                left = deadline - asyncio.get_running_loop().time()
                if settled(value) or left <= 0:
                    return value
                await asyncio.wait({changed}, timeout=left)
            finally:
                self._drop(name, changed)

    def _drop(self, name: str, future: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(name)
        if waiting is not None:
            waiting.discard(future)
            if not waiting:
                del self._waiting[name]
