"""Archives deleted jobs once their checkpoints have been kept for long enough, and removes their files.

Looks once a day, so a job is kept for 30 to 31 days. Invariant: files go before the record of them does, so what a
crash interrupts is done again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from datetime import UTC, datetime, timedelta
from typing import Final

from firebox.control.services import trainer_jobs
from firebox.control.services.context import Control
from firebox.control.tables.base import rfc3339

KEPT: Final = timedelta(days=30)
_LOOK_EVERY_S: Final = 24 * 3600.0

log = logging.getLogger(__name__)


class Tombstones:
    def __init__(self, control: Control) -> None:
        self._control = control
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
                await self._sweep()
            except OSError as error:
                log.error("deleted jobs could not be removed: %s", error)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _sweep(self) -> None:
        for row in await trainer_jobs.deleted_before(self._control, rfc3339(datetime.now(UTC) - KEPT)):
            folder = self._control.layout.job(row.account, row.id)
            if folder.exists():
                await asyncio.to_thread(shutil.rmtree, folder)
            await trainer_jobs.archive(self._control, row)
            log.info("%s is archived: what it saved is removed", row.name)
