"""What a worker that outlived its server holds, entered again."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from firebox.control.services import training_shapes
from firebox.control.services.context import Control
from firebox.control.services.training_shapes import Shape
from firebox.launch.api import Worker
from firebox.wire.errors import FireboxError

log = logging.getLogger(__name__)


async def restore(control: Control, holder: str, shape: Awaitable[Shape], worker: Worker) -> None:
    """Enter what `worker` holds under `holder`; where its shape is gone, it runs on without being counted."""
    try:
        need = training_shapes.need(control, await shape)
    except FireboxError as error:
        log.warning("%s runs on, its capacity uncounted: %s", holder, error.message)
        return
    control.capacity.restore(holder, need, worker.devices)
