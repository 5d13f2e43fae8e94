"""Archives deleted jobs once their checkpoints have been kept for long enough, and removes their files.

Looks once a day, so a job is kept for 30 to 31 days. Invariant: files go before the record of them does, so what a
crash interrupts is done again.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from datetime import UTC, datetime, timedelta
from typing import Final

from firebox.control.reconcile.periodic import Periodic
from firebox.control.services import trainer_jobs
from firebox.control.services.context import Control
from firebox.control.tables.base import rfc3339

KEPT: Final = timedelta(days=30)
_LOOK_EVERY_S: Final = 24 * 3600.0

log = logging.getLogger(__name__)


def tombstones(control: Control) -> Periodic:
    async def sweep() -> None:
        for row in await trainer_jobs.deleted_before(control, rfc3339(datetime.now(UTC) - KEPT)):
            folder = control.layout.job(row.account, row.id)
            if folder.exists():
                await asyncio.to_thread(shutil.rmtree, folder)
            await trainer_jobs.archive(control, row)
            log.info("%s is archived: what it saved is removed", row.name)

    return Periodic("deleted jobs could not be removed", sweep, _LOOK_EVERY_S)
