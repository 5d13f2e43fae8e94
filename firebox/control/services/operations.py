"""Long-running operations: today promotions. PENDING, then DONE with a response or an error, for ever.

Knows how an operation is stored and awaited, not how it is done.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from firebox.control.services.context import Control
from firebox.control.tables.operations import OperationRow
from firebox.wire.control import Operation, Status
from firebox.wire.errors import FireboxError, NotFound
from firebox.wire.names import split_resource

PENDING: Final = "PENDING"
DONE: Final = "DONE"


async def begin(control: Control, account: str, request: dict[str, Any]) -> OperationRow:
    """Add the operation, or return the pending one with the same request: a client's retry starts nothing twice."""

    def work(session: Session) -> OperationRow:
        query = select(OperationRow).where(OperationRow.account == account, OperationRow.state == PENDING)
        for row in session.scalars(query):
            if row.request == request:
                return row
        added = OperationRow(account=account, id=uuid.uuid4().hex, state=PENDING, request=request)
        session.add(added)
        return added

    row = await control.db.run(work)
    control.changes.notify(row.name)
    return row


async def get(control: Control, account: str, ident: str) -> OperationRow:
    row = await control.db.run(lambda session: session.get(OperationRow, (account, ident)))
    if row is None:
        raise NotFound(f"operation {ident!r} does not exist in account {account!r}")
    return row


async def by_name(control: Control, name: str) -> OperationRow:
    return await get(control, *split_resource(name, OperationRow.collection))


async def pending(control: Control) -> Sequence[OperationRow]:
    return await control.db.run(lambda session: session.scalars(all_pending()).all())


def all_pending() -> Select[OperationRow]:
    return select(OperationRow).where(OperationRow.state == PENDING)


async def finish(control: Control, row: OperationRow, outcome: dict[str, Any] | FireboxError) -> None:
    """Record the outcome; the first one stays."""

    def work(session: Session) -> None:
        stored = session.get_one(OperationRow, (row.account, row.id))
        if stored.state == DONE:
            return
        stored.state = DONE
        if isinstance(outcome, FireboxError):
            stored.error = {"code": outcome.code, "message": outcome.message, "details": []}
        else:
            stored.response = outcome

    await control.db.run(work)
    control.changes.notify(row.name)


async def settled(control: Control, row: OperationRow, within_s: float) -> OperationRow:
    return await control.changes.until(
        row.name, lambda: get(control, row.account, row.id), lambda seen: seen.state == DONE, within_s
    )


def show(row: OperationRow) -> Operation:
    return Operation(
        name=row.name,
        done=row.state == DONE,
        response=row.response,
        error=Status.model_validate(row.error) if row.error else None,
        metadata={"statusMessage": "promoting" if row.state == PENDING else "done"},
    )
