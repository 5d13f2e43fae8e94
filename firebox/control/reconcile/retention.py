"""Removes what the operator's limits leave no place for. Trainers save without asking, so this looks every minute."""

from __future__ import annotations

import asyncio
import logging
import uuid
from typing import Final

from firebox.control.reconcile.periodic import Periodic
from firebox.control.services import checkpoints, retention
from firebox.control.services.context import Control
from firebox.control.services.retention import Limits

_LOOK_EVERY_S: Final = 60.0

log = logging.getLogger(__name__)


def retaining(control: Control, limits: Limits) -> Periodic:
    async def sweep() -> None:
        for artifact in await retention.removable(control, limits) if limits.any else ():
            grave = control.layout.staging / uuid.uuid4().hex
            await asyncio.to_thread(checkpoints.bury, artifact.directory, grave)
            log.info("%s is removed: newer ones are kept (%d bytes freed)", artifact.directory, artifact.size)

    return Periodic("old checkpoints could not be removed", sweep, _LOOK_EVERY_S)
