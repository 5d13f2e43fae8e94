"""Sessions whose client is gone: put away after a long silence, so that they do not hold memory for ever.

A client says that it is there every ten seconds, and with every request. Knows when it is time to look, not what is put
away. Invariant: a session with work in the engine is never silent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Final

from firebox.trainer.session import Session
from firebox.wire.errors import FailedPrecondition

SILENCE_S: Final = 3600.0
"""Long enough for a laptop that slept through lunch: the models of a session that is put away must be loaded again."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def put_away_silent(session: Session) -> Iterator[None]:
    """Inside this block, sessions of which nothing is heard for an hour are put away."""
    task = asyncio.create_task(_watch(session))
    try:
        yield
    finally:
        task.cancel()


async def _watch(session: Session) -> None:
    while True:
        # Silence is the absence of events, so it can only be looked for, a few times in the time it is about.
        await asyncio.sleep(SILENCE_S / 4)
        for session_id in session.silent(SILENCE_S):
            log.warning("%s was silent for %g s: its models are saved and unloaded", session_id, SILENCE_S)
            try:
                await session.put_away(session_id)
            except FailedPrecondition as error:
                log.error("%s; this is tried again", error.message)
