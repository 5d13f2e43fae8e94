"""The loop under every reconciler: a changed resource is stepped until nothing is left to do.

Invariant: one step per resource at a time, and a change during a step leads to another step, so none is lost. Steps
never wait for a process: whatever takes long runs beside them and kicks the resource when it ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from firebox.control.services.context import Control
from firebox.wire.errors import FireboxError

log = logging.getLogger(__name__)


class Driver:
    """Steps the resources of one `collection`, once it is started; a step that raises is reported to `failed`."""

    def __init__(
        self,
        control: Control,
        collection: str,
        step: Callable[[str], Awaitable[None]],
        failed: Callable[[str, str], Awaitable[None]],
    ) -> None:
        self._collection = collection
        self._step = step
        self._failed = failed
        self._due: dict[str, None] = {}  # in the order of their kicks
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._running = False
        control.changes.listen(self._changed)

    def kick(self, name: str) -> None:
        """Have `name` looked at soon."""
        self._due[name] = None
        if name not in self._tasks and self._running:
            self._tasks[name] = asyncio.create_task(self._drive(name))

    def start(self) -> None:
        """Look at what was kicked so far. All that an earlier server left must have been taken back by then: who acts
        sooner takes what somebody else still holds."""
        self._running = True
        for name in list(self._due):
            self.kick(name)

    async def close(self) -> None:
        """No step after this; what the workers do then is for the next server to find."""
        self._running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _changed(self, name: str) -> None:
        if name.split("/")[2] == self._collection:
            self.kick(name)

    async def _drive(self, name: str) -> None:
        try:
            while name in self._due:
                del self._due[name]
                try:
                    await self._step(name)
                except Exception as error:  # noqa: BLE001 - one resource must not end the loop of the others
                    await self._report(name, error)
        finally:
            del self._tasks[name]

    async def _report(self, name: str, error: Exception) -> None:
        log.error("%s: a step failed", name, exc_info=error)
        reason = error.message if isinstance(error, FireboxError) else f"{type(error).__name__}: {error}"
        await self._failed(name, reason)
