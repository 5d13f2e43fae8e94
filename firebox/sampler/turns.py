"""Whose weights answer now: requests for one snapshot run together, those for another wait for their turn.

Owns the order of turns. Does not know how weights are changed: it is handed the way to do it. Runs on one event loop.

Invariants: a request runs only while its own weights are live; nobody waits for more than one turn of each other
snapshot that was asked for before it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from firebox.wire.errors import FireboxError, Unavailable
from firebox.wire.worker import SnapshotRef


@dataclass(eq=False)
class _Ticket:
    """One request in the queue; `admitted` resolves when its turn has come, or fails with the reason it never will."""

    snapshot: SnapshotRef | None
    admitted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Turns:
    """`change` makes a snapshot's weights live (None: the base model's) once nobody uses the others; `is_live` tells
    whether they are."""

    def __init__(
        self,
        change: Callable[[SnapshotRef | None], Awaitable[None]],
        is_live: Callable[[SnapshotRef | None], bool],
    ) -> None:
        self._change = change
        self._is_live = is_live
        self._users = 0
        self._queue: list[_Ticket] = []
        self._changing: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def using(self, snapshot: SnapshotRef | None, within_s: float) -> AsyncIterator[None]:
        """Wait until the weights are those of `snapshot`, and keep them so inside the block.

        Raises what `change` raises, and Unavailable when the turn has not come within `within_s` seconds.
        """
        ticket = _Ticket(snapshot)
        self._queue.append(ticket)
        self._advance()
        try:
            await _admission(ticket, within_s)
            yield
        finally:
            self._leave(ticket)

    def _leave(self, ticket: _Ticket) -> None:
        """Whoever asked is gone: out of the queue, or out of the turn, also when that came in the same moment."""
        if ticket in self._queue:
            self._queue.remove(ticket)
        elif not ticket.admitted.cancelled() and ticket.admitted.exception() is None:
            self._users -= 1
        self._advance()

    def _advance(self) -> None:
        """Admit whom the live weights suit, if one of them is in front; change weights when nobody uses them."""
        if self._changing is not None or not self._queue:
            return
        wanted = self._queue[0].snapshot
        if self._is_live(wanted):
            self._admit(wanted)
        elif self._users == 0:
            self._changing = asyncio.create_task(self._turn_to(wanted))

    def _admit(self, snapshot: SnapshotRef | None) -> None:
        """Let everybody in who waits for this snapshot, which is live; who comes later queues up behind the others."""
        for ticket in self._waiting_for(snapshot):
            self._users += 1
            ticket.admitted.set_result(None)

    async def _turn_to(self, snapshot: SnapshotRef | None) -> None:
        try:
            await self._change(snapshot)
        except FireboxError as error:
            for ticket in self._waiting_for(snapshot):
                ticket.admitted.set_exception(error)
        else:
            self._admit(snapshot)
        finally:
            self._changing = None
        self._advance()

    def _waiting_for(self, snapshot: SnapshotRef | None) -> list[_Ticket]:
        """Take who waits for this snapshot out of the queue; who has stopped waiting is left for itself to go."""
        found = [t for t in self._queue if t.snapshot == snapshot and not t.admitted.done()]
        self._queue = [ticket for ticket in self._queue if ticket not in found]
        return found


async def _admission(ticket: _Ticket, within_s: float) -> None:
    try:
        async with asyncio.timeout(within_s):
            await ticket.admitted
    except TimeoutError as error:
        raise Unavailable(
            f"other weights were in use for {within_s:g} s; retry when the load is lower", reason="DEADLINE_EXCEEDED"
        ) from error
