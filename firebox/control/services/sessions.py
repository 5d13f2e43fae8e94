"""Sessions of Tinker clients: opened, kept alive by heartbeats, finished.

Knows nothing of what a session made. Invariant: a finished session stays finished; one that merely fell silent goes on
with its next request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services.context import Control
from firebox.control.tables.sessions import SessionRow
from firebox.wire.errors import Gone, NotFound
from firebox.wire.names import resource
from firebox.wire.tinker import CreateSession, new_session_id

OPEN: Final = "OPEN"
FINISHED: Final = "FINISHED"


async def create(control: Control, account: str, request: CreateSession) -> SessionRow:
    row = SessionRow(account=account, id=new_session_id(), state=OPEN, request=request.model_dump(exclude_none=True))
    await control.db.run(lambda session: session.add(row))
    control.presence.touch(row.name)
    return row


async def get(control: Control, account: str, ident: str) -> SessionRow:
    row = await control.db.run(lambda session: session.get(SessionRow, (account, ident)))
    if row is None:
        raise NotFound(f"session_id: {ident!r} is not known to this server; make a new client", reason="NO_SESSION")
    return row


async def listing(control: Control, account: str) -> Sequence[SessionRow]:
    """Every session of the account, newest first."""
    query = select(SessionRow).where(SessionRow.account == account).order_by(SessionRow.create_time.desc())
    return await control.db.run(lambda session: session.scalars(query).all())


async def touch(control: Control, account: str, ident: str) -> None:
    """The session is in use; raises NotFound or, when it was finished, Gone."""
    name = resource(account, SessionRow.collection, ident)
    if not control.presence.knows(name):
        row = await get(control, account, ident)
        if row.state == FINISHED:
            raise Gone(f"session_id: {ident!r} was finished by its client; make a new one")
    control.presence.touch(name)


async def finish(control: Control, account: str, ident: str) -> None:
    """No request of this session is served after this; finishing it twice is no error."""
    row = await get(control, account, ident)

    def work(session: Session) -> None:
        session.get_one(SessionRow, (account, ident)).state = FINISHED

    await control.db.run(work)
    control.presence.forget(row.name)
