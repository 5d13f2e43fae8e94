"""What is done from time to time, because no event tells that it is due: once at the start, then every so often.

Invariant: a full or broken disk is logged and met again next time; it ends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


class Periodic:
    """Awaits `work` every `every_s` seconds, until closed. `what` names it in the log."""

    def __init__(self, what: str, work: Callable[[], Awaitable[None]], every_s: float) -> None:
        self._what = what
        self._work = work
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            try:
                await self._work()
            except OSError as error:
                log.error("%s: %s", self._what, error)
            await asyncio.sleep(self._every_s)
